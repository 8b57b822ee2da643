"""The global order: which sample is at which place of a run, as a function of the seed alone.

A place is computed without replaying those before it, so a resumed run goes on in the order of one that was not
stopped. An epoch has as many places as there are samples. The plain order is one permutation an epoch. Otherwise groups
of samples have given shares of every epoch: stores by their weights (new data beside old, against forgetting), and
turns equally, because nine tenths of recorded driving are straight, and a model that learns from it as it comes learns
to go straight. A small group then comes several times an epoch and a large one in part, each in permutations of its own
that go on from epoch to epoch, so that no sample comes again before all others of its group have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.strata import TURNS, Turn
from alpacache.randomness import numpy_generator

Order: TypeAlias = NDArray[np.int64]

_ROUNDING = 1e-6
"""Slack for rounding shares to places: a third of 300 is 100."""
_BLOCK = 4096
"""Least number of a group's places that one generator orders: a group of two must not need one a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """Samples that together have a share of every epoch."""

    members: Order
    """Sample indices."""
    share: float
    """Part of an epoch; the shares of all groups add up to 1."""


class GlobalOrder:
    """Maps a position in the run to a sample index; keeps one epoch. Safe in threads."""

    def __init__(self, seed: int, count: int, *, groups: Sequence[WeightedGroup] | None = None) -> None:
        """`groups` have their shares of every epoch; without them every sample comes once an epoch."""
        self._seed, self._count, self._groups = seed, count, groups
        self._kept = (-1, np.empty(0, np.int64))

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        kept = self._kept  # read once: another thread may still be in the epoch before
        if epoch != kept[0]:
            kept = self._kept = (epoch, epoch_order(self._seed, epoch, self._count, self._groups))
        return int(kept[1][place])


def epoch_order(seed: int, epoch: int, count: int, groups: Sequence[WeightedGroup] | None = None) -> Order:
    """The sample indices of one epoch, from (seed, epoch) and the groups alone, whose shares are spread evenly."""
    if groups is None:
        return numpy_generator(seed, epoch).permutation(count)
    picks, places = [], []
    ends = np.cumsum([group.share for group in groups])
    ends[-1] = 1.0
    for number, group in enumerate(groups):
        before = float(ends[number - 1]) if number else 0.0
        # The places of all epochs so far, of this group and those before it: no group gets ahead by more than one.
        first, end = (
            math.floor(done * count * float(ends[number]) + _ROUNDING) - math.floor(done * count * before + _ROUNDING)
            for done in (epoch, epoch + 1)
        )
        end = max(first, end)
        picks.append(group.members[_walk(seed, number, len(group.members), first, end)])
        jitter = numpy_generator(seed, key=(0, number, epoch)).random(end - first)
        places.append((np.arange(end - first) + jitter) / max(1, end - first))
    by_place = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(picks)[by_place][:count]


def make_groups(weights: Sequence[tuple[range, float]], turns: Sequence[Turn] | None) -> list[WeightedGroup]:
    """One group for each store, given as its sample indices and weight, or for each turn in it.

    `turns`: each sample's; the turns of a store have equal parts of its share.
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
        groups += [WeightedGroup(members=part, share=weight / total / len(parts)) for part in parts if len(part)]
    return groups


def _walk(seed: int, group: int, size: int, first: int, end: int) -> Order:
    """Places `first` to `end` of a group's endless row of permutations."""
    rounds = -(-_BLOCK // size)
    block = rounds * size
    blocks = [
        numpy_generator(seed, key=(1, group, number)).permuted(np.tile(np.arange(size), (rounds, 1)), axis=1).ravel()
        for number in range(first // block, -(-end // block))
    ]
    skipped = first // block * block
    return np.concatenate([np.empty(0, np.int64), *blocks])[first - skipped : end - skipped]
