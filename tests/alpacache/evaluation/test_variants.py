"""Verdicts on planted losses, and weights that count as repeats do."""

import re
from dataclasses import replace

import numpy as np
import pytest

from alpacache.driving.strata import classify
from alpacache.evaluation.judging import SampleResult, judge, judge_baselines, judge_variant
from alpacache.evaluation.summary import summarise

HISTORY_XYZ = np.stack([np.arange(-15.0, 1.0), np.zeros(16), np.zeros(16)], axis=-1)
HISTORY_ROT = np.broadcast_to(np.eye(3), (16, 3, 3))
RATES_DEGPS = np.linspace(-8.0, 8.0, 41)


def arc(turn_rate_degps):
    """64 poses at 10 m/s on an arc that begins at t0."""
    yaw = np.deg2rad(turn_rate_degps) * 0.1 * np.arange(1, 65)
    rot = np.zeros((64, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0], rot[:, 0, 1], rot[:, 2, 2] = np.sin(yaw), -np.sin(yaw), 1.0
    return np.cumsum(np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], axis=-1), axis=0), rot


def arcs(turn_rate_degps, paths=4):
    each = [arc(turn_rate_degps + sway) for sway in np.linspace(-0.5, 0.5, paths)]
    return np.stack([one[0] for one in each]), np.stack([one[1] for one in each])


def result(number, turn_rate_degps, *, losses, share=0.9):
    """A sample whose model turns a share of the true turn, and not at all with what is not its own."""
    xyz, rot = arc(turn_rate_degps)
    model = judge(*arcs(share * turn_rate_degps), xyz, rot)
    controls = {
        control: judge_variant(*arcs(0.0), xyz, HISTORY_ROT, loss=loss)
        for control, loss in losses.items()
        if control != "honest"
    }
    by_steps = {
        steps: judge_variant(*arcs(other * turn_rate_degps), xyz, HISTORY_ROT)
        for steps, other in ((10, share), (2, 0.4))
    }
    return SampleResult(
        sample_id=f"clip-{number}@5100000#0",
        clip_id=f"clip-{number}",
        truth_xyz=xyz,
        truth_rot=rot,
        history_xyz=HISTORY_XYZ,
        history_rot=HISTORY_ROT,
        front_jpeg=None,
        strata=classify(HISTORY_XYZ, HISTORY_ROT, xyz, rot),
        models={"m": replace(model, loss=losses["honest"], controls=controls, by_steps=by_steps)}
        | judge_baselines(HISTORY_XYZ, HISTORY_ROT, xyz, rot),
    )


def told(rise, *, sway=0.0, clips=41, control="shuffled"):
    """The summary where the loss rises by this, give or take `sway` from clip to clip."""
    swung = sway * np.where(np.arange(clips) % 2, 1.0, -1.0)
    rows = [
        result(i, float(rate), losses={"honest": 0.4, control: 0.4 * (1 + rise + swing)})
        for i, (rate, swing) in enumerate(zip(RATES_DEGPS, swung, strict=False))
    ]
    return summarise(rows).controls["all"]["m"][control]


@pytest.mark.system
@pytest.mark.parametrize(
    ("planted", "answer", "words"),
    [
        (
            {"rise": 0.03},
            "hardly looks",
            r"rises by 3 % \[3 %, 3 %\] with another clip's .*: it hardly looks",
        ),
        ({"rise": -0.02}, "hardly looks", "falls by 2 % .* it hardly looks"),
        ({"rise": 0.2}, "looks a little", "rises by 20 % .* it looks a little"),
        ({"rise": 1.86}, "looks", r"rises by 186 % .* it looks$"),
        ({"rise": 0.04, "sway": 1.0}, "cannot tell", "the interval does not decide"),
        ({"rise": 2.0, "clips": 6}, "cannot tell", r"rises by 200 % .*; 6 blocks of 60 s give no interval, 10 may"),
        (
            {"rise": 0.02, "control": "none"},
            "hardly needs it",
            "2 % .* with no prefix at all: it hardly needs it",
        ),
        ({"rise": 0.9, "control": "none"}, "needs it", "it needs it$"),
    ],
)
def test_the_verdict_is_that_of_the_loss_and_its_interval(planted, answer, words):
    found = told(**planted)
    assert found.answer == answer
    assert re.search(words, found.sentence), found.sentence
    assert found.rise.estimate == pytest.approx(planted["rise"], abs=0.03)
    assert (found.honest_loss, found.loss) == pytest.approx((0.4, 0.4 * (1 + found.rise.estimate)))


def test_errors_and_slopes_stand_beside_the_honest_ones():
    rows = [result(i, float(rate), losses={"honest": 0.4, "shuffled": 0.8}) for i, rate in enumerate(RATES_DEGPS)]
    summary = summarise(rows)
    found = summary.controls["all"]["m"]["shuffled"]
    assert (found.honest_slope.slope, found.slope.slope) == pytest.approx((0.9, 0.0), abs=1e-9)
    assert found.honest_min_ade == summary.strata["all"].metrics["m"]["min_ade"] < found.min_ade
    steps = summary.flow_steps["m"]
    assert steps[10].slope.slope == pytest.approx(0.9)
    assert steps[2].slope.slope == pytest.approx(0.4)
    assert steps[10].change.estimate == 0.0
    assert steps[2].change.estimate == pytest.approx(steps[2].metrics["min_ade"] - steps[10].metrics["min_ade"])


def numbers(summary):
    """Every estimate of a summary, by its path."""
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, part in value.items():
                walk(part, (*path, key))
        elif isinstance(value, float):
            found[path] = value

    document = summary.to_json()
    walk({key: document[key] for key in ("strata", "controls", "flow_steps")}, ())
    return {path: value for path, value in found.items() if path[-1] not in ("low", "high", "effective_clips")}


@pytest.mark.system
def test_a_weight_of_three_is_a_sample_that_is_there_three_times():
    losses = np.linspace(0.2, 0.9, len(RATES_DEGPS))
    rows = [
        result(i, float(rate), losses={"honest": 0.3, "shuffled": loss}, share=0.3 + 0.01 * i)
        for i, (rate, loss) in enumerate(zip(RATES_DEGPS, losses, strict=True))
    ]
    weighted = [replace(one, weight=6.0 if i % 3 == 0 else 2.0) for i, one in enumerate(rows)]
    repeated = [one for i, one in enumerate(rows) for _ in range(3 if i % 3 == 0 else 1)]
    found, expected = (numbers(summarise(each)) for each in (weighted, repeated))
    assert found.keys() <= expected.keys()  # of few samples there is no slope, however often they are repeated
    differing = [path for path in found if found[path] != pytest.approx(expected[path], rel=1e-3, abs=1e-9)]
    assert not differing
    assert summarise(weighted).weighted
    assert not summarise(repeated).weighted
    assert summarise(weighted).samples == 41
    plain = numbers(summarise(rows))
    moved = [path for path in found if path[:2] == ("strata", "all") and found[path] != pytest.approx(plain[path])]
    assert len(moved) > 30
