"""The global order: which sample is at which place of a run, as a function of the seed alone.

A place is found without replaying what was before it, so a resumed run goes on in the order of one that was not
stopped. An epoch has as many places as there are samples. The plain order is one permutation an epoch. The balanced one
gives the turn strata equal shares instead: recorded driving is straight nine times out of ten, and a model that learns
from it as it comes learns to go straight. A rare stratum then comes several times an epoch and a common one in part,
each in permutations of its own that go on from epoch to epoch, so that no sample comes again before all others have.
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from alpacache.strata import Turn

Order = NDArray[np.int64]

_BLOCK = 4096
"""Places of a stratum that one generator orders, at least: a stratum of two samples must not need one a pair."""


class GlobalOrder:
    """Position in the run -> sample index; one epoch is kept."""

    def __init__(self, seed: int, count: int, *, turns: Sequence[Turn] | None = None) -> None:
        """`turns`: each sample's stratum, for the balanced order; without them it is the plain one."""
        if turns is not None and len(turns) != count:
            raise ValueError(f"{count} samples need as many strata, got {len(turns)}.")
        self.seed, self.count = seed, count
        self._strata = None if turns is None else members(turns)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._of(epoch)
        return int(self._order[place])

    def _of(self, epoch: int) -> Order:
        if self._strata is None:
            return epoch_order(self.seed, epoch, self.count)
        return balanced_epoch(self.seed, epoch, self._strata)


def epoch_order(seed: int, epoch: int, count: int) -> Order:
    """The global order of `count` samples in one epoch, from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(count)


def members(turns: Sequence[Turn]) -> list[Order]:
    """Sample indices of each stratum that has any, straight first."""
    found = [np.flatnonzero([turn == stratum for turn in turns]) for stratum in get_args(Turn)]
    return [stratum for stratum in found if len(stratum)]


def balanced_epoch(seed: int, epoch: int, strata: Sequence[Order]) -> Order:
    """One epoch in which each stratum has the same share, spread evenly, from (seed, epoch) and the strata alone."""
    count = sum(map(len, strata))
    picks, places = [], []
    for number, stratum in enumerate(strata):
        # All strata's shares sum to the epoch, and over epochs none gets ahead by more than one place.
        first, end = ((done * count + number) // len(strata) for done in (epoch, epoch + 1))
        picks.append(stratum[_walk(seed, number, len(stratum), first, end)])
        jitter = _generator(seed, 0, number, epoch).random(end - first)
        places.append((np.arange(end - first) + jitter) / max(1, end - first))
    return np.concatenate(picks)[np.argsort(np.concatenate(places), kind="stable")]


def _walk(seed: int, stratum: int, size: int, first: int, end: int) -> Order:
    """Places `first` to `end` of a stratum's endless row of permutations."""
    rounds = -(-_BLOCK // size)
    block = rounds * size
    blocks = [
        _generator(seed, 1, stratum, number).permuted(np.tile(np.arange(size), (rounds, 1)), axis=1).ravel()
        for number in range(first // block, -(-end // block))
    ]
    skipped = first // block * block
    return np.concatenate([np.empty(0, np.int64), *blocks])[first - skipped : end - skipped]


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
