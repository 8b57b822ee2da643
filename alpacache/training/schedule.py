"""The learning rate of each step, and what ends a run early: validations without a new best, steps without a result."""

import math
from dataclasses import dataclass

from alpacache.errors import NonFiniteError, UsageError

SCHEDULE, FORMER_SCHEDULE = "recipe", "late cosine"
"""Names of the schedule in a run's record; runs of earlier versions have none."""
_LIMIT = 3
"""Skipped steps in a row that end a run."""


def default_warmup(total: int) -> int:
    """100 steps, or a tenth of the run if that is less."""
    return min(100, total // 10)


class LearningRate:
    """Rises linearly from `peak / warmup` to `peak`, then falls along a cosine to `final` at the last step.

    Step by step the public recipe's schedule, transformers' `cosine_warmup_with_min_lr`.
    """

    def __init__(self, *, peak: float, final: float, warmup: int | None, total: int, schedule: str = SCHEDULE) -> None:
        """`warmup` None: `default_warmup`. Raises `UsageError` where `peak` would never be reached.

        `schedule`: as a run records it. Any other than `SCHEDULE` is that of earlier versions, whose cosine began a
        step late and so had `peak` twice; runs that began with it end with it.
        """
        self.peak, self.final, self.total = peak, final, total
        self._late = schedule != SCHEDULE
        self.warmup = default_warmup(total) if warmup is None else warmup
        if self.warmup >= total:
            raise UsageError(f"warmup is {self.warmup} of {total} steps; expected fewer, so that lr is ever reached.")

    def __call__(self, step: int) -> float:
        """The rate after `step` steps."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        after, steps = step + 1 - self.warmup, self.total - self.warmup
        share = (after - self._late) / max(1, steps - self._late)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


@dataclass(slots=True, kw_only=True)
class BestValidation:
    """The best validation so far, as checkpoints record it; none at first."""

    step: int | None = None
    value: float | None = None
    """Finite."""
    by: str
    """Kind of `value`: `loss` or `min_ade`."""
    since: int = 0
    """Validations after it."""

    def update(self, step: int, value: float, by: str) -> bool:
        """Count a validation, and return whether it is the best. One that is not finite never is."""
        comparable = self.value is not None and self.by == by
        improved = math.isfinite(value) and (self.value is None or not comparable or value < self.value)
        if improved:
            self.step, self.value, self.by, self.since = step, value, by, 0
        else:
            self.since += 1
        return improved


@dataclass(slots=True)
class SkippedSteps:
    """The steps of a run that were not applied, as checkpoints record them."""

    total: int = 0
    in_a_row: int = 0
    """Skipped steps at the end of what was done so far."""

    def count(self, loss: float, norm: float) -> bool:
        """Count a step, and return whether it was skipped."""
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return skipped

    def check_streak(self, number: int, sample_ids: list[str]) -> None:
        """Raise `NonFiniteError` after a few skipped steps in a row, the last of which had these samples."""
        if self.in_a_row >= _LIMIT:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row, last at step {number} "
                f"with {', '.join(sample_ids)}; none was applied. Lower --lr, or extract those samples again."
            )

    def check_learned(self, run: str, steps: int) -> None:
        """Raise `NonFiniteError` where most of a run's steps were skipped, or its last ones, as after a bad update."""
        if self.total * 2 > steps or self.in_a_row > 1:
            last = f", the last {self.in_a_row} of them" if self.in_a_row > 1 else ""
            raise NonFiniteError(
                f"loss or gradient was not finite in {self.total} of {steps} steps{last}; these were not applied. "
                f"What {run} holds has learnt next to nothing or is broken; its metrics.jsonl names the samples of "
                "those steps. Extract them again, or train with another --out and a lower --lr or a longer --warmup."
            )
