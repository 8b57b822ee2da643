"""Runs with and without routes: exact over a resume, and each keeps to its share."""

import json

import pytest
import torch
from safetensors.torch import load_file

import alpacache
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory

pytestmark = pytest.mark.system  # whole runs of a tiny model


@pytest.fixture(scope="module")
def train(tiny_checkpoint_15, tmp_path_factory):
    model, home = str(tiny_checkpoint_15), tmp_path_factory.mktemp("stores")
    for name, route in (("routed", "source"), ("plain", "none")):
        alpacache.extract(
            ExtractConfig(
                source="synthetic:4:fork",
                model=model,
                store=str(home / name),
                frames=1,
                hidden_states="none",
                route=route,
                device="cpu",
            )
        )

    def train(out, store="routed", **changes):
        values = {"stores": (str(home / store),), "model": model, "out": str(out), "steps": 4, "batch_size": 2}
        values |= {"lr": 1e-3, "warmup": 1, "device": "cpu", "track": "none"}
        return alpacache.train(TrainConfig(**values | changes))

    return train


def weights(out):
    return load_file(RunDirectory(out).path / "last" / "model.safetensors")


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_cut_short_ends_with_the_same_bits_and_keeps_its_share(train, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, route_dropout=0.5, save_every=1, keep=9)
    (parts / "checkpoints").mkdir(parents=True)
    (parts / "checkpoints/step-0000002").symlink_to(whole / "checkpoints/step-0000002")
    (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    train(parts, resume=True, in_memory=True)
    assert same(weights(whole), weights(parts))
    assert losses(whole) == losses(parts)
    with pytest.raises(UsageError, match=r"route_dropout: the run has 0\.5, now 0\.25"):
        train(parts, resume=True, route_dropout=0.25)
    assert json.loads((whole / "last/state.json").read_text())["settings"]["route_dropout"] == 0.5


def test_all_dropped_is_training_on_the_prompt_without_routes_and_none_dropped_on_the_routed(train, tmp_path):
    for name, store, share in (("all", "routed", 1.0), ("none", "routed", None), ("plain", "plain", None)):
        train(tmp_path / name, store, route_dropout=share, steps=2)
    dropped, routed, plain = (losses(tmp_path / name) for name in ("all", "none", "plain"))
    assert dropped == pytest.approx(plain, rel=1e-3)  # tails and whole prompts differ by bfloat16's rounding
    assert routed != pytest.approx(plain, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropped_routes_on_a_gpu_give_the_losses_of_the_cpu(train, tmp_path):
    for device in ("cpu", "cuda"):
        train(tmp_path / device, route_dropout=0.5, device=device, compile=False, lr=1e-8)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)  # bfloat16 there


def test_a_store_without_routes_is_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(UsageError, match="has a route that could be dropped"):
        train(tmp_path / "run", "plain", route_dropout=0.1)
    assert not (tmp_path / "run").exists()
