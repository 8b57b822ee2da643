"""The parquet file: a row a sample and model, with the numbers of the tables."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from alpacache.driving.strata import classify
from alpacache.errors import UsageError
from alpacache.evaluation.judging import SampleResult, judge, judge_baselines
from alpacache.evaluation.output import check_evaluation_out, write_results, write_sample_table
from alpacache.evaluation.summary import summarise

pytestmark = pytest.mark.system

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
    assert [row["noise/lateral_m2@6.4"] for row in base] == pytest.approx([0.25] * 3), "of ends 1 m apart, over two"
    assert {row["noise/heading_rad2@6.4"] for row in table if row["model"] != "base"} == {0.0}
    every = summarise(results).strata["all"]
    for label in ("base", "constant velocity"):
        mine = [row["min_fde"] for row in table if row["model"] == label]
        assert np.mean(mine) == pytest.approx(every.metrics[label]["min_fde"])


def test_what_is_not_finite_is_null_in_the_json(tmp_path):
    good = result(0, 3.0)
    metrics = dict(good.models["base"].metrics, corner_distance=float("nan"))
    results = [replace(good, models={**good.models, "base": replace(good.models["base"], metrics=metrics)})]
    settings = {"paths": 2, "seed": 0}
    check_evaluation_out(tmp_path / "out")
    write_results(tmp_path / "out", summarise(results), results, settings=settings, losses={})
    document = json.loads((tmp_path / "out/eval.json").read_text(), parse_constant=pytest.fail)
    assert document["settings"] == settings
    assert document["samples"][0]["metrics"]["base"]["corner_distance"] is None
    assert document["summary"]["strata"]["all"]["metrics"]["base"]["corner_distance"] is None
    assert document["summary"]["strata"]["all"]["metrics"]["base"]["min_fde"] == metrics["min_fde"]


def test_a_second_evaluation_takes_the_place_of_all_of_the_first(tmp_path):
    results, out = [result(0, 3.0), result(1, -5.0)], tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for seed, used in ((0, results), (1, results[:1])):
        check_evaluation_out(out)
        write_results(out, summarise(used), used, settings={"seed": seed}, losses={})
    assert json.loads((out / "eval.json").read_text())["settings"] == {"seed": 1}
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [
        "best.png",
        "median.png",
        "sample-000.png",
        "worst.png",
    ]
    names = ["eval.json", "notes.txt", "pictures", "report.html", "samples.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["eval.json", "report.html", "samples.parquet", "pictures"])
def test_what_has_an_evaluations_name_and_is_of_another_kind_stays(tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UsageError, match=f"holds {name}, but no whole evaluation; nothing is written over"):
        check_evaluation_out(tmp_path)
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_pictures_of_someone_else_stay(tmp_path):
    results, out = [result(0, 3.0)], tmp_path / "out"
    write_results(out, summarise(results), results, settings={}, losses={})
    check_evaluation_out(out)
    (out / "pictures/mine.png").write_text("mine")
    with pytest.raises(UsageError, match=r"pictures holds mine\.png, which no evaluation writes"):
        check_evaluation_out(out)
    assert (out / "pictures/mine.png").read_text() == "mine"
