"""The learning rate of each step: linear warm-up, then a cosine."""

import math
from dataclasses import dataclass

from alpacache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """Rises linearly from `peak / warmup` to `peak`, then falls along a cosine to `final` at the last step."""

    peak: float
    final: float
    warmup: int
    """Steps."""
    total: int
    """Steps of the whole run."""

    @classmethod
    def of(cls, *, peak: float, final: float, warmup: int | None, total: int) -> "LearningRate":
        """`warmup` None: 100 steps, or a tenth of the run. Raises `UsageError` where `peak` would never be reached."""
        warmup = min(100, total // 10) if warmup is None else warmup
        if warmup >= total:
            raise UsageError(f"warmup is {warmup} of {total} steps; expected fewer, so that lr is ever reached.")
        return cls(peak=peak, final=final, warmup=warmup, total=total)

    def __call__(self, step: int) -> float:
        """The rate after `step` steps."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.total - 1 - self.warmup)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
