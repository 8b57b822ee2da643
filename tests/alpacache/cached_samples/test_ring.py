"""Batches from the ring are the samples as loaded one by one, whatever the device, the threads and the memory."""

import math
import shutil
import threading
import zlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples import ring_source
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.order import GlobalOrder
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.errors import DataError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.prefix.codecs import TENSOR_CODECS
from alpacache.prefix.packed import PackedPrefixes, pack
from alpacache.prefix.tensor_codec import TensorCodec
from cache_store import CODECS, CorruptSampleError, KVCodec
from cache_store.kv.registry import KINDS

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def extract(checkpoint, path, samples, *, codec="bf16", **settings):
    config = ExtractConfig(
        source=f"synthetic:{samples}", model=str(checkpoint), store=str(path), device="cpu", **settings
    )
    object.__setattr__(config, "codec", codec)  # a test's own codec is none of the config's choices
    assert alpacache.extract(config).extracted == samples
    return path


@pytest.fixture(scope="module")
def stores(tiny_checkpoint, tmp_path_factory):
    """Lossless, of two lengths: ten samples of one frame and four of two."""
    root = tmp_path_factory.mktemp("batches")
    return [extract(tiny_checkpoint, root / "one", 10, frames=1), extract(tiny_checkpoint, root / "two", 4, frames=2)]


@pytest.fixture(scope="module")
def int8_store(tiny_checkpoint, tmp_path_factory):
    return extract(tiny_checkpoint, tmp_path_factory.mktemp("batches8") / "int8", 6, frames=1, codec="int8")


@pytest.fixture(scope="module")
def space(tiny_checkpoint):
    return load_expert(Checkpoint(str(tiny_checkpoint)), dtype=torch.float32).action_space


@pytest.fixture
def dataset(tiny_checkpoint, stores):
    return CachedDataset(stores, Checkpoint(str(tiny_checkpoint)))


def in_order(count, steps, size, first=0):
    order = GlobalOrder(0, count)
    return iter([[(p, order[p]) for p in range(s * size, (s + 1) * size)] for s in range(first, steps)])


def make_ring(dataset, space, batches, *, batch_size, device=CPU, **settings):
    rows = PrefixRows(dataset.layout, dataset.longest, batch_size=batch_size, device=device)
    return BatchRing(dataset, space, batches, rows, **settings)


def stored_bytes(dataset, index):
    """A sample's keys and values as the store has them."""
    reader, sample_id = dataset.locate(index)
    return torch.from_numpy(reader.read(sample_id, fields=["kv"])["kv"].reshape(-1).view("uint8"))


def row_bytes(ring, batch, place):
    return ring._rows.data[batch.rows[place], : ring._rows.layout.size_bytes(batch.lengths[place])].cpu()


def packed(ring, batch):
    return PackedPrefixes(
        layout=ring._rows.layout,
        data=ring._rows.data,
        rows=torch.tensor(batch.rows),
        lengths=torch.tensor(batch.lengths),
        starts=torch.tensor(batch.starts),
        longest=max(batch.lengths),
        dtype=torch.float32,
    )


def everything(dataset, space, places, **settings):
    """(positions, ids, bytes, actions, lengths, starts) of every batch."""
    found = []
    with make_ring(dataset, space, places, **settings) as ring:
        for batch in ring:
            content = [row_bytes(ring, batch, place).tolist() for place in range(len(batch.rows))]
            found.append((batch.positions, batch.sample_ids, content, batch.action.tolist(), batch.lengths))
            found[-1] += (batch.starts,)
            ring.done(batch)
    return found


