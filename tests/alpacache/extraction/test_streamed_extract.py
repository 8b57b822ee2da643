"""Stage one with weights that are not resident: the bytes of the resident way, and what interrupts it."""

import shutil
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alpacache
from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt_rows import PromptRows
from alpacache.alpamayo.streamed_vlm import StreamedVLM, load_streamed_vlm
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driving.sample import SampleRef
from alpacache.errors import CheckpointError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.planning import prefill_plan
from alpacache.sources.registry import open_source
from cache_store import CacheReader

pytestmark = pytest.mark.system  # whole extractions

HOMES = ("ram", "files")


def config(checkpoint, store, **changes):
    given = {"source": "synthetic:5", "model": str(checkpoint), "store": str(store), "frames": 1, "device": "cpu"}
    return ExtractConfig(**given | {"deterministic": True} | changes)


def contents(store):
    """Every stored array's bytes, by sample and name."""
    reader = CacheReader(store)
    found = {}
    for sample_id in reader.sample_ids:
        for name, value in reader.read(sample_id).items():
            array = np.asarray(value)
            found[sample_id, name] = (array.dtype.str, array.shape, array.tobytes())
    return found


def assert_same_bytes(tmp_path, checkpoint, homes=HOMES, **changes):
    expected = alpacache.extract(config(checkpoint, tmp_path / "gpu", **changes))
    assert expected.memory is None
    for home in homes:
        report = alpacache.extract(config(checkpoint, tmp_path / home, weights=home, **changes))
        assert report.memory.home == home
        assert report.extracted == expected.extracted > 0
        assert contents(tmp_path / home) == contents(tmp_path / "gpu")


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_same_bytes_in_every_codec(codec, tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(prefill_plan, "_MOST_GROUP", 2)  # three groups
    assert_same_bytes(tmp_path, tiny_checkpoint, codec=codec, homes=HOMES if codec == "int8" else ("ram",))


def test_same_bytes_for_views_without_hidden_states(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(prefill_plan, "_MOST_GROUP", 3)
    assert_same_bytes(tmp_path, tiny_checkpoint, homes=("files",), views=2, samples=2, hidden_states="none")


def test_same_bytes_for_routes_of_different_lengths_and_their_twins(tmp_path, tiny_checkpoint_15, monkeypatch):
    monkeypatch.setattr(prefill_plan, "_MOST_GROUP", 3)
    assert_same_bytes(
        tmp_path, tiny_checkpoint_15, homes=("ram",), codec="int8", route="source", cameras=("front_wide",)
    )
    reader = CacheReader(tmp_path / "ram")
    lengths = {int(reader.read(one)["prefix_len"]) for one in reader.sample_ids}
    assert len(lengths) > 1


def test_same_bytes_where_the_vision_tower_streams_too(tmp_path, tiny_checkpoint, monkeypatch):
    plan = prefill_plan.streamed_plan
    tower = {"tower_streams": True}
    monkeypatch.setattr(prefill_plan, "streamed_plan", lambda *how, **more: plan(*how, **more | tower))
    monkeypatch.setattr(prefill_plan, "_MOST_GROUP", 2)
    assert_same_bytes(tmp_path, tiny_checkpoint, homes=("ram",))


def test_rows_side_by_side_give_the_resident_batch(tmp_path, tiny_checkpoint):
    """Two samples at a time, all of one length: the same computation as in batches of two."""
    changes = {"deterministic": False, "batch_size": 2, "samples": 4}
    assert_same_bytes(tmp_path, tiny_checkpoint, homes=("ram",), **changes)


def test_what_ends_a_group_loses_nothing_that_is_committed(tmp_path, tiny_checkpoint, monkeypatch):
    expected, store = tmp_path / "whole", tmp_path / "store"
    alpacache.extract(config(tiny_checkpoint, expected))
    monkeypatch.setattr(prefill_plan, "_MOST_GROUP", 2)
    advance, calls = PromptRows.advance, []

    def broken(rows, number, layer):
        calls.append(number)
        if len(calls) == 11:  # of 4 layers and 2 rows: in the second layer of the second group
            raise KeyboardInterrupt
        return advance(rows, number, layer)

    with monkeypatch.context() as patch:
        patch.setattr(PromptRows, "advance", broken)
        with pytest.raises(KeyboardInterrupt):
            alpacache.extract(config(tiny_checkpoint, store, weights="ram"))
    assert len(CacheReader(store).sample_ids) == 2
    report = alpacache.extract(config(tiny_checkpoint, store, weights="files"))
    assert (report.already_there, report.extracted) == (2, 3)
    assert contents(store) == contents(expected)


@pytest.mark.parametrize("deterministic", [True, False])
def test_out_of_memory_halves_rows_then_groups(deterministic, tmp_path, tiny_checkpoint, monkeypatch):
    group, tried = StreamedVLM.group, []

    def small(vlm, batches, on_layer):
        rows = max(len(inputs) for inputs, _ in batches)
        samples = sum(len(inputs) for inputs, _ in batches)
        tried.append((samples, rows))
        if rows > 1 or samples > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return group(vlm, batches, on_layer)

    monkeypatch.setattr(StreamedVLM, "group", small)
    changes = {"deterministic": deterministic, "batch_size": None if deterministic else 4, "samples": 4}
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store", weights="ram", **changes))
    assert report.extracted == 4
    first = [(4, 1)] if deterministic else [(4, 4), (4, 2), (4, 1)]
    assert tried == [*first, (2, 1), (2, 1)]


def test_an_error_within_a_group_leaves_the_next_one_whole(tiny_checkpoint):
    """Layers come in a fixed order: those that a group did not take are passed over, with or without the tower's."""
    checkpoint = Checkpoint(str(tiny_checkpoint))
    builder, source = InputBuilder(checkpoint), open_source("synthetic:1")
    ref = SampleRef(clip_id=source.clip_ids[0], t0_us=5_100_000)
    inputs = [builder.build(source.load(ref, cameras=source.cameras, frames=1))]
    (expected,) = load_vlm(checkpoint, dtype=torch.bfloat16).prefill_batch(inputs)
    for tower_streams in (False, True):
        how = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "home": "ram", "tower_streams": tower_streams}
        with closing(load_streamed_vlm(checkpoint, **how)) as vlm:
            for failing in (0, 1, 3, None):
                cache = []

                def keep(which, rows, layer, kv, failing=failing, cache=cache):
                    if layer == failing:
                        raise torch.OutOfMemoryError
                    cache.append(kv)

                if failing is not None:
                    with pytest.raises(torch.OutOfMemoryError):
                        vlm.group([(inputs, ())], keep)
            (rows,) = vlm.group([(inputs, ())], keep)
            ((prefix, _),) = rows.features(cache, vlm.norm(rows.prompts.hidden))
            assert torch.equal(prefix.keys, expected.keys)
            assert torch.equal(prefix.hidden, expected.hidden)


def test_prefill_through_layers_that_come_equals_golden(golden, golden_dir, golden_cases, relative_error):
    checkpoint = Checkpoint(str(golden_dir))
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "home": "files", "tower_streams": False}
    with closing(load_streamed_vlm(checkpoint, **how)) as vlm:
        names = {"input_ids": "input_ids_fused", "pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"}
        clips = [{key: golden[f"clip{clip}.{name}"] for key, name in names.items()} for clip in range(3)]
        cache = [[], [], []]
        batches = [([SimpleNamespace(**one)], ()) for one in clips]
        group = vlm.group(batches, lambda which, _, layer, kv: cache[which].append(kv))
        for clip, rows in enumerate(group):
            ((prefix, _),) = rows.features(cache[clip], vlm.norm(rows.prompts.hidden))
            assert prefix.rope_delta == golden_cases["cases"][clip]["rope_delta"]
            for name in ("keys", "values", "hidden"):
                assert relative_error(getattr(prefix, name), golden[f"clip{clip}.{name}"]) <= 1e-4


