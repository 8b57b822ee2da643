"""The best of several validations."""

import math

from alpacache.training.best import BestValidation


def test_the_least_finite_value_is_best_and_later_ones_are_counted():
    best = BestValidation(by="loss")
    values = [math.nan, 0.5, math.inf, 0.5, 0.4, math.nan]
    assert [best.update(step, value, "loss") for step, value in enumerate(values)] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    assert best == BestValidation(step=4, value=0.4, by="loss", since=1)


def test_values_of_another_measure_are_not_compared():
    best = BestValidation(step=2, value=0.1, by="loss", since=3)
    assert not best.update(3, math.nan, "min_ade")
    assert (best.value, best.by, best.since) == (0.1, "loss", 4)
    assert best.update(4, 2.5, "min_ade")
    assert best == BestValidation(step=4, value=2.5, by="min_ade")
