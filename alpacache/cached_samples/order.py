"""The global order: which sample is at which place of a run, as a function of the seed alone.

A place is found without replaying what was before it, so a resumed run goes on in the order of one that was not
stopped. An epoch has as many places as there are samples. The plain order is one permutation an epoch. Otherwise groups
of samples have given shares of every epoch: stores by their weights (new data beside old, against forgetting), and turn
strata equally, because recorded driving is straight nine times out of ten, and a model that learns from it as it comes
learns to go straight. A small group then comes several times an epoch and a large one in part, each in permutations of
its own that go on from epoch to epoch, so that no sample comes again before all others of its group have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.strata import TURNS, Turn

Order = NDArray[np.int64]

_ROUNDING = 1e-6
"""Of shares, so that a third of 300 is 100."""
_BLOCK = 4096
"""Places of a stratum that one generator orders, at least: a stratum of two samples must not need one a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Samples that together have a share of every epoch."""

    members: Order
    """Sample indices."""
    share: float
    """Of an epoch; those of all groups add up to 1."""


class GlobalOrder:
    """Position in the run -> sample index; one epoch is kept. Any thread may ask."""

    def __init__(self, seed: int, count: int, *, groups: Sequence[Group] | None = None) -> None:
        """`groups`: who has which share; without them every sample comes once an epoch."""
        self.seed, self.count = seed, count
        self._groups = None if groups is None else list(groups)
        self._kept = (-1, np.empty(0, np.int64))

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        kept = self._kept  # epoch and order in one: another thread may be in the epoch before
        if epoch != kept[0]:
            kept = self._kept = (epoch, self._of(epoch))
        return int(kept[1][place])

    def _of(self, epoch: int) -> Order:
        if self._groups is None:
            return epoch_order(self.seed, epoch, self.count)
        return shared_epoch(self.seed, epoch, self.count, self._groups)


def epoch_order(seed: int, epoch: int, count: int) -> Order:
    """The global order of `count` samples in one epoch, from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(count)


def make_groups(weights: Sequence[tuple[range, float]], turns: Sequence[Turn] | None) -> list[Group]:
    """Groups of stores, given as their sample indices and weights, each cut into its turn strata where there are some.

    `turns`: each sample's stratum; those of a store have equal parts of its share.
    """
    total = sum(weight for _, weight in weights)
    groups = []
    for indices, weight in weights:
        everyone = np.arange(indices.start, indices.stop)
        if turns is None:
            parts = [everyone]
        else:
            mine = np.array([turns[index] for index in indices])
            parts = [everyone[mine == turn] for turn in TURNS if (mine == turn).any()]
        groups += [Group(members=part, share=weight / total / len(parts)) for part in parts if len(part)]
    return groups


def shared_epoch(seed: int, epoch: int, count: int, groups: Sequence[Group]) -> Order:
    """One epoch in which each group has its share, spread evenly, from (seed, epoch) and the groups alone."""
    picks, places = [], []
    ends = np.cumsum([group.share for group in groups])
    ends[-1] = 1.0
    for number, group in enumerate(groups):
        before = float(ends[number - 1]) if number else 0.0
        # Places up to an epoch, of this group and those before it: over epochs none gets ahead by more than one.
        first, end = (
            math.floor(done * count * float(ends[number]) + _ROUNDING) - math.floor(done * count * before + _ROUNDING)
            for done in (epoch, epoch + 1)
        )
        end = max(first, end)
        picks.append(group.members[_walk(seed, number, len(group.members), first, end)])
        jitter = _generator(seed, 0, number, epoch).random(end - first)
        places.append((np.arange(end - first) + jitter) / max(1, end - first))
    found = np.concatenate(picks)[np.argsort(np.concatenate(places), kind="stable")]
    return found[:count]


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
