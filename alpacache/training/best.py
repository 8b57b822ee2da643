"""The best validation of a run, and how long ago it was."""

import math
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class BestValidation:
    """The best validation so far, as checkpoints record it; none at first."""

    step: int | None = None
    value: float | None = None
    """Finite."""
    by: str
    """What `value` is: `loss` or `min_ade`."""
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
