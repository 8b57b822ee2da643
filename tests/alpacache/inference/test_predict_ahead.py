"""All flow steps of a batch at fixed addresses: filled-up batches, a graph, kept layers change nothing but rounding."""

from types import SimpleNamespace

import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples import ring as ring_module
from alpacache.cached_samples import staged_batch
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.ring import BatchRing
from alpacache.extraction.config import ExtractConfig
from alpacache.gpu import capture
from alpacache.inference.prediction import ActionSampler, predict_actions, predict_ahead
from cache_store import UnreadableSampleError

pytestmark = pytest.mark.system  # whole evaluations of a tiny model

SETTINGS = {"paths": 3, "flow_steps": 10, "seed": 0}
INDICES = [4, 0, 3, 1, 2]
"""Two long prefixes, three short ones; a batch of two has both, and the last is short of one."""
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=["bf16", "int8"])
def data(request, tiny_checkpoint, tmp_path_factory):
    """Three samples of one frame and two of two."""
    root, stores = tmp_path_factory.mktemp("sampler"), []
    for frames, samples in ((1, 3), (2, 2)):
        stores.append(str(root / str(frames)))
        common = {"model": str(tiny_checkpoint), "device": "cpu", "codec": request.param}
        alpacache.extract(ExtractConfig(source=f"synthetic:{samples}", store=stores[-1], frames=frames, **common))
    return CachedDataset(stores, Checkpoint(str(tiny_checkpoint)))


def load(tiny_checkpoint, **where):
    """An expert of small velocities: ten steps of one with random weights blow rounding up to whole metres."""
    expert = load_expert(str(tiny_checkpoint), **where).eval()
    with torch.no_grad():
        for parameter in expert.action_out_proj.parameters():
            parameter.mul_(0.05)
    return expert


@pytest.fixture(scope="module")
def expert(tiny_checkpoint):
    return load(tiny_checkpoint, dtype=torch.float32)


def ahead(expert, data, *, batch_size=2, **settings):
    """Actions in the order of `INDICES`."""
    settings = SETTINGS | {"flow_steps": (10,)} | settings
    found = list(predict_ahead(expert, data, INDICES, batch_size=batch_size, **settings))
    assert [index for one in found for index in one.indices] == INDICES
    return torch.cat([one.actions for one in found], dim=1)[0]


def one_by_one(expert, data):
    return torch.cat([predict_actions(expert, [data.load(index)], **SETTINGS) for index in INDICES])


@pytest.mark.ci
def test_rows_read_ahead_give_the_numbers_of_samples_that_were_loaded(data, expert):
    for batch_size in (1, 2, 8):
        starts = range(0, len(INDICES), batch_size)
        parts = [[data.load(index) for index in INDICES[start : start + batch_size]] for start in starts]
        expected = torch.cat([predict_actions(expert, part, **SETTINGS) for part in parts])
        assert torch.equal(ahead(expert, data, batch_size=batch_size), expected)


@pytest.mark.ci
def test_batch_size_is_rounding_in_float32(data, expert):
    expected = one_by_one(expert, data)
    for batch_size in (2, 3, 5):
        assert (ahead(expert, data, batch_size=batch_size) - expected).abs().max() < 1e-5
    # Samples 4 and 1, 3 and 0 are one drive each, on the same noise: the prefix matters far more than that.
    assert (expected[0] - expected[3]).abs().max() > 1e-3
    assert (expected[1] - expected[2]).abs().max() > 1e-3


def test_filling_up_is_rounding_and_a_graph_sees_all_that_changes(data, expert, monkeypatch):
    """The graph is what was captured with the first batch, whatever comes later but through the fixed buffers."""
    captured, replayed = [], []

    class Fixed(ActionSampler):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self._fixed, self._capture = True, settings["capture"]

    def capture_work(work):
        captured.append(work.args)
        return SimpleNamespace(replay=lambda: (replayed.append(1), work()))

    monkeypatch.setattr("alpacache.inference.prediction.captured", capture_work)
    expected = one_by_one(expert, data)
    monkeypatch.setattr("alpacache.inference.prediction.ActionSampler", Fixed)
    plain = ahead(expert, data, capture=False)
    assert not captured
    assert (plain - expected).abs().max() < 1e-5
    assert torch.equal(ahead(expert, data, capture=True), plain)
    assert captured == [(2, data.longest)]
    assert len(replayed) == 3


def test_damage_in_a_row_is_named_before_its_batch_is_handed_over(data, expert, monkeypatch):
    def check(ring, data, chunks):
        if 3 in chunks:
            ring._rows.damage[3] = 1

    monkeypatch.setattr(ring_module, "has_kernels", lambda device: True)
    monkeypatch.setattr(BatchRing, "_check", check)
    batches = predict_ahead(expert, data, INDICES, batch_size=2, **SETTINGS | {"flow_steps": (10,)})
    assert next(batches).indices == (4, 0)
    with pytest.raises(UnreadableSampleError, match=f"sample {data.sample_id(1)!r} reached the GPU damaged"):
        next(batches)


def test_layers_are_kept_where_memory_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * 2**30)
    device = torch.device("cuda")
    assert staged_batch._is_free(4 * 2**30, device)  # 5 free, 1 idle, 2 to spare
    assert not staged_batch._is_free(4 * 2**30 + 1, device)


@gpu
@needs_gpu
def test_captured_equals_uncaptured_whether_layers_are_kept_or_decoded_each_step(tiny_checkpoint, data, monkeypatch):
    expert = load(tiny_checkpoint, dtype=torch.bfloat16, device="cuda")
    captured = ahead(expert, data)
    assert torch.equal(ahead(expert, data, capture=False), captured)
    monkeypatch.setattr(staged_batch, "_is_free", lambda size_bytes, device: False)
    assert torch.equal(ahead(expert, data), captured)
    assert torch.equal(ahead(expert, data, capture=False), captured)
    exact = load(tiny_checkpoint, dtype=torch.float32)
    assert (captured - one_by_one(exact, data)).abs().max() < 5e-3  # in bfloat16; ten steps move by up to 0.05


@gpu
@needs_gpu
def test_a_graph_is_replayed_for_every_batch(tiny_checkpoint, data, monkeypatch):
    computed = []
    plain = ActionSampler._compute
    monkeypatch.setattr(ActionSampler, "_compute", lambda *given: (computed.append(1), plain(*given)))
    ahead(load(tiny_checkpoint, dtype=torch.bfloat16, device="cuda"), data)
    assert len(computed) == capture._WARM_UPS + 1
