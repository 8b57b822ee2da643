"""Every command with a checkpoint of Alpamayo 2 Super, tiny but in the released layout."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.checkpoint import INDEX
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.checks.machine import check_model
from alpacache.driving.sample import SampleRef
from alpacache.sources.registry import open_source
from cache_store import CacheReader


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("super") / "Tiny-2", family="2")


@pytest.fixture
def told(run_here):
    """A command in this process: its JSON."""
    return lambda *arguments: json.loads(run_here(*arguments, "--json").stdout)


@pytest.mark.system
@pytest.mark.ci
def test_every_command(model, tmp_path, told, run_here):
    of_model, on_cpu = ("--model", model), ("--device", "cpu")
    (model / "LICENSE").write_text("OpenMDW License Agreement, version 1.1\n")

    assert told("check", "synthetic:2", "--frames", 1)["ok"]
    assert f"{model.name} (2) from {model}; " in check_model(str(model)).found
    told("prepare", "synthetic:12", "--out", tmp_path / "samples", "--frames", 1, "--size", "processor", *of_model)

    plan = told("plan", *of_model, "--samples", 12, "--frames", 1, "--picture", "128x256")
    direct = told("extract", tmp_path / "samples", *of_model, "--store", tmp_path / "direct", "--frames", 1, *on_cpu)
    assert direct["extracted"] == 12
    stored = CacheReader(tmp_path / "direct")
    first = stored.read(stored.sample_ids[0])
    assert first["kv"].shape == (4, 2, 2, plan["tokens"], 32)
    assert np.count_nonzero(first["input_ids"] >= 0) == plan["tokens"]

    options = ("--frames", 1, "--route", "Turn left in 30m", "--reasoning", "rollout", "--rollouts", 2, "--samples", 4)
    store = tmp_path / "rollouts"
    told("extract", "synthetic:4", *of_model, "--store", store, "--codec", "int8", *options, *on_cpu)
    asked = CacheReader(store).read(CacheReader(store).sample_ids[0])
    assert "<|traj_history_end|>Turn left in 30moutput the future trajectory.<|im_end|>" in str(asked["prompt"])
    streamed = ("--weights", "ram", "--deterministic")
    told("extract", "synthetic:2", *of_model, "--store", tmp_path / "streamed", "--frames", 1, *streamed, *on_cpu)
    told("extract", "synthetic:2", *of_model, "--store", tmp_path / "held", "--frames", 1, "--deterministic", *on_cpu)
    held, there = CacheReader(tmp_path / "held"), CacheReader(tmp_path / "streamed")
    for sample in held.sample_ids:
        assert np.array_equal(held.read(sample)["kv"], there.read(sample)["kv"])

    assert told("info", store)["samples"] == 4
    assert not told("verify", store, "--deep")["damaged"]
    assert told("copy", store, tmp_path / "copy")["copied"] == 4
    told("probe", "--store", tmp_path / "direct", "--out", tmp_path / "probe")

    for trainable in ("all", "head", "lora"):
        run = ("--store", store, "--out", tmp_path / trainable, "--steps", 2, "--batch-size", 2)
        told("train", *run, "--trainable", trainable, "--prefix", "mix", *of_model, *on_cpu)
    judged = ("--checkpoint", tmp_path / "all", "--out", tmp_path / "eval", "--samples", 2, "--paths", 2)
    summary = told("eval", "--store", store, *of_model, *judged, *on_cpu)["summary"]
    assert summary["models"] == ["base", "trained"]

    for trainable in ("all", "head", "lora"):
        out = tmp_path / f"export-{trainable}"
        checked = told("export", *of_model, "--checkpoint", tmp_path / trainable, "--out", out, "--check")["check"]
        assert (checked["faults"], checked["family"]) == ([], "2")
        assert_only_the_trained_differ(model, out, trainable)
    card = (tmp_path / "export-all/README.md").read_text()
    assert "OpenMDW License Agreement, version 1.1" in card or "LICENSE" in card
    again = ("--store", tmp_path / "direct", "--frames", 1)
    report = told("extract", tmp_path / "samples", "--model", tmp_path / "export-all", *again, *on_cpu)
    assert (report["extracted"], report["already_there"]) == (0, 12)


def assert_only_the_trained_differ(base, export, trainable):
    """The base's names in the base's shards, buffers not added, and all that was not trained byte for byte."""
    home = json.loads((base / INDEX).read_text())["weight_map"]
    assert json.loads((export / INDEX).read_text())["weight_map"] == home
    assert (base / "config.json").read_bytes() == (export / "config.json").read_bytes()
    head = ("expert.action_", "expert.expert.norm.")
    for shard in set(home.values()):
        before, after = load_file(base / shard), load_file(export / shard)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            may_change = name.startswith("expert.") and (trainable != "head" or name.startswith(head))
            assert may_change or tensor.equal(after[name]), name
        changed = [name for name in before if not before[name].equal(after[name])]
        assert bool(changed) == any(name.startswith("expert.") for name in before)


@pytest.mark.system
@pytest.mark.ci
def test_cached_equals_live_and_a_resumed_run_ends_with_the_same_bits(model, tmp_path, told):
    store, on_cpu = tmp_path / "store", ("--device", "cpu")
    told("extract", "synthetic:4", "--model", model, "--store", store, "--frames", 1, *on_cpu)
    data, source = CachedDataset([store], Checkpoint(str(model))), open_source("synthetic:4")
    builder, vlm = InputBuilder(Checkpoint(str(model))), load_vlm(str(model), dtype=torch.bfloat16)
    for index, clip in enumerate(source.clip_ids):
        sample = source.load(SampleRef(clip_id=clip, t0_us=5_100_000), cameras=source.cameras, frames=1)
        inputs, cached = builder.build(sample), data.load(index)
        live = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
        assert cached.sample_id == sample.ref.sample_id
        assert cached.prefix.start_position == live.start_position
        assert torch.equal(cached.prefix.keys, live.keys)
        assert torch.equal(cached.prefix.values, live.values)

    run = ("train", "--store", store, "--model", model, "--batch-size", 2, "--save-every", 2, *on_cpu)
    told(*run, "--out", tmp_path / "whole", "--steps", 4)
    told(*run, "--out", tmp_path / "parts", "--steps", 4)
    (tmp_path / "parts/last").unlink()
    (tmp_path / "parts/checkpoints/step-0000004").rename(tmp_path / "gone")
    assert (tmp_path / "parts/checkpoints/step-0000002").is_dir()
    told(*run, "--out", tmp_path / "parts", "--steps", 4, "--resume")
    for name in ("model", "optimizer"):
        first, second = (load_file(tmp_path / out / f"last/{name}.safetensors") for out in ("whole", "parts"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
