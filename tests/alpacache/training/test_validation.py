"""Validation reads through a ring and finds what samples loaded one by one have; it keeps none of them."""

import math
from types import SimpleNamespace

import pytest
import torch

import alpacache
from alpacache import randomness
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.other_clips import other_clips
from alpacache.distributed.world import World
from alpacache.driving.strata import classify
from alpacache.extraction.config import ExtractConfig
from alpacache.gpu.host_memory import Slabs, page_rounded
from alpacache.inference.prediction import flow_loss, predict_actions, to_paths, validation_draws
from alpacache.metrics.paths import min_ade
from alpacache.training.config import TrainConfig
from alpacache.training.validation import Validation

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("validation") / "store")
    model = str(tiny_checkpoint)
    alpacache.extract(ExtractConfig(source="synthetic:5", model=model, store=path, device="cpu", codec="int8"))
    return path


@pytest.fixture(scope="module")
def expert(tiny_checkpoint):
    return load_expert(str(tiny_checkpoint), dtype=torch.float32)


@torch.no_grad()
def expected(expert, data):
    """The same numbers from samples that are loaded and packed two at a time."""
    values = {}
    for start in range(0, len(data), 2):
        indices = range(start, min(start + 2, len(data)))
        samples, drives = [data.load(index) for index in indices], [data.poses(index) for index in indices]
        ids = [sample.sample_id for sample in samples]
        action = torch.stack([expert.action_space.to_action(*poses) for poses in drives])[:, None]
        noise = torch.stack([randomness.noise("val", name, draws=4) for name in ids])
        t = torch.stack([randomness.times("val", name, draws=4, schedule="beta") for name in ids])
        losses = flow_loss(expert, action, noise, t, [sample.prefix for sample in samples], causal=False).tolist()
        draws = predict_actions(expert, samples, paths=6, flow_steps=10, seed=0)
        for poses, loss, actions in zip(drives, losses, draws, strict=True):
            xyz, _ = to_paths(expert.action_space, actions, *poses[:2])
            values.setdefault("val_loss", []).append(loss)
            values.setdefault(f"val_loss/{classify(*poses).turn}", []).append(loss)
            values.setdefault("val_min_ade", []).append(min_ade(xyz, poses[2])["min_ade"])
    return {name: sum(each) / len(each) for name, each in values.items()}


@pytest.mark.parametrize("best_by", ["loss", "min_ade"])
def test_numbers_are_those_of_samples_loaded_one_by_one(tiny_checkpoint, store, expert, best_by):
    data = CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
    validation = Validation(data, 64, times="beta", causal=False, with_min_ade=best_by == "min_ade")
    got = validation.run(expert, World(rank=0, size=1, device=expert.device))
    want = expected(expert.eval(), data)
    assert got == {name: value for name, value in want.items() if name != "val_min_ade" or best_by == "min_ade"}
    assert expert.train().training


@torch.no_grad()
def test_the_shuffled_loss_is_that_of_another_clips_prefix_with_a_samples_own_target(tiny_checkpoint, store, expert):
    data = CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
    validation = Validation(data, 64, times="beta", causal=False, with_min_ade=True, shuffled=True)
    got = validation.run(expert, World(rank=0, size=1, device=expert.device))
    shuffled, losses = got.pop("val_loss/shuffled"), []
    assert got == expected(expert.eval(), data)
    for index, other in enumerate(other_clips(data.ids, seed=0)):
        assert other != index
        action = expert.action_space.to_action(*data.poses(index))[None, None]
        noise, t = validation_draws([data.sample_id(index)])
        losses.append(flow_loss(expert, action, noise, t, [data.load(other).prefix], causal=False).item())
    assert shuffled == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert shuffled != pytest.approx(got["val_loss"], rel=1e-5)


def test_processes_share_the_samples(tiny_checkpoint, store, expert):
    """One of them may have none."""
    data = CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
    validation = Validation(data, 2, times="beta", causal=False, with_min_ade=False)
    parts = []

    def all_gather(part):
        if isinstance(part, bool):  # whether it is to end
            return [part]
        parts.append(part)
        return parts

    def world(rank):
        return SimpleNamespace(rank=rank, size=3, all_gather=all_gather)

    for rank in range(3):
        shared = validation.run(expert, world(rank))
    assert [len(part.get("val_loss", ())) for part in parts] == [1, 1, 0]
    alone = validation.run(expert, World(rank=0, size=1, device=expert.device))
    assert shared["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)  # batches of one


def test_a_path_that_is_not_finite_has_no_min_ade(tiny_checkpoint, store):
    """The loss of diverged weights may still be finite: `--best-by min_ade` then has no new best, and no error."""
    diverged = load_expert(str(tiny_checkpoint), dtype=torch.float32)
    with torch.no_grad():
        diverged.action_out_proj.weight.fill_(1e38)
    data = CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
    validation = Validation(data, 2, times="beta", causal=False, with_min_ade=True)
    assert math.isnan(validation.run(diverged, World(rank=0, size=1, device=diverged.device))["val_min_ade"])


def test_all_processes_end_where_one_is_to_stop(tiny_checkpoint, store, expert):
    data = CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
    validation = Validation(data, 2, times="beta", causal=False, with_min_ade=False)
    world = SimpleNamespace(rank=0, size=2, all_gather=lambda stop: [stop, True])
    assert validation.run(expert, world) is None
    assert expert.training


def test_memory_keeps_training_samples_alone(tiny_checkpoint, store, tmp_path, monkeypatch):
    """The check of RAM counts those and no others."""
    kept, place = [], Slabs.place
    monkeypatch.setattr(Slabs, "place", lambda slabs, size: (kept.append(page_rounded(size)), place(slabs, size))[1])
    settings = {
        "steps": 4,
        "batch_size": 5,
        "val_every": 1,
        "in_memory": True,
        "on_overlap": "allow",
        "trainable": "head",
        "track": "none",
    }
    model = str(tiny_checkpoint)
    config = TrainConfig(stores=(store,), model=model, out=str(tmp_path / "run"), val=store, device="cpu", **settings)
    alpacache.train(config)
    assert sum(kept) == sum(map(page_rounded, CachedDataset([store], Checkpoint(model)).kv_bytes.tolist()))
