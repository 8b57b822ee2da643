"""Evaluation of samples with routes: their commands in every output, and the control with left for right."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.route import command_of
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.flow_matching import sample as sample_flow
from alpacache.inference.prediction import eval_noise, to_paths
from alpacache.training.config import TrainConfig

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def store(tiny_checkpoint_15, tmp_path_factory):
    """Six generated drives, some with a route."""
    store = tmp_path_factory.mktemp("routed") / "store"
    settings = {"frames": 1, "hidden_states": "none", "route": "source", "device": "cpu"}
    alpacache.extract(ExtractConfig(source="synthetic:6", model=str(tiny_checkpoint_15), store=str(store), **settings))
    return store


@pytest.fixture(scope="module")
def judged(store, tiny_checkpoint_15, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    settings = {"model": str(tiny_checkpoint_15), "paths": 3, "flow_steps": 3, "batch_size": 2, "device": "cpu"}
    return out, alpacache.evaluate(EvalConfig(store=str(store), out=str(out), swap_route=True, **settings))


def test_samples_count_in_the_stratum_of_their_command(judged, store):
    _, report = judged
    data_of = {result.sample_id: result for result in report.results}
    counts = {"left": 0, "right": 0, "straight": 0, "none": 0}
    for result in data_of.values():
        counts[command_of(result.route)] += 1
        assert f"command_{command_of(result.route)}" in result.labels
    assert counts["none"]
    assert counts["none"] < 6
    strata = report.summary.strata
    assert {name: strata[f"command_{name}"].samples for name in counts} == counts
    commands = report.summary.commands
    assert {name: told.samples for name, told in commands.items()} == {
        name: count for name, count in counts.items() if count and name != "none"
    }
    for name, told in commands.items():
        mine = [result for result in data_of.values() if result.command == name]
        shares = [(np.abs(r.models["base"].pred_xyz[:, -1, 1]) > 2.0) & side(r, name) for r in mine]
        assert told.models["base"].obeyed == pytest.approx(np.mean(shares))


def side(result, command):
    ends = result.models["base"].pred_xyz[:, -1, 1]
    return ends > 0 if command == "left" else ends < 0


def test_the_swap_is_the_twin_from_the_same_noise(judged, store, tiny_checkpoint_15):
    _, report = judged
    checkpoint = Checkpoint(str(tiny_checkpoint_15))
    data, expert = CachedDataset([store], checkpoint), load_expert(checkpoint, dtype=torch.float32).eval()
    swapped = {result.sample_id: result.models["base"].swapped_xyz for result in report.results}
    for index in range(len(data)):
        found = swapped[data.sample_id(index)]
        assert (found is not None) == data.has_twin(index, "swapped") == (command_of(data.route(index)) != "none")
        if found is None:
            continue
        twin = data.load(index, twin="swapped").twin_prefix()
        noise = eval_noise(0, [data.sample_id(index)], 3)
        with torch.no_grad():
            action = sample_flow(lambda x, t, twin=twin: expert.velocity(x, t, [twin]), noise, steps=3)[0]
        xyz, _ = to_paths(expert.action_space, action, *data.poses(index)[:2])
        assert np.allclose(found, xyz, atol=1e-3)
        assert not np.allclose(found, report.results[0].models["base"].pred_xyz)
    assert report.summary.swaps["base"].samples == sum(xyz is not None for xyz in swapped.values())


def test_a_twin_of_a_text_that_commands_no_side_is_not_judged(store, tiny_checkpoint_15, tmp_path, monkeypatch):
    monkeypatch.setattr(CachedDataset, "route", lambda self, index: "go_straight, then left")
    settings = {"model": str(tiny_checkpoint_15), "paths": 1, "flow_steps": 1, "device": "cpu", "samples": 2}
    out = tmp_path / "eval"
    report = alpacache.evaluate(EvalConfig(store=str(store), out=str(out), swap_route=True, **settings))
    assert report.summary.swaps == {}
    assert set(report.summary.commands) == {"straight"}


def test_json_parquet_and_report_tell_of_commands(judged):
    out, report = judged
    document = json.loads((out / "eval.json").read_text())
    assert document["settings"]["swap_route"] is True
    assert {one["command"] for one in document["samples"]} == {result.command for result in report.results}
    assert document["summary"]["swaps"]["base"]["samples"] == report.summary.swaps["base"].samples
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    for row in (row for row in rows if row["model"] == "base"):
        told = command_of(row["route"])
        assert row["command"] == told
        assert row[f"stratum/command_{told}"]
        assert (row["obeys"] is None) == (told == "none") == (row["swapped/obeys"] is None)
    page = (out / "report.html").read_text()
    assert "<h2>Commands</h2>" in page
    assert "command left" in page or "command right" in page
    assert "<div hidden><h2>" not in page
    assert "Route: turn" in page


def test_without_routes_nothing_changes_and_there_is_nothing_to_swap(tiny_checkpoint_15, tmp_path, store):
    settings = {"model": str(tiny_checkpoint_15), "device": "cpu"}
    plain = tmp_path / "plain"
    alpacache.extract(ExtractConfig(source="synthetic:2", store=str(plain), frames=1, **settings))
    settings |= {"paths": 2, "flow_steps": 1, "out": str(tmp_path / "out")}
    with pytest.raises(UsageError, match="extracted without routes, so none can be swapped"):
        alpacache.evaluate(EvalConfig(store=str(plain), swap_route=True, **settings))
    report = alpacache.evaluate(EvalConfig(store=str(plain), **settings))
    assert not report.summary.commands
    assert not any(name.startswith("command") for name in report.summary.strata)
    document = json.loads((tmp_path / "out/eval.json").read_text())
    assert "routes" not in document["settings"]
    assert "route" not in document["samples"][0]
    assert "route" not in pq.read_table(tmp_path / "out/samples.parquet").column_names
    assert (tmp_path / "out/report.html").read_text().count("<div hidden><h2>") == 2


@pytest.mark.slow
def test_a_trained_model_follows_its_route_at_a_fork_and_the_base_does_not(tmp_path):
    """With these weights; how many steps it takes hangs on what a random VLM makes of the two words."""
    common = {"model": str(make_tiny_checkpoint(tmp_path / "tiny15", family="1.5")), "device": "cpu"}
    settings = {"frames": 1, "hidden_states": "none", "route": "source"} | common
    for split, clips, samples in (("train", 240, None), ("val", 400, 30)):
        source, store = f"synthetic:{clips}:fork", str(tmp_path / split)
        alpacache.extract(ExtractConfig(source=source, split=split, samples=samples, store=store, **settings))
    settings = {"steps": 250, "batch_size": 16, "draws": 4, "lr": 3e-3, "warmup": 20, "in_memory": True} | common
    alpacache.train(
        TrainConfig(stores=(str(tmp_path / "train"),), out=str(tmp_path / "run"), route_dropout=0.2, **settings)
    )
    settings = {"checkpoint": str(tmp_path / "run"), "out": str(tmp_path / "eval"), "swap_route": True} | common
    swaps = alpacache.evaluate(EvalConfig(store=str(tmp_path / "val"), **settings)).summary.swaps
    assert swaps["base"].follows < 0.2
    assert abs(swaps["base"].shift_m) < 2.0
    assert swaps["trained"].follows > 0.7
    assert swaps["trained"].shift_m > 10.0


def test_guidance_mixes_the_velocities_with_and_without_the_route(judged, store, tiny_checkpoint_15, tmp_path):
    """From the same noise; a weight of 1 is the route alone, and a sample without a route is as without guidance."""
    _, plain = judged
    checkpoint = Checkpoint(str(tiny_checkpoint_15))
    data, expert = CachedDataset([store], checkpoint), load_expert(checkpoint, dtype=torch.float32).eval()
    settings = {"model": str(tiny_checkpoint_15), "paths": 3, "flow_steps": 3, "batch_size": 4, "device": "cpu"}
    found = {}
    for weight in (1.0, 3.0):
        out = tmp_path / str(weight)
        report = alpacache.evaluate(EvalConfig(store=str(store), out=str(out), guidance=weight, **settings))
        assert json.loads((out / "eval.json").read_text())["settings"]["guidance"] == weight
        found[weight] = {result.sample_id: result.models["base"].pred_xyz for result in report.results}
    for index, result in enumerate(plain.results):
        without = result.models["base"].pred_xyz
        assert np.allclose(found[1.0][result.sample_id], without, atol=1e-3)
        if result.route is None:
            assert np.allclose(found[3.0][result.sample_id], without, atol=0.02)  # rounding, three times over
            continue
        assert not np.allclose(found[3.0][result.sample_id], without, atol=0.02)
        sample = data.load(index, twin="unrouted")
        both, noise = (sample.prefix, sample.twin_prefix()), eval_noise(0, [sample.sample_id], 3)
        with torch.no_grad():
            action = sample_flow(
                lambda x, t, both=both: 3 * expert.velocity(x, t, both[:1]) - 2 * expert.velocity(x, t, both[1:]),
                noise,
                steps=3,
            )[0]
        xyz, _ = to_paths(expert.action_space, action, *data.poses(index)[:2])
        assert np.allclose(found[3.0][result.sample_id], xyz, atol=0.02)


def test_guidance_that_cannot_be_is_refused(
    store, tiny_checkpoint_15, rollout_stores, tiny_checkpoint, tmp_path, monkeypatch
):
    settings = {"out": str(tmp_path / "out"), "guidance": 3.0, "device": "cpu"}
    with pytest.raises(UsageError, match="was extracted without routes, so none can guide"):
        alpacache.evaluate(
            EvalConfig(store=str(rollout_stores["int8"]), model=str(tiny_checkpoint), paths=3, **settings)
        )
    with pytest.raises(UsageError, match="swap_route and control compare paths that nothing guides"):
        alpacache.evaluate(EvalConfig(store=str(store), model=str(tiny_checkpoint_15), swap_route=True, **settings))
    monkeypatch.setattr(CachedDataset, "routed", True)
    with pytest.raises(UsageError, match=r"rollouts are stored with it alone\. Pass --reasoning none"):
        alpacache.evaluate(
            EvalConfig(store=str(rollout_stores["bf16"]), model=str(tiny_checkpoint), paths=3, **settings)
        )
