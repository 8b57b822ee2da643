"""The ego history as tokens: the bins that the displacements between poses fall into."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryTokens:
    """How a checkpoint writes the ego history into its prompt."""

    first_id: int
    """Token id of the first bin."""
    bins: int
    low: tuple[float, ...]
    """Lower edge (m) of x, y and z; what lies below is clamped."""
    high: tuple[float, ...]

    def encode(self, history_xyz: NDArray[np.float32]) -> NDArray[np.int64]:
        """Ids `[48]` of the 16 displacements of the history `[16, 3]` (m, ego frame at t0), x, y, z for each step.

        The first displacement is from zero. Bins are rounded half to even.
        """
        steps = np.diff(history_xyz.astype(np.float32), axis=0, prepend=np.zeros((1, 3), np.float32))
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        bins = np.round((steps - low) / (high - low) * np.float32(self.bins - 1))
        ids: NDArray[np.int64] = np.clip(bins, 0, self.bins - 1).astype(np.int64).reshape(-1)
        return ids + self.first_id
