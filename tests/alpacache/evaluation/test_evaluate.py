"""Evaluation from cached features: same noise for all, independent of batch size, everything written."""

import json
import shutil

import numpy as np
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.errors import DataError, NonFiniteError, UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.inference.prediction import predict_actions, to_paths
from alpacache.metrics.paths import min_ade
from alpacache.training.config import TrainConfig
from cache_store import CacheReader, SampleReadError

pytestmark = pytest.mark.system  # whole evaluations


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    common = {"model": str(tiny_checkpoint), "device": "cpu"}
    alpacache.extract(ExtractConfig(source="synthetic:6", store=str(root / "store"), frames=1, **common))
    alpacache.train(
        TrainConfig(
            stores=(str(root / "store"),), out=str(root / "run"), steps=4, batch_size=2, lr=1e-3, warmup=1, **common
        )
    )
    return root


def config(root, model, out, **changes):
    values = {
        "store": str(root / "store"),
        "model": str(model),
        "out": str(out),
        "device": "cpu",
        "paths": 3,
        "flow_steps": 4,
    }
    return EvalConfig(**values | changes)


@pytest.mark.ci
def test_base_trained_and_baselines_are_judged_on_the_stored_truth(trained, tiny_checkpoint, tmp_path):
    report = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path, checkpoint=str(trained / "run")))
    summary = report.summary
    assert summary.models == ("base", "trained")
    assert summary.samples == 6
    reader = CacheReader(trained / "store")
    for result in report.results:
        truth = reader.read(result.sample_id, fields=["future_xyz"])["future_xyz"]
        for label in ("base", "trained"):
            judged = result.models[label]
            assert judged.pred_xyz.shape == (3, 64, 3)
            assert judged.metrics["min_ade"] == pytest.approx(min_ade(judged.pred_xyz, truth)["min_ade"])
        assert not np.allclose(result.models["base"].pred_xyz, result.models["trained"].pred_xyz)
    mean = np.mean([result.models["trained"].metrics["ade"] for result in report.results])
    assert summary.strata["all"].metrics["trained"]["ade"] == pytest.approx(mean)


@pytest.mark.ci
def test_batch_size_changes_nothing_beyond_rounding(trained, tiny_checkpoint, tmp_path):
    one = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "a", batch_size=1))
    six = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "b", batch_size=6))
    for first, second in zip(one.results, six.results, strict=True):
        assert np.allclose(first.models["base"].pred_xyz, second.models["base"].pred_xyz, atol=1e-3)


def test_a_quantised_store_gives_nearly_the_same_paths(trained, tiny_checkpoint, tmp_path):
    common = {"source": "synthetic:2", "model": str(tiny_checkpoint), "frames": 1, "device": "cpu"}
    alpacache.extract(ExtractConfig(**common, store=str(tmp_path / "int8"), codec="int8"))
    checkpoint = Checkpoint(str(tiny_checkpoint))
    expert, paths = load_expert(checkpoint, dtype=torch.float32).eval(), []
    for store in (trained / "store", tmp_path / "int8"):
        data = CachedDataset([store], checkpoint)
        samples = [data.load(0), data.load(1)]
        actions = predict_actions(expert, samples, paths=3, flow_steps=4, seed=0)
        drives = zip(actions, (data.poses(0), data.poses(1)), strict=True)
        paths.append(np.stack([to_paths(expert.action_space, a, *poses[:2])[0] for a, poses in drives]))
    # Two integrations amplify: a velocity error of 0.1 % is 2 % of the path of an untrained, swerving expert.
    assert 0 < np.linalg.norm(paths[1] - paths[0]) / np.linalg.norm(paths[0]) < 0.04


def test_models_share_their_noise(trained, tiny_checkpoint, tmp_path):
    report = alpacache.evaluate(
        config(
            trained, tiny_checkpoint, tmp_path, checkpoint=str(trained / "run"), compare={"again": str(trained / "run")}
        )
    )
    for result in report.results:
        assert np.array_equal(result.models["trained"].pred_xyz, result.models["again"].pred_xyz)


@pytest.mark.ci
def test_clips_that_a_run_was_trained_on_are_told(trained, tiny_checkpoint, tmp_path, caplog):
    run, store = shutil.copytree(trained / "run", tmp_path / "run"), shutil.copytree(trained / "store", tmp_path / "s")
    common = {"model": str(tiny_checkpoint), "frames": 1, "device": "cpu"}
    others = {"t0": "6.0", "store": str(tmp_path / "t0"), "samples": 2}  # other moments of the same clips
    alpacache.extract(ExtractConfig(source=f"synthetic:{len(CacheReader(store))}", **others, **common))
    alpacache.extract(ExtractConfig(source="synthetic:8", shard="6/8", store=str(tmp_path / "new"), **common))
    for judged, told in ((store, "6 of the 6"), (tmp_path / "t0", "2 of the 2"), (tmp_path / "new", "")):
        caplog.clear()
        settings = {"store": str(judged), "checkpoint": str(run), "paths": 1, "flow_steps": 1}
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / f"eval-{judged.name}", **settings))
        warned = f"'trained' was trained on {told} clips of --store {judged} that it is judged on"
        assert (warned in caplog.text) if told else ("was trained on" not in caplog.text)


