"""Means, differences and slopes by stratum, on samples whose bias is planted."""

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from alpacache.driving.strata import LATE_CURVE, STRAIGHT_HISTORY, STRATA, TURN_STRATA, classify, stratum_name
from alpacache.evaluation.judging import METRIC_KEYS, SampleResult, judge, judge_baselines
from alpacache.evaluation.summary import EvalSummary, summarise

HISTORY_XYZ = np.stack([np.arange(-15.0, 1.0), np.zeros(16), np.zeros(16)], axis=-1)
HISTORY_ROT = np.broadcast_to(np.eye(3), (16, 3, 3))


def arc(turn_rate_degps: float) -> tuple[np.ndarray, np.ndarray]:
    """64 poses at 10 m/s on an arc that begins at t0."""
    yaw = np.deg2rad(turn_rate_degps) * 0.1 * np.arange(1, 65)
    middle = yaw - np.deg2rad(turn_rate_degps) * 0.05
    rot = np.zeros((64, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0], rot[:, 0, 1], rot[:, 2, 2] = np.sin(yaw), -np.sin(yaw), 1.0
    return np.cumsum(np.stack([np.cos(middle), np.sin(middle), 0 * yaw], axis=-1), axis=0), rot


def result(number: int, turn_rate_degps: float, shares: Mapping[str, float], paths: int = 2) -> SampleResult:
    """A sample whose models turn a share of the true turn, give or take a little from path to path."""
    xyz, rot = arc(turn_rate_degps)
    models = {}
    for label, share in shares.items():
        each = [arc(share * turn_rate_degps + sway) for sway in np.linspace(-0.5, 0.5, paths)]
        models[label] = judge(np.stack([one[0] for one in each]), np.stack([one[1] for one in each]), xyz, rot)
    return SampleResult(
        sample_id=f"clip-{number}@5100000#0",
        clip_id=f"clip-{number}",
        truth_xyz=xyz,
        truth_rot=rot,
        history_xyz=HISTORY_XYZ,
        history_rot=HISTORY_ROT,
        front_jpeg=None,
        strata=classify(HISTORY_XYZ, HISTORY_ROT, xyz, rot),
        models=models | judge_baselines(HISTORY_XYZ, HISTORY_ROT, xyz, rot),
    )


RATES_DEGPS = np.linspace(-8.0, 8.0, 41)


@pytest.fixture(scope="module")
def results() -> list[SampleResult]:
    return [result(i, float(rate), {"before": 0.2, "after": 0.9}) for i, rate in enumerate(RATES_DEGPS)]


@pytest.fixture(scope="module")
def summary(results: list[SampleResult]) -> EvalSummary:
    return summarise(results)


def test_planted_bias_is_found_and_the_unbiased_model_is_not_flagged(summary: EvalSummary) -> None:
    late = summary.strata[LATE_CURVE]

    slopes = {label: late.bias[label]["heading"][6.4] for label in late.bias}
    assert all(slopes.values())
    assert {label: slope.slope for label, slope in slopes.items() if slope} == pytest.approx(
        {"before": 0.2, "after": 0.9, "constant velocity": 0.0, "constant turn rate": 0.0}, abs=1e-9
    )
    difference = late.bias_differences["after"]["heading"][6.4]
    assert difference is not None
    assert (difference.estimate, difference.low, difference.high) == pytest.approx((0.7, 0.7, 0.7))


def test_a_straight_model_recalls_no_turn_and_the_change_is_paired(summary: EvalSummary) -> None:
    every = summary.strata["all"]
    assert every.corridor["constant velocity"].recall == 0.0
    before, after = every.corridor["before"], every.corridor["after"]
    assert before.recall is not None
    assert after.recall is not None
    assert before.recall < after.recall <= 1.0
    assert before.leaving + before.staying == every.samples
    change = every.recall_differences["after"]
    assert change is not None
    assert change.estimate == pytest.approx(after.recall - before.recall)
    assert change.low > 0
    assert summary.strata["straight"].corridor["after"].recall is None


def test_counts_split_the_whole(summary: EvalSummary) -> None:
    counts = {name: stratum.samples for name, stratum in summary.strata.items()}

    assert tuple(counts) == STRATA
    assert counts["all"] == summary.samples == summary.clips == 41
    assert counts["straight"] + counts["gentle"] + counts["sharp"] == 41
    assert counts["left"] == counts["right"]
    assert counts["straight"] + counts["left"] + counts["right"] == 41
    assert counts["stopped"] + counts["slow"] + counts["medium"] + counts["fast"] == counts["medium"] == 41


def test_means_and_paired_differences(results: list[SampleResult], summary: EvalSummary) -> None:
    per_sample = {
        label: np.array([one.models[label].metrics["min_ade"] for one in results]) for label in ("before", "after")
    }
    stratum = summary.strata["all"]

    assert stratum.metrics["before"]["min_ade"] == pytest.approx(per_sample["before"].mean())
    difference = stratum.differences["after"]["min_ade"]
    assert difference is not None
    assert difference.estimate == pytest.approx((per_sample["after"] - per_sample["before"]).mean())
    assert difference.low < difference.estimate < difference.high < 0
    assert set(stratum.metrics["constant velocity"]) == set(METRIC_KEYS)
    assert set(stratum.differences) == {"after"}


def test_strata_that_are_small_or_empty_are_named(summary: EvalSummary) -> None:
    small = [stratum_name(name) for name, stratum in summary.strata.items() if 0 < stratum.samples < 30]

    assert small
    assert [text.split(":")[0] for text in summary.warnings] == small
    assert summary.strata["fast"].metrics == {}


def test_a_stratum_without_intervals_says_why() -> None:
    turning = [
        replace(result(i, float(rate), {"m": 0.5}), clip_id=f"clip-{i % 3}") for i, rate in enumerate(RATES_DEGPS)
    ]

    found = summarise(turning)

    slope = found.strata["all"].bias["m"]["heading"][6.4]
    assert slope is not None
    assert (slope.slope, slope.clips, slope.low) == (pytest.approx(0.5), 3, -np.inf)
    assert found.warnings[0] == "all: 41 samples of 3 clips; 3 blocks of 60 s give no interval, 10 may."
    assert found.strata["all"].verdicts["m"].answer == "cannot tell"


def test_few_long_drives_are_split_by_the_minute() -> None:
    drives = [
        replace(result(i, float(rate), {"m": 0.5}), clip_id="drive", sample_id=f"drive@{30_000_000 * i}#0")
        for i, rate in enumerate(RATES_DEGPS)
    ]

    slope = summarise(drives).strata["all"].bias["m"]["heading"][6.4]

    assert slope is not None
    assert (slope.clips, slope.low) == (21, pytest.approx(0.5))


def test_verdicts_are_of_strata_that_the_turn_did_not_choose(summary: EvalSummary) -> None:
    judged = {name: dict(stratum.verdicts) for name, stratum in summary.strata.items() if stratum.verdicts}

    assert set(judged) == {"all", STRAIGHT_HISTORY}
    assert {label: verdict.answer for label, verdict in judged["all"].items()} == {
        "before": "biased",
        "after": "takes the turn",
    }
    for name, stratum in summary.strata.items():
        for by_quantity in stratum.bias.values():
            for slope in by_quantity["heading"].values():
                assert slope is None or (slope.calibration is None) == (name in TURN_STRATA)
    biased = summary.strata["all"].bias["before"]["heading"][6.4]
    assert biased is not None
    assert biased.calibration is not None
    assert (biased.calibration.low > 4.0, biased.r2) == (True, 1.0)


def test_few_clips_and_a_missing_late_curve_are_named() -> None:
    straight = [replace(result(i, 0.0, {"after": 1.0}), clip_id=f"clip-{i % 3}") for i in range(30)]

    found = summarise(straight)

    assert [text.split(":")[0] for text in found.warnings] == ["curve after t0"], (
        "straight road has no slope to warn of"
    )
    assert found.split_by == "blocks of 60 s"
    assert found.strata["all"].bias["after"]["heading"][6.4] is None, "straight road has no slope"


def test_json_is_plain_and_holds_the_numbers(summary: EvalSummary) -> None:
    plain = json.loads(json.dumps(summary.to_json(), allow_nan=False))

    assert (plain["models"], plain["baselines"]) == (["before", "after"], ["constant velocity", "constant turn rate"])
    assert (plain["reference"], plain["paths"], plain["samples"]) == ("before", 2, 41)
    everything = plain["strata"]["all"]
    assert (
        everything["metrics"]["after"]["min_ade/by_t=3.0"] == summary.strata["all"].metrics["after"]["min_ade/by_t=3.0"]
    )
    assert set(everything["bias"]["after"]["lateral"]) == {"2.0", "4.0", "6.4"}
    assert everything["bias"]["before"]["heading"]["6.4"]["n"] == 41
    assert {"slope", "low", "high", "intercept", "n", "clips", "r2"} < set(
        everything["bias"]["before"]["heading"]["6.4"]
    )
    assert everything["verdicts"]["before"]["answer"] == "biased"
    assert plain["strata"]["fast"]["verdicts"] == {}
    assert plain["strata"]["stopped"]["samples"] == 0


def test_one_model_has_no_differences() -> None:
    found = summarise([result(i, float(rate), {"only": 1.0}) for i, rate in enumerate(RATES_DEGPS[::4])])
    assert found.strata["all"].differences == found.strata["all"].bias_differences == {}
