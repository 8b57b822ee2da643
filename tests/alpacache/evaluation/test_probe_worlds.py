"""Worlds in which it is known what the features hold: the right verdict, or that these samples cannot tell."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from alpacache.driving.strata import LATE_CURVE
from alpacache.evaluation.probe import ALL, probe_data
from alpacache.evaluation.probe_features import CURVATURE, HEADING, SKETCH, SPEED, ProbeData
from alpacache.evaluation.probe_models import FOLDS, attended, cross_validate, group_folds

pytestmark = pytest.mark.ci


def world(
    n=300,
    late=210,
    *,
    seed=3,
    width=64,
    positions=60,
    in_history=None,
    in_features=None,
    in_token=None,
    bent=None,
    moves=False,
):
    """Samples of as many clips; turns that begin after t0 in the first `late`.

    Args:
        in_history: loudness of the target in the history.
        in_features: loudness in the pooled vectors, along a random direction; `bent`: as the product of two signs.
        in_token: loudness in one token, which `moves` from sample to sample or stands in one place.
    """
    rng = np.random.default_rng(seed)
    turn = np.where(rng.random(n) < 0.5, 1.0, -1.0) * rng.uniform(0.2, 0.9, n)
    curves = np.arange(n) < late
    target = np.where(curves, turn, rng.normal(0, 0.03, n))
    history = rng.normal(size=(n, 62))
    features = rng.normal(size=(n, 12)) @ rng.normal(size=(12, width)) / 4 + rng.normal(0, 0.5, (n, width))
    tokens = rng.standard_normal(size=(n, positions, SKETCH), dtype=np.float32)
    if in_history == "bent":  # a function of one column that no line follows, and the features repeat it
        angle = rng.uniform(-3, 3, n)
        history[:, 30] = angle
        target = 0.5 * np.sin(2 * angle) + rng.normal(0, 0.03, n)
        features += np.outer(np.sin(2 * angle), rng.normal(0, 0.5, width))
    elif in_history == "product":  # of two columns, neither of which tells anything alone
        target = np.where(curves, 0.4 * history[:, 5] * history[:, 20], 0.0) + rng.normal(0, 0.03, n)
        features += np.outer(history[:, 5] * history[:, 20], rng.normal(0, 0.5, width))
    elif in_history:
        history[:, 30] = target + rng.normal(0, 0.05, n)
        features += np.outer(history[:, 30], rng.normal(0, in_history, width))
    if in_features:
        features += np.outer(target, rng.normal(0, in_features, width))
    if bent:
        sign = np.where(rng.random(n) < 0.5, 1.0, -1.0)
        for part in (sign, sign * np.sign(target), np.abs(target)):
            features += np.outer(part, rng.normal(0, bent, width))
    if in_token:
        places = rng.integers(positions, size=n) if moves else positions // 3
        tokens[np.arange(n), places] += np.outer(target, rng.normal(size=SKETCH)) * in_token
    return ProbeData(
        clips=[f"clip-{number}" for number in range(n)],
        features={"hidden": features.astype(np.float32)},
        history=history,
        targets=np.stack([target, target / 40, rng.normal(size=n)], axis=1),
        late_curve=curves,
        tokens=tokens,
    )


def answers(data, seed=0):
    return {verdict.target: verdict for verdict in probe_data(data, seed=seed).verdicts}


@pytest.mark.parametrize(
    "planted",
    [
        {"in_features": 0.5},
        {"bent": 0.7},
        {"bent": 0.4, "width": 256},
        {"in_token": 3.0, "positions": 3000},
        {"in_token": 2.0, "positions": 3000, "moves": True},
    ],
    ids=["linear", "bent", "bent and faint", "one token of 3,000", "one token of 3,000, now here, now there"],
)
def test_what_is_planted_is_there(planted):
    found = answers(world(**planted))
    assert (found[HEADING].answer, found[HEADING].stratum) == ("there", LATE_CURVE)
    assert found[SPEED].answer != "there"


def test_nothing_is_not_there_and_the_sentence_says_what_was_looked_at():
    verdict = answers(world())[HEADING]
    assert verdict.answer == "not there"
    assert (
        "Looked at: the last token and the mean over tokens of hidden, products of their 24 strongest components, the "
        "2 most telling of 60 single tokens and what 128 queries find among these. A planted signal that explains 0.3 "
        "of what history leaves, 0.1 as loud as the vectors, the product of two parts 0.5 as loud, and as loud as one "
        "token, was found: a gain of ridge 0."
    ) in verdict.sentence


def test_a_token_whose_place_changes_is_found_where_no_single_place_tells():
    data = world(late=300, positions=400, in_token=2.0, moves=True)
    folds = group_folds(data.clips, FOLDS, seed=0)
    tokens = {"token": data.tokens, "attention": attended(data.tokens)}
    parts = cross_validate((), data.features["hidden"], data.history, data.targets, data.clips, folds, tokens=tokens)
    truth, found = data.targets[:, 0], list(parts)[-1]
    errors = {probe: ((truth - each.both[:, 0]) ** 2).sum() for probe, each in found.items()}
    worst = ((truth - found["token"].mean[:, 0]) ** 2).sum()
    assert errors["attention"] < 0.4 * worst
    assert errors["token"] > 0.9 * worst


def test_a_token_that_is_always_loud_does_not_hide_the_others():
    """As the first tokens of a prefix are, in every sample alike."""
    data = world(n=100, late=100, positions=50, in_token=2.0, moves=True)
    assert np.allclose(attended(data.tokens + 1000.0 * (np.arange(50) == 0)[:, None]), attended(data.tokens), atol=0.05)


def test_without_single_tokens_nothing_is_denied():
    verdict = answers(replace(world(), tokens=None))[HEADING]
    assert verdict.answer == "too few samples"
    assert (
        "Single tokens were not looked at, and one of them may hold what pooled vectors have lost" in verdict.sentence
    )


@pytest.mark.slow
def test_what_only_history_knows_is_not_sight():
    assert answers(world(in_history=0.5))[HEADING].answer != "there"


@pytest.mark.parametrize("kind", ["bent", "product"])
@pytest.mark.parametrize("late", [0, pytest.param(210, marks=pytest.mark.slow)])
def test_a_bend_of_the_history_is_not_sight(late, kind):
    found = answers(world(late=late, in_history=kind))
    assert found[HEADING].answer != "there"
    assert found[CURVATURE].answer != "there"
    if not late:
        assert found[HEADING].stratum == ALL
        assert "only samples that go straight until t0 and curve afterwards decide" in found[HEADING].sentence


@pytest.mark.parametrize(
    "loudness", [None, pytest.param(0.06, marks=pytest.mark.slow), pytest.param(0.5, marks=pytest.mark.slow)]
)
def test_few_late_curves_never_deny(loudness):
    """300 clips were read, but 35 are judged."""
    verdict = answers(world(late=35, in_features=loudness))[HEADING]
    assert verdict.answer == ("there" if loudness == 0.5 else "too few samples")


@pytest.mark.slow
@pytest.mark.parametrize("loudness", [0.06, 0.12])
def test_a_faint_signal_is_not_denied(loudness):
    assert answers(world(in_features=loudness, width=256))[HEADING].answer != "not there"


@pytest.mark.slow
def test_what_is_too_faint_to_be_found_when_planted_is_not_denied(monkeypatch):
    monkeypatch.setattr("alpacache.evaluation.probe.LOUDNESS", 0.005)
    verdict = answers(world())[HEADING]
    assert verdict.answer == "too few samples"
    assert "was not found by all, so nothing can be denied" in verdict.sentence


@pytest.mark.slow
def test_at_most_three_in_a_hundred_null_stores_hold_something():
    counts = Counter(
        verdict.answer
        for seed in range(200)
        for verdict in probe_data(world(60, 35, seed=1000 + seed, positions=40), seed=seed).verdicts
    )
    assert counts["there"] <= 0.03 * 600, counts