@pytest.mark.parametrize("home", HOMES)
def test_weights_in_another_type_are_rounded_as_they_come(home, tmp_path):
    checkpoint = make_tiny_checkpoint(tmp_path / "Tiny-F32", dtype="float32")
    assert_same_bytes(tmp_path, checkpoint, homes=(home,), samples=1)


@pytest.mark.parametrize("home", HOMES)
def test_weights_that_are_not_finite_are_named_and_nothing_is_committed(home, tmp_path, tiny_checkpoint):
    broken = tmp_path / "Tiny-R1"
    shutil.copytree(tiny_checkpoint, broken)
    name = "vlm.model.language_model.layers.2.mlp.up_proj.weight"
    for file in broken.glob("*.safetensors"):
        state = load_file(file)
        if name in state:
            state[name][3, 5] = float("nan")
            save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"not finite.*{name}"):
        alpacache.extract(config(broken, tmp_path / "store", weights=home))
    assert not list(CacheReader(tmp_path / "store").sample_ids)


def test_rollouts_name_the_memory_they_need(tmp_path, tiny_checkpoint):
    asked = config(tiny_checkpoint, tmp_path / "store", weights="ram", reasoning="rollout", rollouts=2)
    message = r"rollouts need the VLM's weights on the GPU, 0\.\d GiB .* --weights ram they stay in RAM: leave it out"
    with pytest.raises(UsageError, match=message):
        alpacache.extract(asked)
    assert not (tmp_path / "store").exists()
