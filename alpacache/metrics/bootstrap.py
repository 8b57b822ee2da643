"""Intervals by resampling clips, not samples: several t0s of one clip show the same road and are not independent.

A replicate draws as many clips as there are, with replacement. Means and slopes depend on sums alone, so a replicate is
one row of clip counts times per-clip sums. Before and after share that row, so the comparison is paired.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 6, 8 and 13 (percentile interval).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alpacache.driving.sample import Floats

DRAWS = 2000
"""Replicates of each interval."""
LEVEL = 0.95
"""Confidence level of every interval of the project."""
MIN_CLIPS = 2
"""With one clip every replicate is the same and the interval would be a point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and the range that `LEVEL` of the replicates fall into."""

    estimate: float
    low: float
    high: float
    n: int
    """Number of samples."""
    clips: int


def mean_difference(before: ArrayLike, after: ArrayLike, clips: Sequence[str], *, seed: int = 0) -> Interval | None:
    """Interval of mean(after) - mean(before), `[N]` each, over samples that both models were run on.

    None with fewer than two clips. Raises `ValueError` for lengths that differ.
    """
    gain = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    sums = _sums_by_clip([np.ones_like(gain), gain], clips)
    replicates = _replicates(sums, seed=seed)
    return _interval(float(gain.mean()), replicates[:, 1] / replicates[:, 0], n=gain.size, clips=len(sums))


def slope_interval(
    truth: ArrayLike, pred: ArrayLike, clips: Sequence[str], *, over: ArrayLike | None = None, seed: int = 0
) -> Interval | None:
    """Interval of the least-squares slope of pred `[N]` on truth `[N]`; None with fewer than two clips.

    With other predictions `over` `[N]`, the interval of slope(pred) - slope(over), paired.
    """
    arrays = np.asarray([truth, pred] if over is None else [truth, over, pred], dtype=np.float64)
    # Centring changes no slope and keeps the digits of the sums of squares.
    x, *ys = (values - values.mean() for values in arrays)
    sums = _sums_by_clip([np.ones_like(x), x, x * x, *(column for y in ys for column in (y, x * y))], clips)
    estimate = float(_slope(sums.sum(axis=0, keepdims=True))[0])
    return _interval(estimate, _slope(_replicates(sums, seed=seed)), n=len(clips), clips=len(sums))


def r_squared(
    truth: ArrayLike,
    pred: ArrayLike,
    reference: ArrayLike,
    clips: Sequence[str],
    *,
    over: ArrayLike | None = None,
    seed: int = 0,
) -> Interval | None:
    """Interval of R^2, the share of the squared error of `reference` that `pred` removes.

    Args:
        truth: `[N]`.
        pred: `[N]` predictions for samples that their model was not fitted to.
        reference: `[N]` predictions of a model without inputs: the mean of the truth that `pred` was fitted to.
        clips: N clip ids.
        over: `[N]` other predictions; the result is then R^2(pred) - R^2(over), paired.
        seed: seed of the resampling.

    Returns:
        None with fewer than two clips or where `reference` has no error.

    Raises:
        ValueError: lengths that differ.
    """
    y = np.asarray(truth, dtype=np.float64)
    errors = [(y - np.asarray(values, dtype=np.float64)) ** 2 for values in (reference, pred)]
    gain = (errors[0] if over is None else (y - np.asarray(over, dtype=np.float64)) ** 2) - errors[1]
    sums = _sums_by_clip([errors[0], gain], clips)
    total = sums.sum(axis=0)
    if total[0] <= 0:
        return None
    replicates = _replicates(sums, seed=seed)
    error, gained = replicates.T
    shares = np.divide(gained, error, out=np.full(DRAWS, np.nan), where=error > 0)
    return _interval(float(total[1] / total[0]), shares, n=y.size, clips=len(sums))


def _slope(sums: Floats) -> Floats:
    """Slope of each row of sums (of 1, x, x^2, y, xy), NaN where x does not vary.

    With a further y and xy, the slope of the second prediction less that of the first.
    """
    n, sx, sxx, *by_prediction = sums.T
    spread = sxx - sx * sx / n
    slopes: list[Floats] = [
        np.divide(sxy - sx * sy / n, spread, out=np.full(len(sums), np.nan), where=spread > 1e-12 * sxx)
        for sy, sxy in zip(by_prediction[::2], by_prediction[1::2], strict=True)
    ]
    return slopes[0] if len(slopes) == 1 else slopes[1] - slopes[0]


def _sums_by_clip(columns: Sequence[Floats], clips: Sequence[str]) -> Floats:
    """Sums `[clips, columns]` of columns `[N]`."""
    rows = np.stack(columns, axis=-1)
    if len(clips) != len(rows):
        raise ValueError(f"{len(clips)} clip ids for {len(rows)} samples; one is needed for each.")
    names, index = np.unique(np.asarray(clips, dtype=np.str_), return_inverse=True)
    sums = np.zeros((len(names), len(columns)))
    np.add.at(sums, index, rows)
    return sums


def _replicates(sums: Floats, *, seed: int) -> Floats:
    """Sums `[DRAWS, columns]` over clips drawn with replacement."""
    return np.concatenate([block @ sums for block in np.array_split(_clip_counts(len(sums), seed), 10)])


@lru_cache(maxsize=2)
def _clip_counts(clip_count: int, seed: int) -> NDArray[np.uint16]:
    """Times that each clip is drawn in each replicate `[DRAWS, clips]`; cached, as a stratum asks for it many times."""
    rng = np.random.default_rng(seed)
    counts = np.empty((DRAWS, clip_count), dtype=np.uint16)
    for row in counts:
        row[:] = np.bincount(rng.integers(clip_count, size=clip_count), minlength=clip_count)
    counts.flags.writeable = False
    return counts


def _interval(estimate: float, replicates: Floats, *, n: int, clips: int) -> Interval | None:
    """None with too few clips, or where most replicates have no value."""
    known = replicates[np.isfinite(replicates)]
    if clips < MIN_CLIPS or known.size < replicates.size / 2:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate=estimate, low=float(low), high=float(high), n=n, clips=clips)
