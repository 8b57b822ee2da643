"""The learning rate, the best of several validations, and how many skipped steps end a run."""

import math
from itertools import pairwise

import pytest
import torch

from alpacache.errors import NonFiniteError, UsageError
from alpacache.training.schedule import FORMER_SCHEDULE, BestValidation, LearningRate, SkippedSteps


def test_learning_rate_warms_up_and_ends_at_its_floor():
    rate = LearningRate(peak=1e-4, final=1e-6, warmup=100, total=300)
    rates = [rate(step) for step in range(300)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[99] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-6)
    assert all(later < earlier for earlier, later in pairwise(rates[99:]))


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 40), (1, 2), (20, 200), (100, 3000), (199, 200)])
@pytest.mark.parametrize("final", [0.0, 1e-6, 1e-4])
def test_each_step_has_the_rate_of_the_public_recipe(warmup, total, final):
    """Its trainer takes `cosine_warmup_with_min_lr` of transformers."""
    from torch.optim import AdamW
    from transformers import get_scheduler

    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    settings = {"num_warmup_steps": warmup, "num_training_steps": total, "scheduler_specific_kwargs": {"min_lr": final}}
    theirs = get_scheduler("cosine_warmup_with_min_lr", optimizer, **settings)
    ours = LearningRate(peak=1e-4, final=final, warmup=warmup, total=total)
    for step in range(total):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-20), step
        optimizer.step()
        theirs.step()


def test_runs_of_earlier_versions_keep_their_schedule():
    rate = LearningRate(peak=1e-4, final=1e-6, warmup=100, total=300, schedule=FORMER_SCHEDULE)
    rates = [rate(step) for step in range(300)]
    assert rates[99] == rates[100] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-6)
    assert rates[150] == pytest.approx(1e-6 + 99e-6 * 0.5 * (1.0 + math.cos(math.pi * 50 / 199)), rel=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(5000, 100), (200, 20), (9, 0)])
def test_warm_up_is_a_tenth_of_a_short_run(total, warmup):
    assert LearningRate(peak=1e-4, final=0.0, warmup=None, total=total).warmup == warmup


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(UsageError, match="warmup is 6 of 6 steps"):
        LearningRate(peak=1e-4, final=0.0, warmup=6, total=6)


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


def test_three_in_a_row_end_a_run():
    skipped = SkippedSteps()
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (math.nan, 1.0), (1.0, math.nan)):
        assert skipped.count(loss, norm) == (not math.isfinite(loss + norm))
        skipped.check_streak(1, ["a"])
    assert skipped.count(-math.inf, 1.0)
    with pytest.raises(NonFiniteError, match="3 steps in a row, last at step 6 with a, b; none was applied"):
        skipped.check_streak(6, ["a", "b"])


@pytest.mark.parametrize(
    ("losses", "fails"),
    [
        ([], False),
        ([1.0, math.nan], False),
        ([math.nan], True),
        ([1.0, math.nan, math.nan], True),
        ([1.0] * 9 + [math.nan], False),
        ([1.0] * 9 + [math.nan] * 2, True),  # its last update may have broken it
    ],
)
def test_a_run_that_skipped_most_of_its_steps_or_the_last_ones_has_failed(losses, fails):
    skipped = SkippedSteps()
    for loss in losses:
        skipped.count(loss, 1.0)
    if not fails:
        skipped.check_learned("run", len(losses))
        return
    bad = sum(map(math.isnan, losses))
    with pytest.raises(NonFiniteError, match=f"in {bad} of {len(losses)} steps.*; these were not applied"):
        skipped.check_learned("run", len(losses))