def test_files(trained, tiny_checkpoint, tmp_path):
    report = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path, checkpoint=str(trained / "run")))
    document = json.loads((tmp_path / "eval.json").read_text())
    assert document["summary"]["samples"] == 6
    assert [entry["sample_id"] for entry in document["samples"]] == [result.sample_id for result in report.results]
    assert document["samples"][0]["metrics"]["trained"]["ade"] == report.results[0].models["trained"].metrics["ade"]
    for name in ("best", "median", "worst", "sample-000"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<html" in (tmp_path / "report.html").read_text()[:500]


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(trained, tiny_checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--out .*file is a file; expected a directory"):
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "file"))


@pytest.mark.ci
def test_a_checkpoint_may_have_another_name(trained, tiny_checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "run" / "metrics.jsonl", tmp_path / "run")
    good = tmp_path / "run" / "checkpoints" / "good"
    shutil.copytree((trained / "run" / "last").resolve(), good)
    alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "eval", checkpoint=str(good)))
    assert "losses" in (tmp_path / "eval" / "report.html").read_text().lower()


def test_stores_that_overlap_are_refused_with_counts_unless_allowed(trained, tiny_checkpoint, tmp_path, caplog):
    store = str(trained / "store")
    (tmp_path / "link").symlink_to(store)
    twice = {"store": (store, str(tmp_path / "link")), "paths": 1, "flow_steps": 1}
    with pytest.raises(UsageError, match=r"6 of 6 samples of --store .*link are in .*store too: they would count"):
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "out", **twice))
    assert not (tmp_path / "out").exists()
    run = {"checkpoint": str(trained / "run"), "on_overlap": "allow", **twice}
    report = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "out", **run))
    assert report.summary.samples == 12
    told = [record.getMessage() for record in caplog.records]
    assert "6 of 6 samples" in told[0]
    assert "on 6 of the 6 clips" in told[1]


def test_the_damaged_one_of_two_samples_of_a_name_is_left_out(trained, tiny_checkpoint, tmp_path):
    shutil.copytree(trained / "store", tmp_path / "copy")
    reader = CacheReader(tmp_path / "copy")
    file = next((tmp_path / "copy" / reader.record(reader.sample_ids[0]).folder).glob("kv/c.*"))
    file.write_bytes(bytes(file.stat().st_size))
    both = {"store": (str(trained / "store"), str(tmp_path / "copy")), "on_overlap": "allow", "on_damage": "skip"}
    report = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "out", paths=1, flow_steps=1, **both))
    assert (len(report.results), len(report.left_out)) == (11, 1)


def test_a_run_on_another_base_is_refused(trained, tiny_checkpoint, tiny_checkpoint_15, tmp_path):
    with pytest.raises(UsageError, match="another model"):
        alpacache.evaluate(config(trained, tiny_checkpoint_15, tmp_path))
    with pytest.raises(UsageError, match="neither a run directory"):
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path, checkpoint=str(tmp_path)))


@pytest.mark.parametrize("label", ["base", "trained", "constant velocity", "constant turn rate"])
def test_a_label_that_is_taken_is_refused_before_anything_is_read(label, tmp_path):
    with pytest.raises(UsageError, match=f"^--compare {label}=runs/x: the label '{label}' is taken; choose another"):
        alpacache.evaluate(config(tmp_path, tmp_path / "no model", tmp_path / "out", compare={label: "runs/x"}))
    assert not (tmp_path / "out").exists()


def test_paths_that_are_not_finite_name_the_run(trained, tiny_checkpoint, tmp_path, monkeypatch):
    def diverged(expert, state, *, where):
        with torch.no_grad():
            expert.action_out_proj.weight.fill_(1e38)

    monkeypatch.setattr("alpacache.training.trained_expert.apply_checkpoint", diverged)
    with pytest.raises(NonFiniteError, match=rf"'trained' \({trained}/run/checkpoints/step-\d+\) predicts paths"):
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path, checkpoint=str(trained / "run"), samples=1))


