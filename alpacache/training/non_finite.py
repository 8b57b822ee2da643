"""Steps that were skipped because their loss or gradient was not finite, and when they end a run."""

import math

from alpacache.errors import NonFiniteError

_LIMIT = 3
"""Skipped steps in a row that end a run."""


class SkippedSteps:
    """Counts the steps of one call of `train` and those of them that were not applied."""

    def __init__(self) -> None:
        self._steps = self._skipped = self._in_a_row = 0

    def count(self, loss: float, norm: float) -> bool:
        """Count a step, and return whether it was skipped."""
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        self._steps += 1
        self._skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        return skipped

    def check_streak(self, number: int, sample_ids: list[str]) -> None:
        """Raise `NonFiniteError` after a few skipped steps in a row, the last of which had these samples."""
        if self._in_a_row >= _LIMIT:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self._in_a_row} steps in a row, last at step {number} "
                f"with {', '.join(sample_ids)}; none was applied. Lower --lr, or check those samples with "
                "`alpacache verify --deep`."
            )

    def check_learned(self, run: str) -> None:
        """Raise `NonFiniteError` where most steps were skipped, too few in a row for `check_streak`."""
        if self._skipped * 2 > self._steps:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self._skipped} of {self._steps} steps; these were not applied. "
                f"What {run} holds has learnt next to nothing or is broken; its metrics.jsonl names the samples of "
                "those steps. Check them with `alpacache verify --deep`, or train with another --out and a lower --lr "
                "or a longer --warmup."
            )
