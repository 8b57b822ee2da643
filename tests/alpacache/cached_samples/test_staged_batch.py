"""A staged batch is the batch of the ring, filled up, at addresses that stay; every user gets its prefixes from it."""

import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.extraction.config import ExtractConfig
from alpacache.prefix.packed import pack

BATCHES = [[(0, 2), (1, 0), (2, 1)], [(3, 1), (4, 2)]]


@pytest.fixture(scope="module")
def expert(tiny_checkpoint):
    return load_expert(str(tiny_checkpoint), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data(tiny_checkpoint, tmp_path_factory):
    store = str(tmp_path_factory.mktemp("staged") / "store")
    model = str(tiny_checkpoint)
    alpacache.extract(ExtractConfig(source="synthetic:3", model=model, store=store, device="cpu", codec="int8"))
    return CachedDataset([store], Checkpoint(model))


def test_prefixes_are_those_of_the_samples_and_short_batches_are_filled_up(expert, data):
    rows = PrefixRows(data.layout, data.longest, batch_size=3, device=expert.device, batches=1)
    staged = StagedBatch(rows, expert, draws=2)
    addresses = [tensor.data_ptr() for tensor in (staged.action, staged.noise, staged.t, staged.lr, staged.stop)]
    with BatchRing(data, expert.action_space, iter(BATCHES), rows) as ring:
        for places, batch in zip(BATCHES, ring, strict=True):
            count = len(places)
            noise, t = torch.randn(count, 2, 64, 2), torch.rand(count, 2)
            staged.put(batch, noise, t=t, lr=0.125, stop=count == 2)
            longest = max(batch.lengths)
            expected = pack([data.load(index).prefix for _, index in places], device=expert.device, dtype=expert.dtype)
            for layer in range(data.layout.layers):
                got = staged.prefixes(slice(count), longest=longest).layer(layer)
                assert all(torch.equal(mine, other) for mine, other in zip(got, expected.layer(layer), strict=True))
            assert staged.prefixes().longest == data.longest
            assert torch.equal(staged.action[:count, 0], batch.action)
            assert torch.equal(staged.noise[:count], noise)
            assert torch.equal(staged.t[:count], t)
            assert (float(staged.lr), float(staged.stop)) == (0.125, float(count == 2))
            if count == 2:
                assert staged.prefixes().rows.tolist() == [*batch.rows, batch.rows[0]]
                assert torch.equal(staged.noise[2], noise[0])
            ring.done(batch)
    assert addresses == [
        tensor.data_ptr() for tensor in (staged.action, staged.noise, staged.t, staged.lr, staged.stop)
    ]


def test_one_batch_of_rows_waits_for_done(expert, data):
    rows = PrefixRows(data.layout, data.longest, batch_size=3, device=expert.device, batches=1)
    assert rows.data.shape[0] == 3
    with BatchRing(data, expert.action_space, iter(BATCHES), rows) as ring:
        batches = iter(ring)
        first = next(batches)
        with pytest.raises(ValueError, match="rows that are in use"):
            next(batches)
        ring.done(first)
        assert next(iter(ring)).rows == (0, 1)


def test_inputs_of_another_shape_are_refused(expert, data):
    rows = PrefixRows(data.layout, data.longest, batch_size=3, device=expert.device)
    staged = StagedBatch(rows, expert, draws=2)
    with BatchRing(data, expert.action_space, iter(BATCHES), rows) as ring:
        batch = next(iter(ring))
        with pytest.raises(
            ValueError, match=r"noise is \[3, 1, 64, 2\] and t \[3, 2\]; expected \[3, 2, 64, 2\] of noise"
        ):
            staged.put(batch, torch.zeros(3, 1, 64, 2), t=torch.zeros(3, 2))
        ring.done(batch)
