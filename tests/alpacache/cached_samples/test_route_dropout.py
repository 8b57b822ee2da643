"""Samples with and without their route in the ring: drawn by key, and each the prefix that the store holds."""

import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert, rollout
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.prefix_choice import PrefixChoice
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.prefix.packed import pack

pytestmark = pytest.mark.system

CPU = torch.device("cpu")
SOURCE = "synthetic:6"
PAIRS = ((0, 1), (2, 3), (4, 5))
BATCHES = [[(6 * epoch + place, place) for place in pair] for epoch in range(4) for pair in PAIRS]


@pytest.fixture(scope="module")
def stores(tiny_checkpoint_15, tmp_path_factory):
    """Six samples, some of which have a route, in a store a codec, with a rollout each."""
    found = {}
    for codec in ("bf16", "int8"):
        found[codec] = tmp_path_factory.mktemp("dropout") / codec
        settings = {"frames": 1, "hidden_states": "none", "route": "source", "reasoning": "rollout", "rollouts": 1}
        settings |= {"source": SOURCE, "model": str(tiny_checkpoint_15), "codec": codec, "device": "cpu"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout, "MAX_TOKENS", 4)
            report = alpacache.extract(ExtractConfig(store=str(found[codec]), **settings))
        assert 0 < report.routes[""] < 6
    return found


@pytest.fixture(scope="module")
def opened(stores, tiny_checkpoint_15):
    def opened(codec, **choice):
        checkpoint = Checkpoint(str(tiny_checkpoint_15))
        return CachedDataset([stores[codec]], checkpoint, choice=PrefixChoice(seed=1, **choice))

    return opened


def batches_of(data, expert, **settings):
    """(starts, lengths, layers) of every batch."""
    rows = PrefixRows(data.layout, data.longest, batch_size=2, device=CPU, tail_room=data.tail_room)
    staged, found = StagedBatch(rows, expert, draws=1), []
    with BatchRing(data, expert.action_space, iter(BATCHES), rows, **settings) as ring:
        for batch in ring:
            staged.put(batch, torch.zeros(2, 1, 64, 2))
            layers = [staged.prefixes(longest=batch.longest).layer(n) for n in range(data.layout.layers)]
            found.append((batch.starts, batch.lengths, torch.stack([torch.stack(kv) for kv in layers])))
            ring.done(batch)
    return found


def test_the_draw_depends_on_seed_sample_and_epoch_alone():
    choice = PrefixChoice(route_dropout=0.3, seed=3)
    one = [choice.drops_route("clip@1#0", epoch) for epoch in range(2000)]
    assert one == [choice.drops_route("clip@1#0", epoch) for epoch in range(2000)]
    assert sum(one) == pytest.approx(600, abs=4 * 21)
    others = [PrefixChoice(route_dropout=0.3, seed=4), "clip@1#0"], [choice, "clip@2#0"]
    for other, sample_id in others:
        agreeing = sum(a == other.drops_route(sample_id, epoch) for epoch, a in enumerate(one))
        assert agreeing == pytest.approx(2000 * 0.58, abs=4 * 23)
    assert not any(PrefixChoice().drops_route("clip@1#0", epoch) for epoch in range(20))
    assert all(PrefixChoice(route_dropout=1.0).drops_route("clip@1#0", epoch) for epoch in range(20))


@pytest.mark.parametrize("prefix", ["direct", "mix"])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_every_batch_brings_the_prefix_that_was_drawn(codec, prefix, opened, tiny_checkpoint_15):
    expert = load_expert(str(tiny_checkpoint_15), dtype=torch.float32).eval()
    data = opened(codec, route_dropout=0.5, prefix=prefix)
    whole, drawn = batches_of(data, expert), set()
    for batch, (starts, lengths, layers) in zip(BATCHES, whole, strict=True):
        prefixes = []
        for position, index in batch:
            tail, twin = data.tail_at(index, position), data.has_twin(index, "unrouted")
            dropped = twin and data.choice.drops_route(data.sample_id(index), position // 6)
            assert dropped == (tail == 0)
            sample = data.load(index, tails=1, twin="unrouted")
            drawn.add("unrouted" if dropped else "direct" if tail is None else "rollout")
            if dropped:
                prefixes.append(sample.twin_prefix())
            else:
                prefixes.append(sample.prefix if tail is None else sample.rollout_prefixes()[0])
        assert starts == tuple(one.start_position for one in prefixes)
        assert lengths == tuple(one.prefix_len for one in prefixes)
        alone = pack(prefixes, device=CPU, dtype=torch.float32)
        for layer in range(data.layout.layers):
            for got, expected in zip(layers[layer], alone.layer(layer), strict=True):
                assert torch.equal(got[:, :, : alone.longest], expected)
    assert drawn == {"unrouted", "direct"} | ({"rollout"} if prefix == "mix" else set())
    for settings in ({"in_memory": True}, {"threads": 1, "buffers": 1}):
        again = batches_of(data, expert, **settings)
        assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(again, whole, strict=True))


def test_stores_without_routes_have_nothing_to_drop(tiny_checkpoint_15, tmp_path, opened):
    store = tmp_path / "plain"
    settings = {"source": SOURCE, "model": str(tiny_checkpoint_15), "samples": 1, "frames": 1, "device": "cpu"}
    alpacache.extract(ExtractConfig(store=str(store), **settings))
    checkpoint, choice = Checkpoint(str(tiny_checkpoint_15)), PrefixChoice(route_dropout=0.1)
    with pytest.raises(UsageError, match=r"no sample of .*plain has a route that could be dropped"):
        CachedDataset([store], checkpoint, choice=choice)
    assert opened("bf16").tail_room is None
    mixed = CachedDataset([store, opened("bf16").locate(0)[0].path], checkpoint, choice=choice)
    assert mixed.tail_bytes[0, 0] == 0
    assert mixed.tail_bytes[1:, 0].any()
    assert mixed.tail_room is not None
