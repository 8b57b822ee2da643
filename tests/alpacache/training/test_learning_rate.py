"""Warm-up and cosine."""

from itertools import pairwise

import pytest

from alpacache.errors import UsageError
from alpacache.training.learning_rate import LearningRate


def test_learning_rate_warms_up_and_ends_at_its_floor():
    rate = LearningRate.of(peak=1e-4, final=1e-6, warmup=100, total=300)
    rates = [rate(step) for step in range(300)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[99] == rates[100] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-6)
    assert all(later < earlier for earlier, later in pairwise(rates[100:]))


@pytest.mark.parametrize(("total", "warmup"), [(5000, 100), (200, 20), (9, 0)])
def test_warm_up_is_a_tenth_of_a_short_run(total, warmup):
    assert LearningRate.of(peak=1e-4, final=0.0, warmup=None, total=total).warmup == warmup


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(UsageError, match="warmup is 6 of 6 steps"):
        LearningRate.of(peak=1e-4, final=0.0, warmup=6, total=6)