def test_every_run_is_opened_before_the_first_path_is_sampled(trained, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("alpacache.alpamayo.load_expert", lambda *a, **k: pytest.fail("began to sample"))
    runs = {"good": str(trained / "run"), "gone": str(tmp_path / "gone")}
    with pytest.raises(UsageError, match="gone is neither a run directory"):
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "out", compare=runs))
    with pytest.raises(UsageError, match="has no average of the weights"):
        alpacache.evaluate(
            config(trained, tiny_checkpoint, tmp_path / "out", checkpoint=str(trained / "run"), ema=True)
        )
    broken = shutil.copytree(trained / "run", tmp_path / "broken", symlinks=True)
    file = next(broken.glob("checkpoints/*/model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "out", compare=runs | {"gone": str(broken)}))
    assert not (tmp_path / "out").exists()


@pytest.mark.ci
def test_the_report_shows_the_losses_of_the_runs(trained, tiny_checkpoint, tmp_path):
    alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "a", samples=2, checkpoint=str(trained / "run")))
    assert 'alt="loss over steps"' in (tmp_path / "a/report.html").read_text()
    alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "b", samples=2))
    assert "no curves" in (tmp_path / "b/report.html").read_text()


@pytest.mark.ci
def test_paths_are_drawn_into_the_front_picture_where_the_camera_is_known(
    trained, tiny_checkpoint, tmp_path, monkeypatch
):
    stored = CachedDataset([trained / "store"], Checkpoint(str(tiny_checkpoint))).front_picture(0)[0]
    drawn = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "a", samples=1))
    assert drawn.results[0].front_jpeg not in (None, stored)
    monkeypatch.setattr(CachedDataset, "front_picture", lambda data, index: (stored, {"model": "unheard of"}))
    plain = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "b", samples=1))
    assert plain.results[0].front_jpeg == stored
    monkeypatch.setattr(CachedDataset, "front_picture", lambda data, index: (stored, None))
    unknown = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "c", samples=1))
    assert unknown.results[0].front_jpeg == stored


@pytest.mark.ci
def test_a_store_with_rollouts_is_judged_on_them_unless_declined(rollout_stores, tiny_checkpoint, tmp_path):
    def run(name, **changes):
        settings = {"store": str(rollout_stores["bf16"]), **changes}
        report = alpacache.evaluate(config(tmp_path, tiny_checkpoint, tmp_path / name, **settings))
        settings = json.loads((tmp_path / name / "eval.json").read_text())["settings"]
        return settings["reasoning"], [result.models["base"].pred_xyz for result in report.results]

    (kind, paths), (plain_kind, plain) = run("auto", batch_size=1), run("none", reasoning="none")
    assert (kind, plain_kind) == ("rollout", "none")
    assert all(not np.allclose(one, other, atol=0.1) for one, other in zip(paths, plain, strict=True))
    # The checkpoint is in bfloat16, and some CPUs round its products differently with another number of rows.
    _, together = run("together", batch_size=2)
    assert all(np.allclose(one, other, atol=2e-2) for one, other in zip(paths, together, strict=True))
    _, fewer = run("fewer", paths=2)
    assert all(np.allclose(one[:2], other, atol=2e-2) for one, other in zip(paths, fewer, strict=True))
    with pytest.raises(UsageError, match="has 3 reasoning rollouts per sample, 4 paths need one each; pass --paths 3"):
        run("more", paths=4)


@pytest.mark.ci
@pytest.mark.parametrize("fault", ["record", "kv", "calibration"])
def test_a_sample_that_cannot_be_read_is_left_out_if_asked_for_and_named(trained, tiny_checkpoint, tmp_path, fault):
    store = shutil.copytree(trained / "store", tmp_path / "store")
    reader = CacheReader(store)
    sample_id = reader.sample_ids[2]
    group = store / reader.record(sample_id).folder
    record = next(store.glob(f"commits/{group.name.partition('.')[0]}.json"))
    file = {"record": record, "kv": next(group.glob("kv/c.*")), "calibration": group / "zarr.json"}[fault]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    settings = {"store": str(store), "batch_size": 4, "checkpoint": str(trained / "run")}
    with pytest.raises(SampleReadError, match=sample_id):
        alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "stop", **settings))
    out = tmp_path / "skip"
    report = alpacache.evaluate(config(trained, tiny_checkpoint, out, **settings, on_damage="skip"))
    assert [sample.sample_id for sample in report.left_out] == [sample_id]
    assert [result.sample_id for result in report.results] == [name for name in reader.sample_ids if name != sample_id]
    assert json.loads((out / "eval.json").read_text())["left_out"][0]["sample_id"] == sample_id
    assert f"<li>{sample_id}: " in (out / "report.html").read_text()
    whole = alpacache.evaluate(config(trained, tiny_checkpoint, tmp_path / "whole", batch_size=4, samples=2))
    for one, other in zip(whole.results, report.results[:2], strict=True):
        assert np.allclose(one.models["base"].pred_xyz, other.models["base"].pred_xyz, atol=1e-3)
