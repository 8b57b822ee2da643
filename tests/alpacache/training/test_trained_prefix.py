"""Runs on the tails of reasoning rollouts: exact over a resume, and each keeps to its choice and says so."""

import json

import pytest
import torch
from safetensors.torch import load_file

import alpacache
from alpacache import randomness
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.prefix_choice import PrefixChoice
from alpacache.config import read_toml
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.inference.prediction import flow_loss
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory
from alpacache.training.validation import Validation

pytestmark = pytest.mark.system  # whole runs of a tiny model


@pytest.fixture(scope="module")
def train(rollout_stores, tiny_checkpoint):
    def train(out, codec="int8", **changes):
        store = str(rollout_stores[codec])
        values = {"stores": (store,), "model": str(tiny_checkpoint), "out": str(out), "steps": 6, "batch_size": 2}
        values |= {"lr": 1e-3, "warmup": 2, "device": "cpu", "track": "none", "prefix": "mix"}
        return alpacache.train(TrainConfig(**values | changes))

    return train


def weights(out):
    return load_file(RunDirectory(out).path / "last" / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ci
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_run_cut_short_ends_with_the_same_bits_from_disk_or_memory(train, tmp_path, codec):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, codec, save_every=1, keep=9)
    (parts / "checkpoints").mkdir(parents=True)
    (parts / "checkpoints/step-0000003").symlink_to(whole / "checkpoints/step-0000003")
    (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    train(parts, codec, resume=True, prefix=None, in_memory=True)
    assert same(weights(whole), weights(parts))
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(parts)]
    for prefix in ("direct", "rollouts"):
        train(tmp_path / prefix, codec, prefix=prefix)
        assert not same(weights(whole), weights(tmp_path / prefix))


def test_a_run_records_its_prefix_keeps_it_and_refuses_another(train, rollout_stores, tmp_path):
    out, val = tmp_path / "run", str(rollout_stores["bf16"])
    train(out, "bf16", steps=2, warmup=0, prefix="rollouts", val=val, val_every=1, on_overlap="allow")
    assert read_toml(out / "config.toml", TrainConfig)["prefix"] == "rollouts"
    assert json.loads((out / "last/state.json").read_text())["settings"]["prefix"] == "rollouts"
    assert [row["val_prefix"] for row in rows(out)] == ["rollouts", "rollouts"]
    with pytest.raises(UsageError, match="prefix: the run has 'rollouts', now 'direct'"):
        train(out, "bf16", steps=2, warmup=0, prefix="direct", resume=True)
    assert train(out, "bf16", steps=2, warmup=0, prefix=None, resume=True).steps == 2
    train(tmp_path / "default", "bf16", steps=1, warmup=0, prefix=None)
    assert read_toml(tmp_path / "default" / "config.toml", TrainConfig)["prefix"] == "direct"


def test_stores_without_rollouts_are_refused_before_anything_is_written(train, tiny_checkpoint, tmp_path):
    store, out = str(tmp_path / "store"), tmp_path / "run"
    alpacache.extract(
        ExtractConfig(source="synthetic:2", model=str(tiny_checkpoint), store=store, frames=1, device="cpu")
    )
    for changes in ({"stores": (store,)}, {"val": store}):
        with pytest.raises(UsageError, match=r"store has no reasoning rollouts, .*`alpacache extract --reasoning roll"):
            train(out, "bf16", **changes)
        assert not (out / "checkpoints").exists()
        assert not (out / "config.toml").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("codec", "prefix"), [("bf16", "mix"), ("int8", "mix"), ("int8", "rollouts")])
def test_tails_on_a_gpu_give_the_losses_of_the_cpu(train, tmp_path, codec, prefix):
    for device in ("cpu", "cuda"):
        train(tmp_path / device, codec, prefix=prefix, device=device, compile=False, lr=1e-8)
    first, second = ([row["loss"] for row in rows(tmp_path / device)] for device in ("cpu", "cuda"))
    assert second == pytest.approx(first, rel=1e-2)  # bfloat16 there


@pytest.mark.parametrize(("codec", "prefix"), [("bf16", "mix"), ("int8", "rollouts")])
@torch.no_grad()
def test_validation_is_on_one_choice_a_sample_that_never_changes(rollout_stores, tiny_checkpoint, codec, prefix):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    expert = load_expert(checkpoint, dtype=torch.float32)
    data = CachedDataset([rollout_stores[codec]], checkpoint, choice=PrefixChoice(prefix=prefix, seed="val"))
    validation = Validation(data, 64, times="beta", causal=False, with_min_ade=False)
    world = World(rank=0, size=1, device=expert.device)
    found = [validation.run(expert, world)["val_loss"] for _ in range(2)]
    expert.eval()
    losses = []
    for index in range(len(data)):
        sample, poses = data.load(index, tails=3), data.poses(index)
        tail = data.choice.tail(sample.sample_id, 0, rollouts=3)
        one = sample.prefix if tail is None else sample.rollout_prefixes()[tail]
        action = expert.action_space.to_action(*poses)[None, None]
        noise = randomness.noise("val", sample.sample_id, draws=4)[None]
        t = randomness.times("val", sample.sample_id, draws=4, schedule="beta")[None]
        losses.append(float(flow_loss(expert, action, noise, t, [one], causal=False)))
    assert found[0] == found[1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
