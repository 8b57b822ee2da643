"""Every random number of a run, as a function of what it is for.

Nothing is drawn from a shared stream: a sample's noise depends on the seed and its place in the global order alone, so
neither batch composition, nor worker count, nor a resume, nor the number of GPUs can change it.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.flow_matching import TimeSchedule, times_from_uniform


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key's text."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def noise(*key: object, draws: int, waypoints: int = 64) -> Tensor:
    """Standard normal noise `[draws, waypoints, 2]`, float32."""
    return torch.randn(draws, waypoints, 2, generator=generator("noise", *key))


def times(*key: object, draws: int, schedule: TimeSchedule) -> Tensor:
    """Training times `[draws]`, stratified over the draws: each falls into its own 1 / draws of the distribution."""
    u = torch.rand(draws, generator=generator("time", *key))
    return times_from_uniform((torch.arange(draws) + u) / draws, schedule=schedule)


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The global order of `count` samples in one epoch, from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(count)


class GlobalOrder:
    """Position in the run -> sample index: one permutation an epoch, back to back."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self.count)
        return int(self._order[place])
