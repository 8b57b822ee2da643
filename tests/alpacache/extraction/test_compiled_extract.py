"""When stage one compiles the VLM's layers, and what a store then says."""

from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import alpacache
from alpacache.alpamayo.vlm import FrozenVLM
from alpacache.cached_samples.identity import store_codec
from alpacache.extraction import task
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.memory import PrefillSettings
from alpacache.planning.time_model import RELEASED_VLM, worth_compiling
from cache_store import CacheReader

pytestmark = pytest.mark.system  # whole extractions


def config(checkpoint, store, **changes):
    return ExtractConfig(
        **{"source": "synthetic:4", "model": str(checkpoint), "store": str(store), "frames": 2, "device": "cpu"}
        | changes
    )


def prefill_settings(**changes):
    usual = {"workers": 2, "writers": 2, "batch_size": None, "deterministic": False, "compile": None}
    return PrefillSettings(**usual | {"home": None, "budget_bytes": None} | changes)


def kv(reader, sample_id):
    return torch.from_numpy(np.asarray(reader.read(sample_id)["kv"]).copy()).view(torch.bfloat16).float()


def test_a_minute_of_prefill_is_worth_it():
    """About 47.5 us a token: 6,700 images, so 1,700 samples of one camera or 420 of four."""
    for cameras, few, enough in ((1, 1_600, 1_700), (4, 400, 425)):
        assert not worth_compiling(int(RELEASED_VLM), images=few * cameras * 4)
        assert worth_compiling(int(RELEASED_VLM), images=enough * cameras * 4)
    assert worth_compiling(int(4 * RELEASED_VLM), images=425 * 4)


@pytest.mark.parametrize(
    ("device", "samples", "changes", "compiled"),
    [
        ("cuda", 10_000, {}, True),
        ("cuda", 100, {}, False),
        ("cuda", 100, {"compile": True}, True),
        ("cuda", 10_000, {"compile": False}, False),
        ("cuda", 10_000, {"deterministic": True}, False),
        ("cuda", 0, {"compile": True}, False),
        ("cpu", 10_000, {"compile": True}, False),
    ],
)
def test_it_is_compiled_on_a_gpu_where_it_pays_or_as_asked(device, samples, changes, compiled, monkeypatch):
    monkeypatch.setattr(task, "has_kernels", lambda device: True)
    monkeypatch.setattr(task, "geometry_of", lambda _: SimpleNamespace(vlm_parameters=RELEASED_VLM))
    assert task._compiles(prefill_settings(**changes), torch.device(device), None, images=4 * samples) == compiled


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"home": "gpu", "budget_bytes": 2**30, "compile": True}, ["--weights gpu, --memory-budget, --compile"]),
        ({"home": "ram", "budget_bytes": 2**30}, []),
        ({"budget_bytes": 2**30}, ["--memory-budget"]),
        ({"compile": False}, []),
    ],
)
def test_options_for_a_gpu_are_named_where_there_is_none(changes, names):
    asked = prefill_settings(**changes)
    notes = [f"without a GPU there is no use for {some}." for some in names]
    assert list(task._without_gpu(asked, torch.device("cpu"))) == notes
    assert list(task._without_gpu(asked, torch.device("cuda"))) == []


def test_without_triton_nothing_is_compiled_unasked(monkeypatch):
    monkeypatch.setattr(task, "has_kernels", lambda device: False)
    assert not task._compiles(prefill_settings(), torch.device("cuda"), None, images=40_000)


def test_a_compiled_run_stores_the_same_to_rounding_and_says_so(tiny_checkpoint, tmp_path, monkeypatch, relative_error):
    for name in ("plain", "compiled"):
        notes = []
        asked = config(tiny_checkpoint, tmp_path / name, batch_size=2, vlm_dtype="fp32", hidden_states="last")
        report = alpacache.extract(asked, on_note=notes.append)
        assert report.extracted == 4
        assert any("--no-compile" in note for note in notes) == (name == "compiled")
        monkeypatch.setattr(task, "_compiles", lambda *_, **__: True)
        monkeypatch.setattr(FrozenVLM, "compile", partialmethod(FrozenVLM.compile, backend="eager"))
    plain, compiled = (CacheReader(tmp_path / name) for name in ("plain", "compiled"))
    assert store_codec(plain.identity, store="plain") is None
    assert (plain.provenance.get("compiled"), compiled.provenance["compiled"]) == (None, True)
    assert plain.identity == compiled.identity
    for sample_id in plain.sample_ids:
        one, other = (kv(reader, sample_id) for reader in (plain, compiled))
        assert relative_error(other, one) < 1e-3


def test_streamed_layers_share_the_compiled_code(tiny_checkpoint, tmp_path, monkeypatch, relative_error):
    torch._dynamo.reset()
    counters.clear()
    for name, weights in (("plain", "gpu"), ("compiled", "ram")):
        asked = config(tiny_checkpoint, tmp_path / name, batch_size=2, vlm_dtype="fp32", weights=weights)
        assert alpacache.extract(asked).extracted == 4
        monkeypatch.setattr(task, "_compiles", lambda *_, **__: True)
        monkeypatch.setattr(FrozenVLM, "compile", partialmethod(FrozenVLM.compile, backend="eager"))
    assert counters["stats"]["unique_graphs"] == 2
    plain, compiled = (CacheReader(tmp_path / name) for name in ("plain", "compiled"))
    for sample_id in plain.sample_ids:
        one, other = (kv(reader, sample_id) for reader in (plain, compiled))
        assert relative_error(other, one) < 1e-3
