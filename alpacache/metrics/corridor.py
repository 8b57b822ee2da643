"""Leaving the straight corridor: where the driven path does, how many predicted ones do, and is the turn among them?

A slope averages over all samples and paths. Here each path counts: one that stays in its lane where the road leaves it
has missed the turn, however small its error, and six paths that are all alike offer no turn. Where half of them turn
and half drive on, their mean is a path that none of them takes: how far they fall into two bundles tells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import Floats
from alpacache.driving.strata import CORRIDOR_M
from alpacache.metrics.bootstrap import Interval, mean_difference, mean_share, weighted_mean

LEAST_PATHS = 4
"""With fewer paths, any two bundles hold most of their spread."""

SIDE_KEY = "side_chosen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """Ends of one sample's K paths and its driven path beside the straight line, at 6.4 s."""

    truth: bool
    """True if the driven path ends outside the corridor, 2 m to either side of straight on."""
    share: float
    """Share of the paths that end outside on the driven path's side, or, where that stays inside, on any side."""
    contained: bool
    """True if the driven path ends between the leftmost and the rightmost predicted one."""
    spread_m: float
    """Standard deviation of the K lateral offsets."""
    split: float | None = None
    """Share of their variance that lies between two bundles, those that leave least within; None with few paths.

    Six normal draws have 0.79, two bundles ten times as far apart as each is wide 0.97; 0 where all paths end alike.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class CorridorSummary:
    """`Leaving` over the samples of a stratum; an interval is None without samples."""

    leaving: int
    """Number of samples whose driven path leaves the corridor."""
    staying: int
    """Number of the others."""
    recall: float | None
    """Mean share over samples that leave: 1 is right, 0 always stays. None without such samples."""
    recall_interval: Interval | None
    false_leaving: float | None
    """Mean share over samples that stay: 0 is right."""
    contained: float
    """Share of all samples whose driven end is contained."""
    contained_leaving: float | None
    """The same share of the samples that leave: one path goes at least as far as the road, and one no further."""
    contained_interval: Interval | None
    spread_m: float
    """Mean over samples."""
    split: Interval | None = None
    """Mean over samples, which count by the variance of their lateral offsets. None with few paths, or all alike."""

    @property
    def departures(self) -> float | None:
        """How many paths leave for each driven one that does: 0 always stays, about 1 leaves as often as the road.

        Paths that leave to the other side than the road do not count. None where no driven path leaves.
        """
        if self.recall is None:
            return None
        return self.recall + (self.false_leaving or 0.0) * self.staying / self.leaving


def leaving(pred_xyz: ArrayLike, truth_xyz: ArrayLike) -> Leaving:
    """Compare paths `[K, 64, 3]` with the driven one `[64, 3]`, metres, ego frame at t0, y left."""
    ends, end = np.asarray(pred_xyz, dtype=np.float64)[:, -1, 1], float(np.asarray(truth_xyz)[-1, 1])
    truth = abs(end) > CORRIDOR_M
    outside = ends * np.sign(end) > CORRIDOR_M if truth else np.abs(ends) > CORRIDOR_M
    return Leaving(
        truth=truth,
        share=float(outside.mean()),
        contained=bool(ends.min() <= end <= ends.max()),
        spread_m=float(ends.std()),
        split=_split(ends) if len(ends) >= LEAST_PATHS else None,
    )


def side_chosen(pred_xyz: ArrayLike, truth_xyz: ArrayLike) -> float:
    """Share of paths `[K, 64, 3]` that end on the driven path's side of straight on, however far.

    NaN where the driven path `[64, 3]` ends within the corridor: there is no side to choose.
    """
    ends, end = np.asarray(pred_xyz, dtype=np.float64)[:, -1, 1], float(np.asarray(truth_xyz)[-1, 1])
    return float((ends * np.sign(end) > 0).mean()) if abs(end) > CORRIDOR_M else math.nan


def _split(values: Floats) -> float:
    """Share of the variance of K values that the best cut into two bundles puts between them; 0 without variance."""
    count, deviations = len(values), np.sort(values) - values.mean()
    first, sums = np.arange(1, count), np.cumsum(deviations)[:-1]
    total = float(deviations @ deviations)
    between = sums**2 * count / (first * (count - first))
    return float(between.max()) / total if total > 0 else 0.0


def summarise_corridor(
    samples: Sequence[Leaving], clips: Sequence[str], *, weights: Floats | None = None, seed: int = 0
) -> CorridorSummary:
    """Aggregate the samples of a stratum, at least one, which count by `weights` `[N]`, alike without.

    `clips` are their clip ids, `seed` is that of the splits.
    """
    by = np.ones(len(samples)) if weights is None else weights
    left = np.array([sample.truth for sample in samples], dtype=bool)
    share, contained = (
        np.array([getattr(sample, name) for sample in samples], float) for name in ("share", "contained")
    )
    left_clips = [clip for sample, clip in zip(samples, clips, strict=True) if sample.truth]
    return CorridorSummary(
        leaving=int(left.sum()),
        staying=int((~left).sum()),
        recall=_mean(share[left], by[left]),
        recall_interval=_interval(share[left], left_clips, by[left], seed=seed),
        false_leaving=_mean(share[~left], by[~left]),
        contained=float(np.average(contained, weights=by)),
        contained_leaving=_mean(contained[left], by[left]),
        contained_interval=_interval(contained[left], left_clips, by[left], seed=seed),
        spread_m=float(np.average([sample.spread_m for sample in samples], weights=by)),
        split=_mean_split(samples, clips, by, seed=seed),
    )


def recall_difference(
    before: Sequence[Leaving],
    after: Sequence[Leaving],
    clips: Sequence[str],
    *,
    weights: Floats | None = None,
    seed: int = 0,
) -> Interval | None:
    """Recall of one model less that of another on the same samples; None where none leaves."""
    by = np.ones(len(before)) if weights is None else weights
    rows = [row for row, sample in enumerate(before) if sample.truth]
    if not rows:
        return None
    first, second = ([each[row].share for row in rows] for each in (before, after))
    return mean_difference(first, second, [clips[row] for row in rows], weights=by[rows], seed=seed)


def _mean(values: Floats, by: Floats) -> float | None:
    return float(np.average(values, weights=by)) if values.size else None


def _interval(values: Floats, clips: Sequence[str], by: Floats, *, seed: int) -> Interval | None:
    return mean_share(values, clips, weights=by, seed=seed) if values.size else None


def _mean_split(samples: Sequence[Leaving], clips: Sequence[str], by: Floats, *, seed: int) -> Interval | None:
    known = [sample.split for sample in samples if sample.split is not None]
    if len(known) < len(samples):
        return None
    return weighted_mean(known, by * [sample.spread_m**2 for sample in samples], clips, seed=seed)
