"""Controls and numbers of flow steps: the same noise, another clip's prefix or none, and each prefix read once."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import alpacache
from alpacache import flow_matching, randomness
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples import ring_source
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.inference.prediction import eval_noise, predict_actions, to_paths
from alpacache.metrics.paths import min_ade
from alpacache.prefix.packed import NoPrefix

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("controls") / "store"
    common = {"model": str(tiny_checkpoint), "device": "cpu", "frames": 1, "codec": "int8"}
    alpacache.extract(ExtractConfig(source="synthetic:3", store=str(path), t0="every:5", **common))
    return path


def config(store, model, out, **changes):
    values = {"store": str(store), "model": str(model), "out": str(out), "device": "cpu", "paths": 3, "batch_size": 2}
    return EvalConfig(**values | {"flow_steps": 4} | changes)


@pytest.fixture(scope="module")
def report(store, tiny_checkpoint, tmp_path_factory):
    out, asked = tmp_path_factory.mktemp("controls") / "out", {"control": "shuffled,none", "flow_steps": "4,2"}
    return alpacache.evaluate(config(store, tiny_checkpoint, out, **asked))


@pytest.fixture(scope="module")
def data(store, tiny_checkpoint):
    return CachedDataset([store], Checkpoint(str(tiny_checkpoint)))


@pytest.fixture(scope="module")
def expert(tiny_checkpoint):
    return load_expert(str(tiny_checkpoint), dtype=torch.float32).eval()


@torch.no_grad()
def loss(expert, prefix, sample_id, poses):
    """The validation's loss of one sample on a prefix."""
    action = expert.action_space.to_action(*poses)[None, None]
    noise = randomness.noise("val", sample_id, draws=4)[None]
    t = randomness.times("val", sample_id, draws=4, schedule="beta")[None]
    velocity = expert.velocity(flow_matching.interpolate(action, noise, t), t, prefix)
    return float(flow_matching.loss(velocity, action, noise).mean())


def same_paths(variant, expert, action, poses):
    xyz, _ = to_paths(expert.action_space, action, *poses[:2])
    return variant.metrics["min_ade"] == pytest.approx(min_ade(xyz, poses[2])["min_ade"], rel=1e-3)


@pytest.mark.ci
def test_a_control_has_another_clips_prefix_with_its_own_noise_and_target(report, data, expert):
    ids = data.ids
    assert len(report.results) == len(ids) == 6
    taken = [result.shuffled_with for result in report.results]
    assert sorted(taken) == sorted(ids)
    for index, result in enumerate(report.results):
        assert result.shuffled_with.partition("@")[0] != result.clip_id
        poses, other = data.poses(index), data.load(ids.index(result.shuffled_with)).prefix
        base = result.models["base"]
        assert base.loss == pytest.approx(loss(expert, [data.load(index).prefix], result.sample_id, poses), rel=1e-4)
        control = base.controls["shuffled"]
        assert control.loss == pytest.approx(loss(expert, [other], result.sample_id, poses), rel=1e-4)
        noise = eval_noise(0, [result.sample_id], 3)
        action = flow_matching.sample(lambda x, t, to=other: expert.velocity(x, t, [to]), noise, steps=4)[0]
        assert same_paths(control, expert, action, poses)


def test_without_a_prefix_action_tokens_attend_to_each_other_alone(report, data, tiny_checkpoint):
    """Against transformers' own attention without a cache."""
    stock = load_expert(str(tiny_checkpoint), dtype=torch.float32, attention="sdpa").eval()
    stock._attended = lambda *_, **__: {"use_cache": False, "attention_mask": torch.zeros(1, 1, 64, 64)}
    for index in (0, len(data) - 1):
        result, starts = report.results[index], torch.tensor([data.start_position(index)])
        assert starts.item() == data.load(index).prefix.start_position
        control, draws = result.models["base"].controls["none"], []
        noise = randomness.noise("val", result.sample_id, draws=4)
        t = randomness.times("val", result.sample_id, draws=4, schedule="beta")
        action = stock.action_space.to_action(*data.poses(index))[None, None]
        with torch.no_grad():
            for one, time in zip(noise[:, None, None], t[:, None, None], strict=True):
                x_t = flow_matching.interpolate(action, one, time)
                draws.append(flow_matching.loss(stock.velocity(x_t, time, NoPrefix(starts=starts)), action, one).item())
        assert control.loss == pytest.approx(np.mean(draws), rel=1e-4)


def test_the_honest_numbers_are_those_of_an_evaluation_without_controls(report, store, tiny_checkpoint, tmp_path):
    plain = alpacache.evaluate(config(store, tiny_checkpoint, tmp_path))
    for with_them, without in zip(report.results, plain.results, strict=True):
        assert np.array_equal(with_them.models["base"].pred_xyz, without.models["base"].pred_xyz)
        assert with_them.models["base"].by_steps[4].metrics["ade"] == without.models["base"].metrics["ade"]
    assert (plain.summary.controls, plain.summary.flow_steps) == ({}, {})


