"""Straight-line bias: does a model turn as much as it can know that the road does?

Over many samples, heading change and lateral offset of the predicted paths' mean are fitted against those of the driven
path. The error of a single path does not show this, and a mean error is dominated by straight road, where a biased
model is right.

Two slopes tell two things apart. Predicted on driven is the share of the turn that is taken: 0 always drives straight,
but less than 1 is no bias yet, as a model without any has the share of the variance that it can know. Driven on
predicted is the calibration: 1 where predictions mean what they say, above where the road turns more than they do. The
product of the two is R^2, what is known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import DT_S, FUTURE_S, Floats
from alpacache.driving.strata import driven_heading
from alpacache.metrics.bootstrap import Interval, calibration_interval, slope_interval

Quantity: TypeAlias = Literal["heading", "lateral"]

HORIZONS_S = (2.0, 4.0, FUTURE_S)
QUANTITIES: tuple[Quantity, ...] = ("heading", "lateral")
MIN_SPREAD: dict[Quantity, float] = {"heading": float(np.deg2rad(0.1)), "lateral": 0.02}
"""Least standard deviation of the truth (rad, m) that a slope can be fitted to."""
MIN_SAMPLES = 5
"""Fewer samples give no slope: with 2 the line is exact, with 3 or 4 it is chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """How far a path has left the straight line at each of `HORIZONS_S`; left is positive."""

    heading: tuple[float, ...]
    """Heading less heading at t0, unwrapped, radians."""
    lateral: tuple[float, ...]
    """y in the ego frame at t0, metres."""
    heading_noise: tuple[float, ...] | None = None
    """Variance of `heading` as a mean of K sampled paths: theirs, over K. None where a single path does not tell."""
    lateral_noise: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Least-squares lines between predicted and true departure, with 95 % intervals of their slopes."""

    slope: float
    """Predicted on true: the share of the turn that is taken."""
    low: float
    """Infinite, as `high` is, where the clips are too few for an interval."""
    high: float
    intercept: float
    """Radians or metres, as the quantity."""
    n: int
    """Number of samples."""
    clips: int | None = None
    """Number of clips, or blocks of time, that were split for the interval."""
    effective_clips: float | None = None
    """Number of clips of equal weight that would be worth as much."""
    calibration: Interval | None = None
    """Slope of true on predicted, corrected for the noise of a mean of few paths; None where that is not known."""
    r2: float | None = None
    """Share of the true departure's variance that the predicted one tells: the product of the two slopes."""


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
    return Departure(
        heading=tuple(turned.mean(axis=0).tolist()),
        lateral=tuple(beside.mean(axis=0).tolist()),
        heading_noise=_noise(turned),
        lateral_noise=_noise(beside),
    )


def _noise(values: Floats) -> tuple[float, ...] | None:
    """Variance of the means over K paths, values `[K, horizons]`; None for a single path."""
    return tuple((values.var(axis=0, ddof=1) / len(values)).tolist()) if len(values) > 1 else None


def fit_slope(
    truth: ArrayLike,
    pred: ArrayLike,
    clips: Sequence[str] | None = None,
    *,
    noise: ArrayLike | None = None,
    min_spread: float = 0.0,
    weights: Floats | None = None,
    seed: int = 0,
) -> Slope | None:
    """Fit departures `[N]` to each other, pred to truth and back.

    Args:
        truth: `[N]`.
        pred: `[N]` means over sampled paths.
        clips: N clip ids; without them every sample counts as a clip of its own.
        noise: `[N]` variance of each mean; without it there is neither calibration nor R^2.
        min_spread: least standard deviation of truth that a slope can be fitted to.
        weights: `[N]` by which samples count, of mean 1; alike without.
        seed: seed of the splits for the intervals.

    Returns:
        None with fewer than five samples or where truth hardly varies: there is no slope to speak of.

    Raises:
        ValueError: lengths that differ, or values that are not finite.
    """
    x, y = np.asarray(truth, dtype=np.float64), np.asarray(pred, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"truth and pred have shapes {x.shape} and {y.shape}, expected two of [N].")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("truth or pred holds values that are not finite.")
    if x.size < MIN_SAMPLES or float(x.std()) <= max(min_spread, 1e-12):
        return None
    units = [str(index) for index in range(x.size)] if clips is None else clips
    share = slope_interval(x, y, units, weights=weights, seed=seed)
    if share is None:
        return None
    calibration = None if noise is None else calibration_interval(x, y, noise, units, weights=weights, seed=seed)
    if calibration is not None and math.isfinite(share.low) and not calibration.is_bounded:
        calibration = replace(calibration, estimate=math.nan)  # pred may be its own noise: any slope would be chance
    known = 0.0 if calibration is None else share.estimate * calibration.estimate
    return Slope(
        slope=share.estimate,
        low=share.low,
        high=share.high,
        intercept=float(np.average(y, weights=weights) - share.estimate * np.average(x, weights=weights)),
        n=share.n,
        clips=share.clips,
        effective_clips=share.effective_clips,
        calibration=calibration,
        r2=None if calibration is None or not math.isfinite(known) else min(1.0, known),
    )


def bias_slope(
    truth: Sequence[Departure],
    pred: Sequence[Departure],
    clips: Sequence[str],
    *,
    quantity: Quantity,
    horizon_s: float,
    calibrate: bool = True,
    weights: Floats | None = None,
    seed: int = 0,
) -> Slope | None:
    """Slopes of one model, from the mean departures of its paths and the true ones; None where `fit_slope` gives none.

    Without `calibrate` there is no calibration. It is meaningless on samples that were chosen by their true departure:
    among those that turn, the road turns more than a calibrated model predicts.
    """
    x, y = departures_at(truth, quantity, horizon_s), departures_at(pred, quantity, horizon_s)
    noise = _noise_at(pred, quantity, horizon_s) if calibrate else None
    return fit_slope(x, y, clips, noise=noise, min_spread=MIN_SPREAD[quantity], weights=weights, seed=seed)


def bias_difference(
    truth: Sequence[Departure],
    before: Sequence[Departure],
    after: Sequence[Departure],
    clips: Sequence[str],
    *,
    quantity: Quantity,
    horizon_s: float,
    weights: Floats | None = None,
    seed: int = 0,
) -> Interval | None:
    """Slope of `after` less slope of `before`, paired; None where `bias_slope` has no slope."""
    x, y, z = (departures_at(each, quantity, horizon_s) for each in (truth, before, after))
    if x.size < MIN_SAMPLES or float(x.std()) <= MIN_SPREAD[quantity]:
        return None
    return slope_interval(x, z, clips, over=y, weights=weights, seed=seed)


def departures_at(departures: Sequence[Departure], quantity: Quantity, horizon_s: float) -> Floats:
    """One number of each departure, `[N]` in radians or metres. Raises `ValueError` for an unknown horizon."""
    place = HORIZONS_S.index(horizon_s)
    return np.array([getattr(one, quantity)[place] for one in departures], dtype=np.float64)


def _noise_at(departures: Sequence[Departure], quantity: Quantity, horizon_s: float) -> Floats | None:
    """Variance of each departure as a mean of paths `[N]`; None where one is not known."""
    place = HORIZONS_S.index(horizon_s)
    each = [one.heading_noise if quantity == "heading" else one.lateral_noise for one in departures]
    known = [noise[place] for noise in each if noise is not None]
    return np.array(known, dtype=np.float64) if len(known) == len(each) else None
