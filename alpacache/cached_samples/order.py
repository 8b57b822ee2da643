"""The global order: which sample is at which place of a run, as a function of the seed alone.

A place is computed without replaying those before it, so a resumed run goes on in the order of one that was not
stopped. An epoch has as many places as there are samples. The plain order is one permutation an epoch. Otherwise groups
of samples have given shares of every epoch: stores by their weights (new data beside old, against forgetting), and
turns equally, because nine tenths of recorded driving are straight, and a model that learns from it as it comes learns
to go straight. A small group then comes several times an epoch and a large one in part, each in permutations of its own
that go on from epoch to epoch, so that no sample comes again before all others of its group have.

Samples that have weights of their own come by one more rule. All are laid on a line, group after group, each as long
as the number of places it is due in an epoch; an epoch takes the samples that lie at every whole step from a beginning
of its own. So any sample, and any group, has the places it is due in every epoch, rounded down or up, and which of the
two evens out over epochs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.sample import Floats
from alpacache.driving.strata import TURNS, Turn
from alpacache.randomness import numpy_generator

Order: TypeAlias = NDArray[np.int64]

_ROUNDING = 1e-6
"""Slack for rounding shares to places: a third of 300 is 100."""
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Beginnings of epochs this far apart fill the step evenly, however many there are."""
_BLOCK = 4096
"""Least number of a group's places that one generator orders: a group of two must not need one a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """Samples that together have a share of every epoch."""

    members: Order
    """Sample indices."""
    share: float
    """Part of an epoch; the shares of all groups add up to 1."""
    weights: Floats | None = None
    """Weight of each member within its group; None where all are alike. All groups have them, or none."""


class GlobalOrder:
    """Maps a position in the run to a sample index; keeps one epoch. Safe in threads."""

    def __init__(self, seed: int, count: int, *, groups: Sequence[WeightedGroup] | None = None) -> None:
        """`groups` have their shares of every epoch; without them every sample comes once an epoch."""
        self._seed, self._count, self._groups = seed, count, groups
        self._kept = (-1, np.empty(0, np.int64))

    @property
    def due(self) -> Floats:
        """Places that each sample is due in an epoch."""
        return np.ones(self._count) if self._groups is None else expected_places(self._groups, self._count)

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
    if groups[0].weights is not None:
        return _weighted_order(seed, epoch, count, groups)
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


def expected_places(groups: Sequence[WeightedGroup], count: int) -> Floats:
    """Places `[count]` that each sample is due in an epoch of as many."""
    due = np.zeros(count)
    for group in groups:
        weights = np.ones(len(group.members)) if group.weights is None else group.weights
        due[group.members] += count * group.share * weights / weights.sum()
    return due


def _weighted_order(seed: int, epoch: int, count: int, groups: Sequence[WeightedGroup]) -> Order:
    """One epoch of samples with weights of their own; repeated ones are spread over it."""
    members = np.concatenate([group.members for group in groups])
    line = np.cumsum(expected_places(groups, count)[members]).round(6)
    line[-1] = count
    begin = math.fmod(float(numpy_generator(seed, key=(2,)).random()) + epoch * _GOLDEN, 1.0)
    before = np.ceil(line - begin).astype(np.int64)
    times = np.diff(before, prepend=0)
    rank = np.arange(count) - np.repeat(before - times, times)
    places = (rank + numpy_generator(seed, key=(2, epoch)).random(count)) / np.repeat(times, times)
    return np.repeat(members, times)[np.argsort(places, kind="stable")]


def make_groups(
    weights: Sequence[tuple[range, float]], turns: Sequence[Turn] | None, *, of_samples: Floats | None = None
) -> list[WeightedGroup]:
    """One group for each store, given as its sample indices and weight, or for each turn in it.

    `turns`: each sample's; the turns of a store have equal parts of its share. `of_samples`: weight of each sample
    within its group.
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
        for part in filter(len, parts):
            own = None if of_samples is None else of_samples[part]
            groups.append(WeightedGroup(members=part, share=weight / total / len(parts), weights=own))
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
