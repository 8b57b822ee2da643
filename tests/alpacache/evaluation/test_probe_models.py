"""Probes find what was planted, find nothing in noise, and never see a test sample's clip."""

import numpy as np
import pytest

from alpacache.evaluation.probe_models import (
    FOLDS,
    PROBES,
    SHARES,
    cross_validate,
    group_folds,
    shuffled_within,
)
from alpacache.metrics.bootstrap import r_squared

N, CLIPS = 300, [f"clip-{index // 2}" for index in range(300)]
RNG = np.random.default_rng(0)
HISTORY = RNG.normal(size=(N, 62))
HIDDEN = RNG.normal(size=(N, 6))
FEATURES = (HIDDEN @ RNG.normal(size=(6, 512)) + 2 * RNG.normal(size=(N, 512))).astype(np.float32)
NOISE = RNG.normal(size=N)
TARGETS = np.stack(
    [HIDDEN[:, 0] + HISTORY[:, 0] + 0.3 * NOISE, HIDDEN[:, 0] * HIDDEN[:, 1], RNG.normal(size=N)], axis=-1
)
LINE, BEND, NOTHING = range(3)


def run(features, targets=TARGETS, clips=CLIPS, history=HISTORY, probes=PROBES, seed=0):
    folds = group_folds(clips, FOLDS, seed=seed)
    return list(cross_validate(probes, features, history, targets, clips, folds, seed=seed))[-1]


@pytest.fixture(scope="module")
def planted():
    return run(FEATURES)


def r2(predictions, inputs, target, targets=TARGETS, clips=CLIPS):
    pred = getattr(predictions, inputs)[:, target]
    return r_squared(targets[:, target], pred, predictions.mean[:, target], clips)


@pytest.mark.system
def test_planted_lines_are_found_by_both_probes(planted):
    for probe in PROBES:
        assert r2(planted[probe], "features", LINE).low > 0.35
        assert r2(planted[probe], "both", LINE).low > 0.87
        assert 0.1 < r2(planted[probe], "history", LINE).estimate < 0.5


@pytest.mark.system
def test_planted_bends_are_found_by_the_mlp_alone(planted):
    assert r2(planted["ridge"], "features", BEND).high < 0.05
    assert r2(planted["mlp"], "features", BEND).low > 0.6


def test_noise_explains_nothing(planted):
    for probe in PROBES:
        for inputs in ("history", "features", "both"):
            assert r2(planted[probe], inputs, NOTHING).low < 0.01
            assert r2(planted[probe], inputs, NOTHING).estimate > -0.1


@pytest.mark.system
def test_features_of_other_samples_explain_nothing_and_take_nothing_from_history(planted):
    order = shuffled_within(group_folds(CLIPS, FOLDS, seed=0), seed=0)
    found = run(FEATURES[order])
    for probe in PROBES:
        assert r2(found[probe], "features", LINE).low < 0.02
        assert r2(found[probe], "features", BEND).low < 0.02
        history, both = (r2(found[probe], inputs, LINE).estimate for inputs in ("history", "both"))
        assert both == pytest.approx(history, abs=0.05)
        assert history == pytest.approx(r2(planted[probe], "history", LINE).estimate)


@pytest.mark.system
def test_recognising_the_clip_gains_nothing():
    """Features and targets are constant within clips of four: a probe that has seen a clip knows it by heart."""
    rng = np.random.default_rng(1)
    clips = [f"clip-{index // 4}" for index in range(N)]
    constant = rng.normal(size=(75, 256)).repeat(4, axis=0).astype(np.float32)
    targets = rng.normal(size=(75, 1)).repeat(4, axis=0)
    found = run(constant, targets, clips)
    for probe in PROBES:
        assert r2(found[probe], "features", 0, targets, clips).low < 0
        assert r2(found[probe], "features", 0, targets, clips).estimate < 0.1
    leaky = run(constant, targets, [f"clip-{index}" for index in range(N)], probes=("ridge",))
    assert r2(leaky["ridge"], "features", 0, targets, clips).estimate > 0.9


def test_folds_hold_whole_clips_and_every_row_once():
    clips = [f"clip-{index % 17}" for index in range(103)]
    folds = group_folds(clips, FOLDS, seed=3)
    assert sorted(np.concatenate(folds)) == list(range(103))
    members = [{clips[row] for row in rows} for rows in folds]
    assert sum(map(len, members)) == len(set.union(*members)) == 17
    assert max(map(len, folds)) - min(map(len, folds)) <= 7
    assert [rows.tolist() for rows in folds] == [rows.tolist() for rows in group_folds(clips, FOLDS, seed=3)]
    assert [rows.tolist() for rows in folds] != [rows.tolist() for rows in group_folds(clips, FOLDS, seed=4)]
    with pytest.raises(ValueError, match="4 clips cannot fill 5 folds"):
        group_folds(["a", "b", "c", "d"], 5, seed=0)


def test_the_control_stays_within_its_fold():
    folds = group_folds(CLIPS, FOLDS, seed=0)
    order = shuffled_within(folds, seed=0)
    assert sorted(order) == list(range(N))
    for rows in folds:
        assert set(order[rows]) == set(rows)
    assert (order != np.arange(N)).mean() > 0.9


@pytest.mark.ci
def test_same_seed_same_predictions_whatever_the_test_rows_hold(planted):
    assert not np.array_equal(run(FEATURES, seed=1)["mlp"].both, planted["mlp"].both)
    # What a fold's samples hold must not reach the probe that is judged on them.
    fold = group_folds(CLIPS, FOLDS, seed=0)[2]
    changed = TARGETS.copy()
    changed[fold] += 100.0
    other = run(FEATURES, changed)
    for probe in PROBES:
        assert np.array_equal(other[probe].both[fold], planted[probe].both[fold])


def test_ridge_equals_its_closed_form():
    from alpacache.evaluation.probe_models import PENALTIES, _ridge_paths

    rng = np.random.default_rng(2)
    x, past, y = rng.normal(size=(40, 7)), rng.normal(size=(40, 3)), rng.normal(size=(30, 2))
    train, test = np.arange(30), np.arange(30, 40)
    paths = _ridge_paths(x, [past], y, train, test)
    for share, name in ((0, past), (len(SHARES) - 1, x)):
        z = (name - name[train].mean(0)) / name[train].std(0) / np.sqrt(name.shape[1])
        for place, penalty in enumerate(PENALTIES):
            a = z[train]
            weights = np.linalg.solve(a.T @ a + penalty * np.eye(z.shape[1]), a.T @ (y - y.mean(0)))
            assert np.allclose(paths[share, place], z[test] @ weights + y.mean(0), atol=1e-8)


def test_without_history_features_are_read_alike(planted):
    alone = run(FEATURES, history=None, probes=("ridge",))["ridge"]
    assert np.array_equal(alone.features, planted["ridge"].features)
    assert alone.history is None
    assert alone.both is None
