"""Skipped steps: how many end a run."""

import math

import pytest

from alpacache.errors import NonFiniteError
from alpacache.training.non_finite import SkippedSteps


def test_three_in_a_row_end_a_run():
    skipped = SkippedSteps()
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (math.nan, 1.0), (1.0, math.nan)):
        assert skipped.count(loss, norm) == (not math.isfinite(loss + norm))
        skipped.check_streak(1, ["a"])
    assert skipped.count(-math.inf, 1.0)
    with pytest.raises(NonFiniteError, match="3 steps in a row, last at step 6 with a, b; none was applied"):
        skipped.check_streak(6, ["a", "b"])


@pytest.mark.parametrize(
    ("losses", "fails"), [([], False), ([1.0, math.nan], False), ([math.nan], True), ([1.0, math.nan, math.nan], True)]
)
def test_a_run_that_skipped_most_of_its_steps_has_failed(losses, fails):
    skipped = SkippedSteps()
    for loss in losses:
        skipped.count(loss, 1.0)
    if not fails:
        skipped.check_learned("run")
        return
    bad = sum(map(math.isnan, losses))
    with pytest.raises(NonFiniteError, match=f"in {bad} of {len(losses)} steps; these were not applied"):
        skipped.check_learned("run")
