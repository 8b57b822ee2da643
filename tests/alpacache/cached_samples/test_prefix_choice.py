"""Tails of reasoning rollouts in the ring: chosen by key, and the same prefixes as the VLM left them, on every path."""

import shutil
from collections import Counter

import pytest
import torch

from alpacache import randomness
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples import ring_source
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.prefix_choice import PrefixChoice
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.errors import DataError, UsageError
from alpacache.inference.prediction import flow_loss
from alpacache.prefix.packed import pack
from cache_store import CacheReader, CorruptSampleError
from cache_store.format.names import sample_key

CPU = torch.device("cpu")
SEED = 6
BATCHES = [[(2 * step, step % 2), (2 * step + 1, 1 - step % 2)] for step in range(8)]
"""Each of the two samples once in every epoch of two places."""


@pytest.fixture(scope="module")
def expert(tiny_checkpoint):
    return load_expert(str(tiny_checkpoint), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def opened(rollout_stores, tiny_checkpoint):
    def opened(codec, prefix, seed=SEED, stores=None):
        choice = PrefixChoice(prefix=prefix, seed=seed)
        return CachedDataset(stores or [rollout_stores[codec]], Checkpoint(str(tiny_checkpoint)), choice=choice)

    return opened


def make_rows(data, batch_size=2, **settings):
    return PrefixRows(
        data.layout, data.longest, batch_size=batch_size, device=CPU, tail_room=data.tail_room, **settings
    )


def chosen(data, index, position):
    """A sample's prefix at a place of the order, put together from what is loaded."""
    tail, sample = data.tail_at(index, position), data.load(index, tails=3)
    return sample.prefix if tail is None else sample.rollout_prefixes()[tail]


def everything(data, expert, batches=BATCHES, **settings):
    """(positions, starts, lengths, layers) of every batch."""
    found, rows = [], make_rows(data)
    staged = StagedBatch(rows, expert, draws=1)
    with BatchRing(data, expert.action_space, iter(batches), rows, **settings) as ring:
        for batch in ring:
            staged.put(batch, torch.zeros(2, 1, 64, 2))
            layers = [staged.prefixes(longest=batch.longest).layer(n) for n in range(data.layout.layers)]
            found.append(
                (batch.positions, batch.starts, batch.lengths, torch.stack([torch.stack(kv) for kv in layers]))
            )
            ring.done(batch)
    return found


def same(first, second):
    return len(first) == len(second) and all(
        one[:3] == other[:3] and torch.equal(one[3], other[3]) for one, other in zip(first, second, strict=True)
    )


def test_the_choice_depends_on_seed_sample_and_epoch_alone_and_is_even():
    choice = PrefixChoice(prefix="mix", seed=3)
    one = [choice.tail("clip@5100000#0", epoch, rollouts=3) for epoch in range(2000)]
    assert one == [choice.tail("clip@5100000#0", epoch, rollouts=3) for epoch in range(2000)]
    counts = Counter(one)
    assert counts[None] == pytest.approx(1000, abs=4 * 22)
    assert all(counts[tail] == pytest.approx(333, abs=4 * 17) for tail in range(3))
    for other in (
        [PrefixChoice(prefix="mix", seed=4).tail("clip@5100000#0", epoch, rollouts=3) for epoch in range(2000)],
        [choice.tail("clip@5200000#0", epoch, rollouts=3) for epoch in range(2000)],
    ):
        agreeing = sum(a == b for a, b in zip(one, other, strict=True))
        assert agreeing == pytest.approx(2000 / 3, abs=4 * 22)  # by chance: 1/4 + 3/36
    always = Counter(PrefixChoice(prefix="rollouts").tail("clip", epoch, rollouts=2) for epoch in range(200))
    assert always.keys() == {0, 1}
    assert PrefixChoice().tail("clip", 0, rollouts=3) is None


@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("prefix", ["rollouts", "mix"])
def test_every_data_path_brings_stem_and_chosen_tail(opened, expert, codec, prefix, monkeypatch):
    data = opened(codec, prefix)
    whole = everything(data, expert)
    tails = [[data.tail_at(index, position) for position, index in batch] for batch in BATCHES]
    assert {None in of_batch for of_batch in tails} == ({False} if prefix == "rollouts" else {False, True})
    assert any(one is None and other is not None for one, other in tails) == (prefix == "mix")
    assert len({tokens for _, _, lengths, _ in whole for tokens in lengths}) > 2
    for batch, (positions, starts, lengths, layers) in zip(BATCHES, whole, strict=True):
        prefixes = [chosen(data, index, position) for position, index in batch]
        assert starts == tuple(one.start_position for one in prefixes)
        assert lengths == tuple(one.prefix_len for one in prefixes)
        alone = pack(prefixes, device=CPU, dtype=torch.float32)
        for layer in range(data.layout.layers):
            for got, expected in zip(layers[layer], alone.layer(layer), strict=True):
                assert torch.equal(got[:, :, : alone.longest], expected)
                assert not got[:, :, alone.longest :].any()
        assert positions == tuple(position for position, _ in batch)
    for settings in ({"in_memory": True}, {"threads": 1, "buffers": 1}, {"threads": 5, "buffers": 9}):
        assert same(everything(data, expert, **settings), whole)
    assert same(everything(data, expert, BATCHES[5:]), whole[5:])
    monkeypatch.setattr(ring_source, "_REMEMBERED", 1)
    assert same(everything(data, expert), whole)


def test_a_start_position_is_the_stored_one_where_the_text_never_ended(opened, rollout_samples):
    """Not rope delta and length: the last token of such a text has a position and no KV."""
    data = opened("bf16", "rollouts")
    found = {}
    for batch in BATCHES * 8:
        for position, index in batch:
            prefix = chosen(data, index, position)
            found[index, data.tail_at(index, position)] = prefix.start_position - prefix.rope_delta - prefix.prefix_len
    expected = {
        (index, number): len(tail.token_ids) - tail.keys.shape[2]
        for index, (_, _, _, tails) in enumerate(rollout_samples)
        for number, tail in enumerate(tails)
    }
    assert found.items() <= expected.items()
    assert 1 in found.values()


@pytest.mark.parametrize("codec", ["bf16", "int8"])
@torch.no_grad()
def test_loss_and_velocity_are_those_with_the_vlm_in_the_loop(opened, expert, rollout_samples, codec, relative_error):
    """Of direct prefixes and tails of several lengths in one batch, and of each sample by itself."""
    data = opened(codec, "mix")
    batches = [[(2 * step, 0), (2 * step + 1, 1)] for step in range(6)]
    lengths, rows = set(), make_rows(data)
    staged = StagedBatch(rows, expert, draws=2)
    with BatchRing(data, expert.action_space, iter(batches), rows) as ring:
        for batch in ring:
            noise = torch.stack([randomness.noise(0, position, draws=2) for position in batch.positions])
            t = torch.stack([randomness.times(0, place, draws=2, schedule="beta") for place in batch.positions])
            staged.put(batch, noise, t=t)
            flow, prefixes = (staged.action, staged.noise, staged.t), staged.prefixes()
            losses = flow_loss(expert, *flow, prefixes, causal=False)
            velocity = expert.velocity(noise, t, prefixes)
            live = []
            for index, position in enumerate(batch.positions):
                _, inputs, prefix, tails = rollout_samples[index]
                tail = data.tail_at(index, position)
                live.append(prefix if tail is None else prefix.with_tail(inputs.stem_len, tails[tail]))
                alone = [tensor[index : index + 1] for tensor in flow]
                by_itself = flow_loss(expert, *alone, live[-1:], causal=False)
                assert relative_error(losses[index : index + 1], by_itself) < (1e-5 if codec == "bf16" else 2e-2)
            assert relative_error(velocity, expert.velocity(noise, t, live)) < (1e-5 if codec == "bf16" else 5e-2)
            lengths.add(batch.lengths)
            ring.done(batch)
    assert len(lengths) > 2


def test_memory_has_place_for_all_tails(opened, expert, monkeypatch):
    data, direct = opened("int8", "mix"), opened("int8", "direct")
    assert direct.tail_bytes.shape == (2, 0)
    assert (data.kv_bytes == direct.kv_bytes).all()
    sizes = [*data.kv_bytes.tolist(), *data.tail_bytes.flatten().tolist()]
    assert len(sizes) == 8
    assert min(sizes) > 0
    needed = sum(-(-size // 4096) * 4096 for size in sizes)
    monkeypatch.setattr(ring_source, "available_bytes", lambda: ring_source._SPARE_BYTES + needed - 1)
    with pytest.raises(UsageError, match=f"2 samples in memory takes {needed:,} bytes"):
        BatchRing(data, expert.action_space, iter(BATCHES), make_rows(data), in_memory=True)


def test_rows_have_room_for_the_longest_that_may_come(opened):
    for codec in ("bf16", "int8"):
        data, direct = opened(codec, "rollouts"), opened(codec, "direct")
        samples = [data.load(index, tails=3) for index in range(2)]
        room = data.tail_room
        assert room.stored == direct.longest == max(sample.prefix.prefix_len for sample in samples)
        assert room.tail == max(tail.keys.shape[2] for sample in samples for tail in sample.tails)
        assert data.longest == room.stored + room.tail
        assert direct.tail_room is None
        rows = make_rows(data)
        assert (rows.tails is None) == (codec == "bf16")
        assert rows.data.shape[1] == data.layout.row_bytes(data.longest if codec == "bf16" else room.stored)


def test_a_damaged_tail_is_named_and_one_that_is_not_trained_on_is_not_read(opened, expert, rollout_stores, tmp_path):
    store = shutil.copytree(rollout_stores["int8"], tmp_path / "store")
    sample_id = CacheReader(store).sample_ids[0]
    (chunk,) = (store / "samples").glob(f"{sample_key(sample_id)}.*/tail.1.kv/c.0")
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    sound, damaged = opened("int8", "direct", stores=[store]), opened("int8", "rollouts", stores=[store])
    assert len(everything(sound, expert)) == len(BATCHES)
    assert sound.error_of(0) is None
    assert isinstance(damaged.error_of(0), CorruptSampleError)
    with pytest.raises(CorruptSampleError, match=r"tail\.1\.kv") as caught:
        everything(damaged, expert, BATCHES * 4)
    assert caught.value.sample_id == sample_id


def test_a_stem_longer_than_the_prefix_is_refused(opened, expert, monkeypatch):
    data = opened("bf16", "rollouts")
    reader = data.locate(0)[0]
    plan = reader.plan

    def wrong(sample_id, fields, **settings):
        read = plan(sample_id, fields, **settings)
        read.arrays["stem_len"] = read.arrays["prefix_len"] + 1
        return read

    monkeypatch.setattr(reader, "plan", wrong)
    with pytest.raises(DataError, match=r"a stem of \d+ tokens; expected 1 to \d+"):
        everything(data, expert)


def test_a_store_without_rollouts_is_refused_with_the_remedy(opened, tiny_checkpoint, tmp_path):
    import alpacache
    from alpacache.extraction.config import ExtractConfig

    store = str(tmp_path / "direct")
    config = ExtractConfig(source="synthetic:1", model=str(tiny_checkpoint), store=store, frames=1, device="cpu")
    alpacache.extract(config)
    with pytest.raises(
        UsageError, match=r"direct has no reasoning rollouts.*extract --reasoning rollout.*--prefix direct"
    ):
        opened("bf16", "mix", stores=[store])
    assert len(opened("bf16", "direct", stores=[store])) == 1