@pytest.mark.system
def test_batches_are_the_samples_loaded_one_by_one(dataset, space):
    order, seen, lengths = GlobalOrder(0, 14), 0, set()
    with make_ring(dataset, space, in_order(14, 8, 4), batch_size=4, threads=3) as ring:
        for step, batch in enumerate(ring):
            samples = [dataset.load(order[position]) for position in batch.positions]
            assert batch.positions == tuple(range(step * 4, step * 4 + 4))
            assert batch.sample_ids == tuple(sample.sample_id for sample in samples)
            assert batch.rows == tuple(range(step % 2 * 4, step % 2 * 4 + 4))
            assert batch.lengths == tuple(sample.prefix.prefix_len for sample in samples)
            assert batch.starts == tuple(sample.prefix.start_position for sample in samples)
            poses = [dataset.poses(order[position]) for position in batch.positions]
            assert torch.equal(batch.action, torch.stack([space.to_action(*of_one) for of_one in poses]))
            assert batch.action.dtype == torch.float32
            assert batch.ready is None
            alone = pack([sample.prefix for sample in samples], device=CPU, dtype=torch.float32)
            for layer in range(ring._rows.layout.layers):
                got, expected = packed(ring, batch).layer(layer), alone.layer(layer)
                assert torch.equal(got[0], expected[0])
                assert torch.equal(got[1], expected[1])
            lengths.update(batch.lengths)
            ring.done(batch)
            seen += 1
    assert seen == 8  # 32 places: every sample a second time, from what is remembered
    assert len(lengths) == 2
    assert ring._rows.longest == max(lengths)
    assert ring._rows.data.shape == (8, ring._rows.data.shape[1])
    assert ring._rows.data.shape[1] % 256 == 0
    assert 8 <= ring._rows.data.shape[1] - ring._rows.layout.size_bytes(ring._rows.longest) < 264


@pytest.mark.system
def test_a_quantised_store_comes_encoded(tiny_checkpoint, int8_store, space):
    dataset = CachedDataset([int8_store], Checkpoint(str(tiny_checkpoint)))
    with make_ring(dataset, space, in_order(6, 3, 3), batch_size=3) as ring:
        assert ring._rows.layout.codec == dataset.codec is not None
        for batch in ring:
            samples = [dataset.load(GlobalOrder(0, 6)[position]) for position in batch.positions]
            alone = pack([sample.prefix for sample in samples], device=CPU, dtype=torch.float32)
            assert alone.layout == ring._rows.layout
            assert torch.equal(packed(ring, batch).layer(1)[0], alone.layer(1)[0])
            assert all(
                torch.equal(row_bytes(ring, batch, place), sample.prefix.data) for place, sample in enumerate(samples)
            )
            ring.done(batch)


def test_memory_threads_buffers_and_a_late_start_change_nothing(dataset, space, monkeypatch):
    whole = everything(dataset, space, in_order(14, 9, 3), batch_size=3)
    assert len(whole) == 9
    assert everything(dataset, space, in_order(14, 9, 3), batch_size=3, in_memory=True) == whole
    assert everything(dataset, space, in_order(14, 9, 3), batch_size=3, threads=1, buffers=1) == whole
    resumed = everything(dataset, space, in_order(14, 9, 3, first=6), batch_size=3, threads=5, buffers=9)
    assert [item[:2] + item[3:] for item in resumed] == [item[:2] + item[3:] for item in whole[6:]]
    monkeypatch.setattr(ring_source, "_REMEMBERED", 5)
    assert everything(dataset, space, in_order(14, 9, 3), batch_size=3) == whole


