"""The parquet file: a row a sample and model, with the numbers of the tables."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from alpacache.driving.strata import classify
from alpacache.evaluation.judging import SampleResult, judge, judge_baselines
from alpacache.evaluation.output import write_results, write_sample_table
from alpacache.evaluation.summary import summarise

HISTORY = np.stack([np.arange(-15.0, 1.0), np.zeros(16), np.zeros(16)], axis=-1)
ROT = np.broadcast_to(np.eye(3), (64, 3, 3))


def result(number, lateral_m):
    truth = np.stack([np.arange(1.0, 65.0), np.linspace(0, lateral_m, 64), np.zeros(64)], axis=-1)
    paths = np.stack([truth, truth + np.array([0.0, 1.0, 0.0])])
    turned = np.broadcast_to(np.eye(3), (2, 64, 3, 3))
    return SampleResult(
        sample_id=f"clip{number}@5100000#0",
        clip_id=f"clip{number}",
        truth_xyz=truth,
        truth_rot=ROT,
        history_xyz=HISTORY,
        history_rot=ROT[:16],
        front_jpeg=None,
        strata=classify(HISTORY, ROT[:16], truth, ROT),
        models={"base": judge(paths, turned, truth, ROT), **judge_baselines(HISTORY, ROT[:16], truth, ROT)},
    )


def test_a_row_for_every_sample_and_model_and_the_means_are_those_of_the_summary(tmp_path):
    results = [result(number, lateral_m) for number, lateral_m in enumerate((0.0, 3.0, -5.0))]
    write_sample_table(tmp_path / "samples.parquet", results)
    table = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert len(table) == 3 * 3
    base = [row for row in table if row["model"] == "base"]
    assert [row["leaves"] for row in base] == [False, True, True]
    assert [row["stratum/straight"] for row in base] == [True, False, False]
    assert [row["truth/lateral_m@6.4"] for row in base] == pytest.approx([0.0, 3.0, -5.0])
    assert [row["pred/lateral_m@6.4"] for row in base] == pytest.approx([0.5, 3.5, -4.5])
    every = summarise(results).strata["all"]
    for label in ("base", "constant velocity"):
        mine = [row["min_fde"] for row in table if row["model"] == label]
        assert np.mean(mine) == pytest.approx(every.metrics[label]["min_fde"])


def test_what_is_not_finite_is_null_in_the_json(tmp_path):
    (tmp_path / "pictures").mkdir()
    good = result(0, 3.0)
    metrics = dict(good.models["base"].metrics, corner_distance=float("nan"))
    results = [replace(good, models={**good.models, "base": replace(good.models["base"], metrics=metrics)})]
    settings = {"paths": 2, "seed": 0}
    write_results(tmp_path, summarise(results), results, settings=settings, losses={})
    document = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert document["settings"] == settings
    assert document["samples"][0]["metrics"]["base"]["corner_distance"] is None
    assert document["summary"]["strata"]["all"]["metrics"]["base"]["corner_distance"] is None
    assert document["summary"]["strata"]["all"]["metrics"]["base"]["min_fde"] == metrics["min_fde"]
