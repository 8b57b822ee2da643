"""Leaving the straight corridor: of the samples that really do, how many predictions do, and is the turn among them?

A slope averages over all samples and paths. Here each path counts: one that stays in its lane where the road leaves it
has missed the turn, however small its error is, and six paths that are all alike have no turn to offer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.strata import CORRIDOR_M
from alpacache.metrics.bootstrap import Interval, mean_difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """How one sample's K paths and its driven path end beside the straight line, at 6.4 s."""

    truth: bool
    """The driven path ends outside the corridor, 2 m to either side of straight on."""
    share: float
    """Of the paths: outside on the side of the driven path; if that stays inside, outside on any side."""
    contained: bool
    """The driven path's end lies between the leftmost and the rightmost predicted one."""
    spread_m: float
    """Standard deviation of the K lateral offsets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorridorSummary:
    """The same over the samples of a stratum; an interval is None where there are fewer than two clips."""

    leaving: int
    """Samples whose driven path leaves the corridor."""
    staying: int
    recall: float | None
    """Mean share over samples that leave: 1 is right, 0 always stays. None without such samples."""
    recall_interval: Interval | None
    false_leaving: float | None
    """Mean share over samples that stay: 0 is right."""
    contained: float
    """Of all samples."""
    contained_leaving: float | None
    """Of samples that leave: does one of the paths go at least as far as the road, and one no further?"""
    contained_interval: Interval | None
    """Of `contained_leaving`."""
    spread_m: float
    """Mean over samples."""


def leaving(pred_xyz: ArrayLike, truth_xyz: ArrayLike) -> Leaving:
    """Of paths `[K, 64, 3]` and the driven one `[64, 3]`, metres, ego frame at t0, y left."""
    ends, end = np.asarray(pred_xyz, dtype=np.float64)[:, -1, 1], float(np.asarray(truth_xyz)[-1, 1])
    truth = abs(end) > CORRIDOR_M
    outside = ends * np.sign(end) > CORRIDOR_M if truth else np.abs(ends) > CORRIDOR_M
    return Leaving(
        truth=truth,
        share=float(outside.mean()),
        contained=bool(ends.min() <= end <= ends.max()),
        spread_m=float(ends.std()),
    )


def summarise_corridor(samples: Sequence[Leaving], clips: Sequence[str], *, seed: int = 0) -> CorridorSummary:
    """Over the samples of a stratum, at least one; `clips` are their clip ids and `seed` that of the resampling."""
    left = [one.truth for one in samples]
    gone = [one for one in samples if one.truth]
    there = [clip for clip, is_gone in zip(clips, left, strict=True) if is_gone]
    stayed = [one.share for one in samples if not one.truth]
    shares, within = [one.share for one in gone], [float(one.contained) for one in gone]
    return CorridorSummary(
        leaving=len(gone),
        staying=len(stayed),
        recall=_mean(shares),
        recall_interval=_interval(shares, there, seed=seed),
        false_leaving=_mean(stayed),
        contained=float(np.mean([one.contained for one in samples])),
        contained_leaving=_mean(within),
        contained_interval=_interval(within, there, seed=seed),
        spread_m=float(np.mean([one.spread_m for one in samples])),
    )


def recall_difference(
    before: Sequence[Leaving], after: Sequence[Leaving], clips: Sequence[str], *, seed: int = 0
) -> Interval | None:
    """Recall of one model less that of another on the same samples; None where fewer than two clips leave."""
    rows = [row for row, one in enumerate(before) if one.truth]
    if not rows:
        return None
    first, second = ([of[row].share for row in rows] for of in (before, after))
    return mean_difference(first, second, [clips[row] for row in rows], seed=seed)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _interval(values: Sequence[float], clips: Sequence[str], *, seed: int) -> Interval | None:
    return mean_difference(np.zeros(len(values)), values, clips, seed=seed) if values else None