def test_samples_in_memory_are_read_once(tiny_checkpoint, stores, space, tmp_path):
    """The same sample twice in flight, too: the first has arrived before the second is handed out."""
    copies = [shutil.copytree(store, tmp_path / store.name) for store in stores]
    dataset = CachedDataset(copies, Checkpoint(str(tiny_checkpoint)))
    expected = {index: stored_bytes(dataset, index) for index in range(14)}
    places = [[(p, p // 2)] for p in range(28)] + [[(28 + p, p % 14), (29 + p, p % 14)] for p in range(0, 40, 2)]
    with make_ring(dataset, space, iter(places), batch_size=2, in_memory=True, buffers=6, threads=4) as ring:
        for step, batch in enumerate(ring):
            for place, (_, index) in enumerate(places[step]):
                assert torch.equal(row_bytes(ring, batch, place), expected[index])
            ring.done(batch)
            if step == 27:  # all were used
                for copy in copies:
                    shutil.rmtree(copy)
    assert step == len(places) - 1


def test_too_little_memory_is_refused_before_anything_is_read(dataset, space, monkeypatch):
    monkeypatch.setattr(ring_source, "available_bytes", lambda: ring_source._SPARE_BYTES + 10_000)
    with pytest.raises(UsageError, match=r"14 samples in memory takes [\d,]+ bytes.* 2,147,493,648 are available") as e:
        make_ring(dataset, space, in_order(14, 1, 4), batch_size=4, in_memory=True)
    assert "Leave --in-memory out" in str(e.value)


def test_each_process_of_a_machine_needs_room_for_all_samples(dataset, space, monkeypatch):
    one = ring_source._SPARE_BYTES + sum(-(-size // 4096) * 4096 for size in dataset.kv_bytes.tolist())
    monkeypatch.setattr(ring_source, "available_bytes", lambda: 2 * one)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    make_ring(dataset, space, in_order(14, 1, 4), batch_size=4, in_memory=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=f"each of 3 processes on this machine: {3 * one:,} together; {2 * one:,} are"):
        make_ring(dataset, space, in_order(14, 1, 4), batch_size=4, in_memory=True)


def test_rows_are_double_buffered_and_wait_for_done(dataset, space):
    with make_ring(dataset, space, in_order(14, 6, 2), batch_size=2) as ring:
        iterator = iter(ring)
        first = next(iterator)
        before = ring._rows.data[:2].clone()
        second = next(iterator)
        assert (first.rows, second.rows) == ((0, 1), (2, 3))
        with pytest.raises(ValueError, match="rows that are in use; call `done`"):
            next(iterator)
        assert torch.equal(ring._rows.data[:2], before)
        after = ring._rows.data[2:].clone()
        ring.done(first)
        assert torch.equal(ring._rows.data[:2], before)
        third = next(iter(ring))
        assert (third.rows, third.positions) == ((0, 1), (4, 5))
        assert not torch.equal(ring._rows.data[:2], before)
        assert torch.equal(ring._rows.data[2:], after)
        assert ring.waited_s > 0


def test_buffers_are_handed_back_as_copies_end_but_for_the_last(dataset, space):
    happened = []

    class Copy:
        def __init__(self, number):
            self.number = number

        def synchronize(self):
            happened.append(f"ended {self.number}")

        def release(self):
            happened.append(f"released {self.number}")

    ring = make_ring(dataset, space, iter([]), batch_size=2, device=torch.device("cpu"))
    ring._copying.extend((Copy(number), Copy(number)) for number in range(3))
    ring.release_finished()
    assert happened == ["ended 0", "released 0", "ended 1", "released 1"]
    ring.release_finished()
    assert len(ring._copying) == 1
    assert len(happened) == 4


def test_a_damaged_sample_is_named_in_its_place(tiny_checkpoint, stores, space, tmp_path):
    broken = shutil.copytree(stores[0], tmp_path / "store")
    dataset = CachedDataset([broken], Checkpoint(str(tiny_checkpoint)))
    reader, sample_id = dataset.locate(GlobalOrder(0, 10)[5])
    chunk = next(path for path in sorted((broken / reader.record(sample_id).folder / "kv").glob("c*")))
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 4
    chunk.write_bytes(data)
    threads, got = threading.active_count(), []

    def run():
        with make_ring(dataset, space, in_order(10, 5, 2), batch_size=2, buffers=8) as ring:
            for batch in ring:
                got.append(batch.positions)
                ring.done(batch)

    with pytest.raises(CorruptSampleError, match=sample_id):
        run()
    assert got == [(0, 1), (2, 3)]
    assert threading.active_count() == threads


def test_a_sample_that_does_not_fit_the_layout_is_named(dataset, space, monkeypatch):
    ring = make_ring(dataset, space, in_order(14, 2, 2), batch_size=2)
    monkeypatch.setattr(type(dataset.layout), "size_bytes", lambda self, tokens: 17)
    with ring, pytest.raises(DataError, match=r"has keys and values \[\d.*\] in \d+ bytes and \d+ tokens"):
        next(iter(ring))


def test_a_path_without_actions_is_named(dataset, space, monkeypatch):
    order, solve = GlobalOrder(0, 14), UnicycleActionSpace.to_action
    bad = dataset.poses(order[2])[2]

    def to_action(self, history_xyz, history_rot, future_xyz, future_rot, **rule):
        if any(torch.equal(path, bad) for path in future_xyz):
            raise ArithmeticError("singular")
        return solve(self, history_xyz, history_rot, future_xyz, future_rot, **rule)

    monkeypatch.setattr(UnicycleActionSpace, "to_action", to_action)
    ring = make_ring(dataset, space, in_order(14, 1, 4), batch_size=4)
    with (
        ring,
        pytest.raises(
            DataError, match=rf"sample '{dataset.sample_id(order[2])}'.* actions \(singular\)\. Leave it out"
        ),
    ):
        next(iter(ring))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_leaving_early_ends_the_threads(dataset, space, error):
    threads, torch_threads = threading.active_count(), torch.get_num_threads()
    for _ in range(5):
        try:
            with make_ring(dataset, space, in_order(14, 500, 3), batch_size=3, threads=4) as ring:
                for _ in zip(range(2), ring, strict=False):
                    pass
                if error is not None:
                    raise error
        except (KeyboardInterrupt, RuntimeError):
            pass
        assert threading.active_count() == threads
    assert torch.get_num_threads() == torch_threads
    with pytest.raises(ValueError, match="closed or was not entered"):
        next(iter(ring))


def test_batches_may_be_smaller_but_not_larger_nor_empty(dataset, space):
    places = [[(0, 3)], [(1, 4), (2, 5)], []]
    with make_ring(dataset, space, iter(places), batch_size=2) as ring:
        iterator = iter(ring)
        first, second = next(iterator), next(iterator)
        assert (first.rows, second.rows) == ((0,), (2, 3))
        ring.done(first)
        with pytest.raises(ValueError, match="1 to 2 samples, got 0"):
            next(iterator)
    with (
        pytest.raises(ValueError, match="1 to 2 samples, got 3"),
        make_ring(dataset, space, iter([[(0, 0), (1, 1), (2, 2)]]), batch_size=2) as ring,
    ):
        next(iter(ring))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("buffers", [1, 3, None])
def test_copies_overlap_work_and_never_overwrite_what_it_reads(dataset, space, in_memory, buffers):
    """Work that begins late reads its rows late: they hold the stored bytes even so, and the host is ahead of it."""
    device = torch.device("cuda")
    order, size, steps = GlobalOrder(0, 14), 3, 40
    stored = {index: stored_bytes(dataset, index) for index in range(14)}
    delays = torch.randint(0, 20_000_000, (steps, 2), generator=torch.Generator().manual_seed(0)).tolist()
    read, ahead = [], 0
    places = in_order(14, steps, size)
    with make_ring(
        dataset, space, places, batch_size=size, device=device, buffers=buffers, in_memory=in_memory
    ) as ring:
        for batch, (before, after) in zip(ring, delays, strict=True):
            assert batch.ready is not None
            torch.cuda._sleep(before)
            torch.cuda.current_stream().wait_event(batch.ready)
            torch.cuda._sleep(after)
            read.append((batch, ring._rows.data[batch.rows[0] : batch.rows[-1] + 1].clone()))
            ring.done(batch)
            ahead += not ring._last_done.query()
    torch.cuda.synchronize()
    assert ahead > steps // 2
    for batch, rows in read:
        for place, position in enumerate(batch.positions):
            expected = stored[order[position]]
            assert torch.equal(rows[place, : len(expected)].cpu(), expected)
    assert all(first.rows != second.rows for (first, _), (second, _) in pairwise(read))


def test_targets_that_a_reading_thread_solves_are_the_same_to_the_bit(dataset, space):
    """As on a GPU, where the loop must not be held up; samples that come again are remembered."""
    found, threads = [], torch.get_num_threads()
    for ahead in (False, True):
        ring = make_ring(dataset, space, in_order(14, 9, 3), batch_size=3, threads=4)
        ring._solve_ahead = ring._source._solve_ahead = ahead
        with ring:
            found.append([])
            for batch in ring:
                found[-1].append((batch.positions, batch.turns, batch.action))
                ring.done(batch)
    assert torch.get_num_threads() == threads
    assert len(found[0]) == 9
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2])


@pytest.mark.gpu
@needs_gpu
def test_host_memory_is_page_locked_while_the_ring_is_open(dataset, space):
    settings = {"batch_size": 2, "device": torch.device("cuda")}
    for in_memory in (False, True):
        with make_ring(dataset, space, in_order(14, 4, 2), **settings, in_memory=in_memory) as ring:
            batch = next(iter(ring))
            memory = (
                list(ring._source._kept.values()) if in_memory else [torch.from_numpy(ring._prefetcher._buffers[0])]
            )
            assert all(tensor.is_pinned() for tensor in memory)
            ring.done(batch)
        assert not any(tensor.is_pinned() for tensor in memory)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_early_with_copies_under_way(dataset, space, error):
    threads = threading.active_count()

    def run():
        with make_ring(dataset, space, in_order(14, 50, 3), batch_size=3, device=torch.device("cuda")) as ring:
            for batch in ring:
                torch.cuda._sleep(50_000_000)
                ring.done(batch)
                if batch.positions[0] >= 9:
                    raise error

    with pytest.raises(error):
        run()
    assert threading.active_count() == threads
    torch.cuda.synchronize()
    rest = torch.ones(10, device="cuda").sum()
    assert float(rest) == 10


@pytest.mark.gpu
@needs_gpu
def test_a_graph_can_be_captured_while_the_ring_reads(dataset, space):
    """Reading threads call no CUDA, so that a capture in the loop's thread is left alone."""
    device = torch.device("cuda")
    with make_ring(dataset, space, in_order(14, 6, 3), batch_size=3, device=device) as ring:
        sums = torch.zeros((), dtype=torch.int64, device=device)
        for step, batch in enumerate(ring):
            torch.cuda.current_stream().wait_event(batch.ready)
            if step == 1:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    sums += ring._rows.data[:, :256].sum()
            if step >= 1:
                graph.replay()
            ring.done(batch)
    torch.cuda.synchronize()
    assert int(sums) > 0


@dataclass(frozen=True)
class DeflatedCodec(KVCodec):
    """Layers deflated one by one behind a table of their ends: a codec without a fixed size."""

    kind = "deflated"
    fixed_size = False

    def to_json(self):
        return {"kind": self.kind}

    @classmethod
    def from_json(cls, document, where):
        return cls()

    def encoded_bytes(self, shape):
        return sum(4 + 2 * math.prod(shape[1:]) + 64 for _ in range(shape[0]))

    def encode(self, bits):
        layers = [zlib.compress(layer.tobytes()) for layer in bits]
        ends = 4 * len(layers) + np.cumsum([len(layer) for layer in layers])
        return np.frombuffer(ends.astype("<u4").tobytes() + b"".join(layers), np.uint8).copy()

    def decode(self, data, shape):
        begin, end = [4 * shape[0], *data[: 4 * shape[0]].view("<u4").tolist()], data[: 4 * shape[0]].view("<u4")
        layers = [zlib.decompress(data[a:b].tobytes()) for a, b in zip(begin, end.tolist(), strict=False)]
        return np.frombuffer(b"".join(layers), np.uint16).reshape(shape)


class DeflatedTensorCodec(TensorCodec):
    def encode_async(self, kv):
        return torch.from_numpy(self._codec.encode(kv.bfloat16().view(torch.uint16).numpy())), torch.tensor(True)

    def decode_layer(self, data, layer, shape):
        kv = self._codec.decode(data.numpy(), shape)[layer]
        return torch.from_numpy(kv.copy()).view(torch.bfloat16)

    def decode_batch(self, prefixes, layer, scratch):
        raise NotImplementedError


def test_samples_of_a_codec_may_have_any_size(monkeypatch, tiny_checkpoint, stores, space, tmp_path):
    """Bytes then say nothing about tokens; what is read is what was encoded."""
    for registry, entry in ((KINDS, DeflatedCodec), (CODECS, DeflatedCodec()), (TENSOR_CODECS, DeflatedTensorCodec)):
        monkeypatch.setitem(registry, "deflated", entry)
    store = extract(tiny_checkpoint, tmp_path / "deflated", 10, frames=1, codec="deflated")
    deflated, plain = (CachedDataset([path], Checkpoint(str(tiny_checkpoint))) for path in (store, stores[0]))
    assert len(set(deflated.kv_bytes.tolist())) > 1
    assert deflated.longest == plain.longest
    with make_ring(deflated, space, in_order(10, 2, 5), batch_size=5) as ring:
        for batch in ring:
            for place, sample_id in enumerate(batch.sample_ids):
                prefix = plain.load(plain.locate(0)[0].sample_ids.index(sample_id)).prefix
                for layer in range(len(prefix.keys)):
                    row = ring._rows.data[batch.rows[place]]
                    keys, values = deflated.layout.decode(row, layer, batch.lengths[place])
                    assert torch.equal(keys, prefix.keys[layer])
                    assert torch.equal(values, prefix.values[layer])
            ring.done(batch)
