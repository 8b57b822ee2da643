"""Straight-line bias: does a model turn as much as the road does?

Over many samples, heading change and lateral offset of the predicted paths' mean are fitted against those of the driven
path: a slope of 1 is unbiased, 0 always drives straight. The error of a single path does not show this, and a mean
error is dominated by straight road, where a biased model is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import DT_S, FUTURE_S, Floats
from alpacache.driving.strata import driven_heading
from alpacache.metrics.bootstrap import LEVEL, Interval, slope_interval

Quantity: TypeAlias = Literal["heading", "lateral"]

HORIZONS_S = (2.0, 4.0, FUTURE_S)
QUANTITIES: tuple[Quantity, ...] = ("heading", "lateral")
MIN_SPREAD: dict[Quantity, float] = {"heading": float(np.deg2rad(0.1)), "lateral": 0.02}
"""Least standard deviation of the truth (rad, m) that a slope can be fitted to."""
MIN_SAMPLES = 5
"""Fewer samples give no slope: with 2 the line is exact, with 3 or 4 the interval says nothing."""
MIN_CLIPS = 10
"""Fewer clips than this cannot be resampled; the interval is then Student's t over samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """How far a path has left the straight line at each of `HORIZONS_S`; left is positive."""

    heading: tuple[float, ...]
    """Heading less heading at t0, unwrapped, radians."""
    lateral: tuple[float, ...]
    """y in the ego frame at t0, metres."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """A least-squares line of predicted on true departure, with a 95 % interval of its slope."""

    slope: float
    low: float
    high: float
    intercept: float
    """Radians or metres, as the quantity."""
    n: int
    """Number of samples."""
    clips: int | None = None
    """Number of clips that were resampled for the interval; None where it is Student's t over samples."""


def mean_departure(pred_xyz: ArrayLike, pred_rot: ArrayLike, start_rot: ArrayLike) -> Departure:
    """Mean departure of K paths of 64 waypoints at 10 Hz.

    Args:
        pred_xyz: `[K, 64, 3]` metres, ego frame at t0.
        pred_rot: `[K, 64, 3, 3]` vehicle-to-ego-frame rotations.
        start_rot: `[3, 3]` rotation at t0, the identity but for rounding.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or paths shorter than 6.4 s.
    """
    points, matrices = np.asarray(pred_xyz, dtype=np.float64), np.asarray(pred_rot, dtype=np.float64)
    if points.ndim != 3 or points.shape[2] != 3 or not len(points) or matrices.shape != (*points.shape, 3):
        raise ValueError(
            f"paths have shapes {points.shape} and {matrices.shape}, expected [K, 64, 3] and [K, 64, 3, 3]."
        )
    if not (np.isfinite(points).all() and np.isfinite(matrices).all()):
        raise ValueError("paths hold values that are not finite.")
    steps = [round(horizon_s / DT_S) for horizon_s in HORIZONS_S]
    if points.shape[1] < steps[-1]:
        raise ValueError(f"a path of {points.shape[1]} waypoints (10 Hz) ends before {HORIZONS_S[-1]} s.")
    start = np.broadcast_to(np.asarray(start_rot, dtype=np.float64), (len(points), 1, 3, 3))
    at_t0 = np.zeros((len(points), 1, 3))
    headings = driven_heading(np.concatenate([at_t0, points], axis=1), np.concatenate([start, matrices], axis=1))
    turned = headings[:, steps] - headings[:, :1]
    beside = points[:, [step - 1 for step in steps], 1]
    return Departure(heading=tuple(turned.mean(axis=0).tolist()), lateral=tuple(beside.mean(axis=0).tolist()))


def fit_slope(truth: ArrayLike, pred: ArrayLike, *, min_spread: float = 0.0) -> Slope | None:
    """Least-squares line with intercept of pred on truth, departures `[N]`; the interval is Student's t, freedom n - 2.

    None with fewer than five samples or where the standard deviation of truth is not above `min_spread`: there is no
    slope to speak of. Raises `ValueError` for lengths that differ or values that are not finite.
    """
    x, y = np.asarray(truth, dtype=np.float64), np.asarray(pred, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"truth and pred have shapes {x.shape} and {y.shape}, expected two of [N].")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("truth or pred holds values that are not finite.")
    if x.size < MIN_SAMPLES or float(x.std()) <= max(min_spread, 1e-12):
        return None
    from scipy import stats

    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (y - y.mean())) / spread
    intercept = float(y.mean() - slope * x.mean())
    residual = y - intercept - slope * x
    freedom = x.size - 2
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * float(np.sqrt(residual @ residual / freedom / spread))
    return Slope(slope=slope, low=slope - half, high=slope + half, intercept=intercept, n=x.size)


def bias_slope(
    truth: Sequence[Departure],
    pred: Sequence[Departure],
    clips: Sequence[str],
    *,
    quantity: Quantity,
    horizon_s: float,
    seed: int = 0,
) -> Slope | None:
    """Slope of one model, from the mean departures of its paths and the true ones; None where `fit_slope` gives none.

    The interval comes from resampling clips where clips have several samples and there are ten clips or more, else from
    Student's t, which takes samples for independent and is too narrow where they are not.
    """
    x, y = departures_at(truth, quantity, horizon_s), departures_at(pred, quantity, horizon_s)
    line = fit_slope(x, y, min_spread=MIN_SPREAD[quantity])
    if line is None or not MIN_CLIPS <= len(set(clips)) < len(clips):
        return line
    interval = slope_interval(x, y, clips, seed=seed)
    return line if interval is None else replace(line, low=interval.low, high=interval.high, clips=interval.clips)


def bias_difference(
    truth: Sequence[Departure],
    before: Sequence[Departure],
    after: Sequence[Departure],
    clips: Sequence[str],
    *,
    quantity: Quantity,
    horizon_s: float,
    seed: int = 0,
) -> Interval | None:
    """Slope of `after` less slope of `before`, paired; None where `bias_slope` has no slope, or with a single clip."""
    x, y, z = (departures_at(each, quantity, horizon_s) for each in (truth, before, after))
    if fit_slope(x, z, min_spread=MIN_SPREAD[quantity]) is None:
        return None
    return slope_interval(x, z, clips, over=y, seed=seed)


def departures_at(departures: Sequence[Departure], quantity: Quantity, horizon_s: float) -> Floats:
    """One number of each departure, `[N]` in radians or metres. Raises `ValueError` for an unknown horizon."""
    place = HORIZONS_S.index(horizon_s)
    return np.array([getattr(one, quantity)[place] for one in departures], dtype=np.float64)