def test_fewer_flow_steps_are_those_of_an_evaluation_of_their_own(report, data, expert):
    for index, result in enumerate(report.results):
        action = predict_actions(expert, [data.load(index)], paths=3, flow_steps=2, seed=0)[0]
        assert same_paths(result.models["base"].by_steps[2], expert, action, data.poses(index))
    told = report.summary.flow_steps["base"]
    assert list(told) == [4, 2]
    assert told[4].metrics["min_ade"] == report.summary.strata["all"].metrics["base"]["min_ade"]
    assert told[2].change.estimate == pytest.approx(told[2].metrics["min_ade"] - told[4].metrics["min_ade"])


def test_each_prefix_is_read_once_for_all_numbers_of_flow_steps(store, tiny_checkpoint, tmp_path, monkeypatch):
    read, plan = Counter(), ring_source.RingSource.plan

    def counted(source, request, *given, **options):
        read[request.index] += 1
        return plan(source, request, *given, **options)

    monkeypatch.setattr(ring_source.RingSource, "plan", counted)
    alpacache.evaluate(config(store, tiny_checkpoint, tmp_path, flow_steps=(4, 2, 1)))
    assert set(read.values()) == {1}


def test_files_hold_what_was_asked_for(report):
    document = json.loads(Path(report.out, "eval.json").read_text())
    assert document["settings"]["control"] == ["shuffled", "none"]
    assert document["settings"]["all_flow_steps"] == [4, 2]
    told = document["summary"]["controls"]["all"]["base"]
    assert set(told) == {"shuffled", "none"}
    assert told["shuffled"]["answer"] == "cannot tell"
    assert "blocks of 60 s give no interval, 10 may" in told["shuffled"]["sentence"]
    assert list(document["summary"]["flow_steps"]["base"]) == ["4", "2"]
    table = pq.read_table(f"{report.out}/samples.parquet").to_pydict()
    rows = [row for row, model in enumerate(table["model"]) if model == "base"]
    assert [table["shuffled/sample_id"][row] for row in rows] == [one.shuffled_with for one in report.results]
    losses = [one.models["base"].controls["none"].loss for one in report.results]
    assert [table["none/loss"][row] for row in rows] == losses
    assert {table["loss"][row] for row in range(len(table["model"])) if row not in rows} == {None}
    assert [table["flow_steps=2/min_ade"][row] for row in rows] == [
        one.models["base"].by_steps[2].metrics["min_ade"] for one in report.results
    ]
    assert np.isfinite([table[key][row] for key in ("lateral_only", "accel_mae") for row in range(len(rows))]).all()
    page = Path(report.out, "report.html").read_text()
    assert "Does it look?" in page
    assert '<section id="flow" >' in page


def test_what_cannot_be_controlled_is_refused(store, rollout_stores, tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="all 1 samples are of one clip"):
        alpacache.evaluate(config(store, tiny_checkpoint, tmp_path / "out", control="shuffled", samples=1))
    with pytest.raises(UsageError, match="control compares paths on direct prefixes; pass --reasoning none"):
        alpacache.evaluate(config(rollout_stores["bf16"], tiny_checkpoint, tmp_path / "out", control="none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capture", [True, False])
def test_on_a_gpu_losses_are_those_of_the_cpu(report, store, tiny_checkpoint, tmp_path, capture):
    asked = {"control": "shuffled,none", "flow_steps": "4,2", "device": "cuda", "capture": capture}
    there = alpacache.evaluate(config(store, tiny_checkpoint, tmp_path, **asked))
    for one, other in zip(report.results, there.results, strict=True):
        here, cuda = one.models["base"], other.models["base"]
        assert one.shuffled_with == other.shuffled_with
        assert cuda.loss == pytest.approx(here.loss, rel=0.03)
        for control in ("shuffled", "none"):
            assert cuda.controls[control].loss == pytest.approx(here.controls[control].loss, rel=0.03)
        assert set(cuda.by_steps) == {4, 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"control": "mirrored"}, "control is 'mirrored'; expected shuffled, none or both"),
        ({"control": "none,none"}, "control is none,none; expected each of them once"),
        ({"flow_steps": "10,4,4"}, "flow_steps is 10,4,4; expected each of them once"),
        ({"flow_steps": "10,many"}, "flow_steps is '10,many'; expected whole numbers as in 10,4,2,1"),
        ({"flow_steps": 0}, "flow_steps is 0; expected .*at least 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(wrong, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        config(tmp_path, tmp_path, tmp_path, **wrong)
