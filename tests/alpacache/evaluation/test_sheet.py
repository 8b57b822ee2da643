"""The sheet, and models that are judged on another store of the same samples."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.judged_models import find_models
from alpacache.evaluation.sheet import sheet_png
from alpacache.extraction.config import ExtractConfig
from alpacache.training.config import TrainConfig
from cache_store import CacheReader

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def root(tiny_checkpoint, tmp_path_factory):
    """Stores of the same four samples with one frame and with two, and a run on the latter; one of three others."""
    root = tmp_path_factory.mktemp("sheet")
    common = {"model": str(tiny_checkpoint), "device": "cpu"}
    for name, frames, count in (("one", 1, 4), ("two", 2, 4), ("fewer", 1, 3)):
        alpacache.extract(
            ExtractConfig(source=f"synthetic:{count}", store=str(root / name), frames=frames, codec="int8", **common)
        )
    run = {"steps": 2, "batch_size": 2, "lr": 1e-3, "warmup": 1}
    alpacache.train(TrainConfig(stores=(str(root / "two"),), out=str(root / "run"), **run, **common))
    return root


def config(root, model, out, **changes):
    values = {"store": str(root / "one"), "model": str(model), "out": str(out), "device": "cpu", "paths": 2}
    return EvalConfig(**values | {"flow_steps": 2, "batch_size": 2} | changes)


@pytest.fixture(scope="module")
def report(root, tiny_checkpoint):
    stores = {"two frames": str(root / "two"), "trained": str(root / "two")}
    asked = {"checkpoint": str(root / "run"), "compare_store": stores, "control": "shuffled,none"}
    sheet = ("synthetic-0-000002", "synthetic-0-000000*")
    return alpacache.evaluate(config(root, tiny_checkpoint, root / "out", **asked, sheet=sheet))


@pytest.mark.ci
def test_a_model_on_another_store_is_that_of_an_evaluation_of_that_store(report, root, tiny_checkpoint, tmp_path):
    assert report.summary.models == ("base", "two frames", "trained")
    asked = {"checkpoint": str(root / "run"), "control": "shuffled,none"}
    alone = alpacache.evaluate(config(root, tiny_checkpoint, tmp_path, store=str(root / "two"), **asked))
    for both, one in zip(report.results, alone.results, strict=True):
        assert both.sample_id == one.sample_id
        for label, own in (("two frames", "base"), ("trained", "trained")):
            assert np.array_equal(both.models[label].pred_xyz, one.models[own].pred_xyz)
            assert both.models[label].loss == one.models[own].loss
            assert both.models[label].controls == one.models[own].controls
        assert not np.allclose(both.models["base"].pred_xyz, both.models["two frames"].pred_xyz)
    assert report.summary.strata["all"].differences["two frames"]["min_ade"] is not None
    settings = json.loads((root / "out" / "eval.json").read_text())["settings"]
    assert settings["compare_store"] == {label: str(root / "two") for label in ("two frames", "trained")}


@pytest.mark.ci
def test_the_sheet_has_a_row_for_each_named_sample_and_is_in_the_report(report, root, tiny_checkpoint, tmp_path):
    with Image.open(root / "out" / "sheet.png") as image:
        image.load()
        size = image.size
    page = (root / "out" / "report.html").read_text()
    assert 'alt="named samples" src="data:image/jpeg' in page
    assert f"two frames on {root}/two" in page
    by_id = {result.sample_id: result for result in report.results}
    ids = list(CacheReader(root / "one").sample_ids)
    drawn = sheet_png(report.summary, [by_id[ids[2]], by_id[ids[0]]], report.results)
    assert drawn == (root / "out" / "sheet.png").read_bytes()
    with Image.open(io.BytesIO(sheet_png(report.summary, report.results, report.results))) as image:
        assert image.size[0] == size[0]
        assert image.size[1] > size[1]
    alpacache.evaluate(config(root, tiny_checkpoint, tmp_path, sheet=(ids[1],)))
    assert (tmp_path / "sheet.png").exists()
    alpacache.evaluate(config(root, tiny_checkpoint, tmp_path))
    assert not (tmp_path / "sheet.png").exists()
    assert '<section id="sheet" hidden>' in (tmp_path / "report.html").read_text()


def test_a_sheet_of_nothing_is_refused_before_any_run_is_read(root, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("alpacache.evaluation.evaluate.find_models", lambda *a, **k: pytest.fail("read the runs"))
    for entry, message in (
        ("synthetic-9", r"--sheet synthetic-9: 1 of 1 names fit no sample of the stores: synthetic-9"),
        ("speed>1000", r"--sheet 'speed>1000': none of 4 samples fits it"),
        ("synthetic-0-000003", r"--sheet synthetic-0-000003: 0 of the 2 samples that are judged fit it"),
    ):
        with pytest.raises(UsageError, match=message):
            alpacache.evaluate(config(root, tiny_checkpoint, tmp_path / "out", sheet=(entry,), samples=2))
    assert not (tmp_path / "out").exists()


def test_another_store_must_have_the_same_samples_of_the_same_drives(root, tiny_checkpoint, tmp_path):
    asked = config(root, tiny_checkpoint, tmp_path / "out", compare_store={"fewer": str(root / "fewer")})
    with pytest.raises(UsageError, match=r"--compare-store fewer=.*: 1 of 4 samples .* not in it, synthetic-0-000003@"):
        alpacache.evaluate(asked)
    base = Checkpoint(str(tiny_checkpoint))
    data = CachedDataset([root / "one"], base)

    def moved(index):
        xyz, *rest = data.poses(index)
        return xyz + (index == 1), *rest

    others = {"store": "one", "other_stores": {"two": str(root / "two")}, "average": False}
    with pytest.raises(UsageError, match=f"1 of 4 samples have another path there, {data.sample_id(1)}"):
        find_models(base, {}, data, range(4), moved, **others, paths_on_rollouts=0)
    with pytest.raises(UsageError, match="has 0 reasoning rollouts per sample, 2 paths need one each"):
        find_models(base, {}, data, range(4), data.poses, **others, paths_on_rollouts=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", ["base", "trained", "Head", "constant velocity"])
def test_a_label_that_is_taken_is_refused(label, tmp_path):
    with pytest.raises(UsageError, match=f"--compare-store {label}=s: the label '{label}' is taken"):
        config(tmp_path, tmp_path, tmp_path, compare={"head": "runs/head"}, compare_store={label: "s"})
