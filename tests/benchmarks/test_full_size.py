"""What the end-to-end benchmark runs on is what `train` expects, and its figures are those of the run."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLTextModel

from alpacache.alpamayo import Checkpoint, load_expert, load_vlm
from alpacache.alpamayo.backbone import expert_config, geometry_of, vlm_config
from alpacache.cached_samples.dataset import CachedDataset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_train_e2e  # noqa: E402
import full_size  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return full_size.write_checkpoint(tmp_path_factory.mktemp("full_size") / "model", small=True)


@pytest.fixture(scope="module", params=["bf16", "int8"])
def dataset(request, checkpoint):
    path = checkpoint.parent / request.param
    sizes = {"samples": 12, "shortest": 72, "longest": 80}
    full_size.write_store(path, checkpoint, cameras=4, codec=request.param, **sizes)
    again = full_size.write_store(path, checkpoint, cameras=4, codec=request.param, **sizes)
    assert len(again) == 12
    return CachedDataset([path], Checkpoint(str(checkpoint)))


@pytest.mark.system
def test_full_geometry_is_the_released_one(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "_expert_state", lambda small, family: {"x": torch.zeros(1)})
    config = Checkpoint(str(full_size.write_checkpoint(tmp_path / "model", small=False)))
    with torch.device("meta"):
        expert = Qwen3VLTextModel(expert_config(config))
    embeddings = expert.embed_tokens.weight.numel()
    assert sum(p.numel() for p in expert.parameters()) - embeddings == pytest.approx(2.279e9, rel=1e-3)
    assert full_size.InputBuilder(config).tokenizer.id_of("<i0>") == 151_669
    assert (config.config.vocab_size, config.config.traj_token_ids["future_start"]) == (155_697, 155_681)
    assert vlm_config(config).image_token_id == 151_655


@pytest.mark.system
def test_checkpoint_loads_with_usable_weights(checkpoint):
    expert = load_expert(str(checkpoint))
    assert expert.dtype == torch.bfloat16
    for name, parameter in expert.named_parameters():
        wanted = 0.02 if parameter.ndim > 1 else 0.0
        assert float(parameter.detach().float().std()) == pytest.approx(wanted, rel=0.1), name
    assert expert.action_space.curvature_std == pytest.approx(0.02615, rel=1e-2)


@pytest.mark.system
def test_samples_are_distinct_finite_and_of_the_asked_lengths(dataset):
    firsts = set()
    for index in range(len(dataset)):
        prefix = dataset.load(index).prefix
        prefix = prefix if hasattr(prefix, "keys") else prefix.decode()
        assert 72 <= prefix.prefix_len <= 80
        assert prefix.keys.shape == prefix.values.shape == (4, 8, prefix.prefix_len, 128)
        assert 0 < prefix.start_position < prefix.prefix_len
        for part in (prefix.keys, prefix.values):
            assert float(part.float().std()) == pytest.approx(1.0, rel=0.05)
        firsts.add((prefix.prefix_len, *prefix.keys[:, 0, 0, 0].tolist()))
    assert len(firsts) == 12


def test_drives_are_arcs_of_different_curvature(dataset, checkpoint):
    space = load_expert(str(checkpoint)).action_space
    curvatures = []
    for index in range(len(dataset)):
        action = space.to_action(*dataset.poses(index))
        accel = action[:, 0] * space.accel_std + space.accel_mean
        curvature = action[:, 1] * space.curvature_std + space.curvature_mean
        assert float(accel.abs().max()) < 0.02
        assert float(curvature.std()) < 1e-4
        curvatures.append(float(curvature.mean()))
    assert max(map(abs, curvatures)) < 0.0101
    assert min(b - a for a, b in pairwise(sorted(curvatures))) > 1e-6


def test_step_times_of_single_steps_and_of_means():
    single = [{"step": n, "step_ms": 10.0 * n, "data_wait": 0.1 * n} for n in (1, 2, 3)]
    assert bench_train_e2e.step_times(single, batch=4) == [(1, 10.0, 0.1), (2, 20.0, 0.2)]
    assert bench_train_e2e.step_times([*single[:2], {"step": 3, "loss": 1.0}], batch=4) == [
        (1, 10.0, 0.1),
        (2, 20.0, 0.2),
    ]
    ends, waited = np.array([0.5, 0.6, 0.8, 1.0]), np.array([0.4, 0.4, 0.5, 0.5])
    means = [
        {"step": n + 1, "samples_per_s": 4 * (n + 1) / ends[n], "data_wait": waited[n] / ends[n]} for n in range(4)
    ]
    found = np.array(bench_train_e2e.step_times(means, batch=4))
    np.testing.assert_allclose(found, [[1, 500, 0.8], [2, 100, 0.0], [3, 200, 0.5]], atol=1e-9)


def test_ratios_are_to_the_fastest_of_the_same_cameras():
    recipe = [
        {"cameras": cameras, "batch": batch, "samples_s": rate}
        for cameras, batch, rate in ((4, 1, 2.0), (4, 1, 2.5), (4, 4, 5.0), (1, 1, 100.0))
    ]
    row = bench_train_e2e.over_recipe({"cameras": 4, "samples_s": 50.0}, recipe)
    assert (row["over_recipe_b1"], row["over_recipe_best"]) == (20.0, 10.0)
    assert bench_train_e2e.over_recipe({"cameras": 4, "note": "failed"}, recipe) == {"cameras": 4, "note": "failed"}


def test_stores_fit_their_bytes_and_batches():
    for case in bench_train_e2e.full_cases():
        samples = bench_train_e2e.FULL.samples(case)
        assert samples % case.batch == 0
        assert samples // case.batch >= 6
    sizes = {case.store: bench_train_e2e.FULL.samples(case) for case in bench_train_e2e.full_cases()}
    assert sizes == {"c4-int8": 88, "c4-bf16": 48, "c1-int8": 304, "c1-bf16": 176} | {
        "c1-int4": 576,
        "c4-int4": 168,
        "c1-transform:2.2": 1184,
        "c4-transform:2.2": 336,
        "f2-c1-int8": 176,
        "f2-c1-int4": 336,
        "f2-c6-int8": 32,
        "f2-c6-int4": 64,
    }


@pytest.mark.slow
def test_the_quick_benchmark(quick):
    rows = quick("bench_train_e2e.py")
    assert [row["medium"] for row in rows].count("recipe") == 6
    for row in rows[6:]:
        assert row["samples_s"] > 0, row
        assert row["over_recipe_best"] > 1
        assert 0 <= row["data_wait"] < 1
    assert all((row["of_raw_read"] is None) == (row["medium"] in ("pinned", "recipe")) for row in rows)


@pytest.mark.system
@pytest.mark.ci
def test_the_quick_step_benchmark(quick, tmp_path):
    rows = {row["name"]: row for row in quick("bench_train_step.py", cwd=tmp_path)}
    assert list(rows) == ["stock", "c1", "c1-two-micro", "c1-streamed", "c1-twice"]
    assert [rows[name]["streamed_layers"] for name in ("c1-streamed", "c1-twice")] == [2, 2]
    assert rows["c1-twice"]["backwards"] == 2
    assert all(row["step_ms"] > 0 and np.isfinite(row["loss"]) for row in rows.values())


@pytest.mark.system
def test_full_geometry_of_2_is_the_released_one(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "_expert_state", lambda small, family: {"x": torch.zeros(1)})
    config = Checkpoint(str(full_size.write_checkpoint(tmp_path / "model", small=False, family="2")))
    with torch.device("meta"):
        expert = Qwen3VLTextModel(expert_config(config))
    embeddings = expert.embed_tokens.weight.numel()
    assert sum(p.numel() for p in expert.parameters()) - embeddings == pytest.approx(2.416e9, rel=1e-3)
    assert (config.config.vocab_size, config.config.history.first_id) == (155_776, 151_669)
    assert config.config.traj_token_ids["future_start"] == 155_681
    assert vlm_config(config).text_config.num_hidden_layers == 64


def test_a_vlm_that_is_mostly_holes_has_every_tensor(tmp_path):
    directory = full_size.write_vlm(tmp_path / "model", small=True, family="2", layers=1)
    checkpoint = Checkpoint(str(directory))
    assert geometry_of(checkpoint).layers == 4
    names = [f"language_model.layers.{number}." for number in range(4)]
    assert full_size.held_layers(["visual.", *names], 2) == ["visual.", *names[:2], *names[:2]]
    vlm = load_vlm(checkpoint)
    layers = vlm.model.language_model.layers
    assert float(layers[0].mlp.up_proj.weight.float().std()) == pytest.approx(0.02, rel=0.1)
    assert not layers[1].mlp.up_proj.weight.any()
    hole = directory / "model-layer-03.safetensors"
    assert hole.stat().st_blocks * 512 < hole.stat().st_size


def test_an_expert_of_2_loads(tmp_path):
    directory = full_size.write_checkpoint(tmp_path / "model", small=True, family="2")
    expert = load_expert(str(directory))
    assert not expert.rounds_target
    assert expert.expert.config.hidden_size == 256
