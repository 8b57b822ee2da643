"""Who leaves the straight corridor, and whether the turn is among the paths."""

import numpy as np
import pytest

from alpacache.metrics.corridor import (
    Leaving,
    leaving,
    recall_difference,
    summarise_corridor,
)


def ending(*lateral_m):
    """Paths that end so far to the left."""
    paths = np.zeros((len(lateral_m), 64, 3))
    paths[:, :, 1] = np.asarray(lateral_m)[:, None] * np.linspace(0, 1, 64)
    return paths


def test_a_path_counts_only_on_the_side_of_the_driven_one():
    found = leaving(ending(3.0, -3.0, 1.9, 0.0), ending(5.0)[0])
    spread_m, split = pytest.approx(np.std([3, -3, 1.9, 0])), pytest.approx(16.1008 / 20.7075, rel=1e-4)
    assert found == Leaving(truth=True, share=0.25, contained=False, spread_m=spread_m, split=split)
    assert leaving(ending(3.0, -3.0, 1.9, 0.0), ending(-2.5)[0]).share == 0.25
    assert leaving(ending(3.0, -3.0, 1.9, 0.0), ending(2.0)[0]) == Leaving(
        truth=False, share=0.5, contained=True, spread_m=found.spread_m, split=found.split
    )


def test_two_bundles_hold_the_spread_and_one_bundle_does_not():
    assert leaving(ending(0.0, 0.1, 5.0, 5.1, 0.0, 5.0), ending(5.0)[0]).split > 0.99
    assert leaving(ending(0.0, 0.0, 0.0, 0.0, 0.0, 5.0), ending(5.0)[0]).split == pytest.approx(1.0)
    assert leaving(ending(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), ending(5.0)[0]).split == pytest.approx(13.5 / 17.5)
    assert leaving(ending(*[3.0] * 6), ending(5.0)[0]).split == 0.0
    assert leaving(ending(0.0, 5.0, 5.0), ending(5.0)[0]).split is None, "any three fall into two bundles"
    normal = np.random.default_rng(0).normal(size=(400, 6))
    found = summarise_corridor(
        [leaving(ending(*each), ending(0.0)[0]) for each in normal], [str(i) for i in range(400)]
    )
    assert found.split is not None
    assert found.split.low < 0.79 < found.split.high < 0.82


def test_an_end_between_the_outermost_paths_is_among_them():
    assert leaving(ending(1.0, 6.0), ending(5.0)[0]).contained
    assert not leaving(ending(1.0, 4.9), ending(5.0)[0]).contained
    assert not leaving(ending(5.1, 6.0), ending(5.0)[0]).contained


def one(truth, share, contained=True):
    return Leaving(truth=truth, share=share, contained=contained, spread_m=1.0)


def test_recall_is_over_samples_that_leave_and_false_over_those_that_stay():
    samples = [one(True, 1.0), one(True, 0.5, contained=False), one(False, 0.25), one(False, 0.0)] * 10
    found = summarise_corridor(samples, [f"clip{i}" for i in range(40)])
    assert (found.leaving, found.staying) == (20, 20)
    assert (found.recall, found.false_leaving) == (0.75, 0.125)
    assert (found.contained, found.contained_leaving) == (0.75, 0.5)
    assert found.recall_interval is not None
    assert 0.5 < found.recall_interval.low < 0.75 < found.recall_interval.high < 1.0
    assert (found.recall_interval.n, found.recall_interval.clips) == (20, 20)


def test_without_samples_that_leave_there_is_no_recall():
    found = summarise_corridor([one(False, 0.0)], ["a"])
    assert (found.recall, found.recall_interval, found.contained_leaving) == (None, None, None)
    assert recall_difference([one(False, 0.0)], [one(False, 1.0)], ["a"]) is None


def test_the_difference_is_paired():
    before = [one(True, 0.1 * i) for i in range(10)] + [one(False, 1.0)]
    after = [one(True, 0.1 * i + 0.3) for i in range(10)] + [one(False, 0.0)]
    change = recall_difference(before, after, [f"clip{i}" for i in range(11)])
    assert change is not None
    assert (change.estimate, change.low, change.high) == pytest.approx((0.3, 0.3, 0.3))
    assert change.n == 10
