"""Intervals by splitting clips, not samples: several t0s of one clip show the same road and are not independent.

Every replicate splits the clips at random in two and estimates from either half; the interval is the middle 95 % of
these estimates. It is the sign-flip test of what each clip contributes to the estimating equation, turned round: it
needs no standard error and no quantile of a distribution, and holds however the error grows with the bend, as long as
clips err to either side alike. A percentile bootstrap is too narrow with few clips, Student's t where errors are of
unequal size: `benchmarks/bench_intervals.py` measures it.

Means and slopes depend on sums alone, so a replicate is one row of zeros and ones times per-clip sums. Before and after
share that row, so the comparison is paired.
Source: Hartigan, Using subsample values as typical values, J. Am. Stat. Assoc. 64 (1969), 1303-1317.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alpacache.driving.sample import Floats

SPLITS = 2000
"""Replicates of each interval."""
LEVEL = 0.95
"""Confidence level of every interval of the project."""
CALIBRATION_LEVEL = 0.965
"""Middle of a calibration's estimates that makes such an interval: what clips contribute to it leans to one side."""
MIN_CLIPS = 10
"""Fewer clips give no interval."""
MIN_EFFECTIVE = 5.0
"""Least effective number of clips (Kish): unequal weights make clips worth fewer."""
LEAST_SHARE = 0.3
"""Least share of the clips in the smaller half of a split."""
BLOCK_S = 60.0
"""Length of the blocks that stand for clips where those are few and long; samples less than 8 s apart share road."""

Measure: TypeAlias = Callable[[Floats], Floats]
"""Sums `[R, columns]` -> an estimate for every row: NaN where it has none, infinite where it has no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate, and the range that holds the true value in `LEVEL` of all data sets.

    A bound that the data do not give is infinite; with too few clips both are.
    """

    estimate: float
    low: float
    high: float
    n: int
    """Number of samples."""
    clips: int
    """Number of clips, or blocks of time, that were split."""
    effective_clips: float | None = None
    """Number of clips of equal weight that would be worth as much: one sharp bend outweighs many straight clips."""

    @property
    def is_bounded(self) -> bool:
        """True if there is an end that the data give."""
        return math.isfinite(self.low) or math.isfinite(self.high)


def range_text(low: float, high: float, form: str = "z.2f") -> str:
    """Write a range as `[0.85, 0.96]`, with `..` for one bound that is infinite; empty where both are."""
    if not math.isfinite(low) and not math.isfinite(high):
        return ""
    return "[{}, {}]".format(*(format(end, form) if math.isfinite(end) else ".." for end in (low, high)))


def splitting_units(clips: Sequence[str], times_s: Sequence[float], *, block_s: float = BLOCK_S) -> list[str]:
    """Names `[N]` of what N samples at `times_s` of their clips are split by: clips, or blocks where those are few.

    `block_s`: length of the blocks; that of the blocks that were held out, if it is less than the usual one.

    An interval by blocks tells of these drives, not of others.
    """
    if len(set(clips)) >= MIN_CLIPS:
        return list(clips)
    return [f"{clip} {time_s // block_s:.0f}" for clip, time_s in zip(clips, times_s, strict=True)]


def mean_difference(
    before: ArrayLike, after: ArrayLike, clips: Sequence[str], *, weights: Floats | None = None, seed: int = 0
) -> Interval | None:
    """Interval of mean(after) - mean(before), `[N]` each, over samples that both models were run on.

    Samples count by `weights` `[N]`, alike without. None without samples. Raises `ValueError` for lengths that differ.
    """
    gain = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return weighted_mean(gain, np.ones_like(gain) if weights is None else weights, clips, seed=seed)


def mean_rise(
    before: ArrayLike, after: ArrayLike, clips: Sequence[str], *, weights: Floats | None = None, seed: int = 0
) -> Interval | None:
    """Interval of mean(after) / mean(before) - 1, by `[N]` each of the same samples; None where `before` is all 0."""
    first = np.asarray(before, dtype=np.float64)
    columns = [first, np.asarray(after, dtype=np.float64) - first]
    return _interval(_mean, columns, clips, weight=0, weights=weights, seed=seed)


def weighted_mean(values: ArrayLike, weights: ArrayLike, clips: Sequence[str], *, seed: int = 0) -> Interval | None:
    """Interval of the mean of values `[N]` that count by weights `[N]`; None where these are all 0."""
    by = np.asarray(weights, dtype=np.float64)
    return _interval(_mean, [by, by * np.asarray(values, dtype=np.float64)], clips, weight=0, seed=seed)


def mean_share(
    values: ArrayLike, clips: Sequence[str], *, weights: Floats | None = None, seed: int = 0
) -> Interval | None:
    """Interval of the mean of shares `[N]`, each from 0 to 1; None without samples.

    Twelve clips that all have the turn do not prove that every clip has it. So two clips are added before the split,
    one without and one with it, each with the mean number of samples; the estimate is without them.
    """
    shares = np.asarray(values, dtype=np.float64)
    total = float(shares.size if weights is None else np.sum(weights))
    each = total / max(1, len(set(clips)))
    added = [[each, 0.0], [each, each]]
    columns = [np.ones_like(shares), shares]
    return _interval(_mean, columns, clips, weight=0, weights=weights, seed=seed, added=added)


def slope_interval(
    truth: ArrayLike,
    pred: ArrayLike,
    clips: Sequence[str],
    *,
    over: ArrayLike | None = None,
    weights: Floats | None = None,
    seed: int = 0,
) -> Interval | None:
    """Interval of the least-squares slope of pred `[N]` on truth `[N]`; None where truth does not vary.

    With other predictions `over` `[N]`, the interval of slope(pred) - slope(over), paired. Samples count by `weights`
    `[N]`, alike without.
    """
    x, y, *other = (_centred(values) for values in ([truth, pred] if over is None else [truth, pred, over]))
    columns = [np.ones_like(x), x, x * x, y, x * y, *(column for z in other for column in (z, x * z))]
    measure = _slope if over is None else _slope_difference
    return _interval(measure, columns, clips, weight=2, weights=weights, seed=seed)


def calibration_interval(
    truth: ArrayLike,
    pred: ArrayLike,
    noise: ArrayLike,
    clips: Sequence[str],
    *,
    weights: Floats | None = None,
    seed: int = 0,
) -> Interval:
    """Interval of the slope of truth `[N]` on pred `[N]`, had pred no noise.

    Args:
        truth: `[N]`.
        pred: `[N]` means of sampled values.
        noise: `[N]` variance of each of these means about what infinitely many samples would give. It widens the spread
            of pred, by which the slope is divided, and would hide a part of it (regression dilution).
        clips: N clip ids.
        weights: `[N]` by which samples count, of mean 1; alike without.
        seed: seed of the splits.

    Returns:
        An infinite estimate or upper bound where pred varies no more than its noise does; the estimate is NaN where it
        does not go with truth either.

    Raises:
        ValueError: lengths that differ.
    """
    x, y = _centred(truth), _centred(pred)
    columns = [np.ones_like(x), x, x * x, y, x * y, y * y, np.asarray(noise, dtype=np.float64)]
    found = _interval(_calibration, columns, clips, weight=2, weights=weights, level=CALIBRATION_LEVEL, seed=seed)
    unknown = Interval(estimate=math.nan, low=-math.inf, high=math.inf, n=x.size, clips=len(set(clips)))
    return unknown if found is None else found


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
        seed: seed of the splits.

    Returns:
        None where `reference` has no error.

    Raises:
        ValueError: lengths that differ.
    """
    y = np.asarray(truth, dtype=np.float64)
    errors = [(y - np.asarray(values, dtype=np.float64)) ** 2 for values in (reference, pred)]
    gain = (errors[0] if over is None else (y - np.asarray(over, dtype=np.float64)) ** 2) - errors[1]
    return _interval(_mean, [errors[0], gain], clips, weight=0, seed=seed)


def _centred(values: ArrayLike) -> Floats:
    """Deviations from the mean: they change no slope and keep the digits of the sums of squares."""
    array = np.asarray(values, dtype=np.float64)
    centred: Floats = array - array.mean() if array.size else array
    return centred


def _mean(sums: Floats) -> Floats:
    """The second sum over the first."""
    weight, value = sums.T
    mean: Floats = np.divide(value, weight, out=np.full(len(sums), np.nan), where=weight > 0)
    return mean


def _slope(sums: Floats) -> Floats:
    """Slope by rows of sums of 1, x, x^2, y, xy, ..."""
    n, x, xx, y, xy = sums.T[:5]
    with np.errstate(all="ignore"):
        spread = xx - x * x / n
        slope: Floats = np.where(spread > 1e-12 * xx, (xy - x * y / n) / spread, np.nan)
    return slope


def _slope_difference(sums: Floats) -> Floats:
    """Slope of y less that of z, by rows of sums of 1, x, x^2, y, xy, z, xz."""
    return _slope(sums) - _slope(sums[:, [0, 1, 2, 5, 6]])


def _calibration(sums: Floats) -> Floats:
    """Slope of x on y by rows of sums of 1, x, x^2, y, xy, y^2 and the variance of y's noise."""
    n, x, _, y, xy, yy, noise = sums.T
    with np.errstate(all="ignore"):
        shared, spread = xy - x * y / n, yy - y * y / n - noise * (1 - 1 / n)
        beyond = np.where(shared > 1e-9 * yy, np.inf, np.nan)
        slope: Floats = np.where(spread > 1e-9 * yy, shared / spread, beyond)
    return slope


def _interval(
    measure: Measure,
    columns: Sequence[Floats],
    clips: Sequence[str],
    *,
    weight: int,
    seed: int,
    weights: Floats | None = None,
    level: float = LEVEL,
    added: Sequence[Sequence[float]] = (),
) -> Interval | None:
    """Interval of a measure of sums of columns `[N]`; None where it has no estimate.

    `weight` is the column that says how much a clip counts; `weights` `[N]` are how much the samples do; `added` are
    sums of clips that only the splits have.
    """
    if weights is not None:
        columns = [weights * column for column in columns]
    sums = _sums_by_clip(columns, clips)
    estimate = float(measure(sums.sum(axis=0, keepdims=True))[0])
    if math.isnan(estimate):
        return None
    counts = sums[:, weight]
    effective = float(counts.sum() ** 2 / (counts @ counts))
    low, high = -math.inf, math.inf
    if len(sums) >= MIN_CLIPS and effective >= MIN_EFFECTIVE:
        split = np.concatenate([sums, np.asarray(added, dtype=np.float64).reshape(len(added), len(columns))])
        halves = _half_sums(split, seed=seed)
        low, high = _ends(np.concatenate([measure(halves), measure(split.sum(axis=0) - halves)]), level)
    return Interval(estimate=estimate, low=low, high=high, n=len(clips), clips=len(sums), effective_clips=effective)


def _ends(estimates: Floats, level: float) -> tuple[float, float]:
    """Ends of the middle share `level` of estimates; one that has no value may lie anywhere."""
    unknown = np.isnan(estimates)
    beyond = math.floor((1 - level) / 2 * estimates.size)
    low = np.sort(np.where(unknown, -np.inf, estimates))[beyond]
    high = np.sort(np.where(unknown, np.inf, estimates))[-1 - beyond]
    return float(low), float(high)


def _sums_by_clip(columns: Sequence[Floats], clips: Sequence[str]) -> Floats:
    """Sums `[clips, columns]` of columns `[N]`."""
    rows = np.stack(columns, axis=-1)
    if len(clips) != len(rows):
        raise ValueError(f"{len(clips)} clip ids for {len(rows)} samples; one is needed for each.")
    names, index = np.unique(np.asarray(clips, dtype=np.str_), return_inverse=True)
    sums = np.zeros((len(names), len(columns)))
    np.add.at(sums, index, rows)
    return sums


def _half_sums(sums: Floats, *, seed: int) -> Floats:
    """Sums `[SPLITS, columns]` over one half of each split."""
    return np.concatenate([block @ sums for block in np.array_split(_halves(len(sums), seed), 10)])


@lru_cache(maxsize=4)
def _halves(clips: int, seed: int) -> NDArray[np.bool_]:
    """Membership `[SPLITS, clips]` of one half; cached, as a stratum asks for it many times.

    A clip is in either half with equal chance. A half of a few clips only would have a wild estimate.
    """
    rng, least = np.random.default_rng(seed), LEAST_SHARE * clips
    kept = np.empty((0, clips), dtype=np.bool_)
    while len(kept) < SPLITS:
        drawn = rng.integers(2, size=(SPLITS, clips), dtype=np.int8).astype(np.bool_)
        size = drawn.sum(axis=1)
        kept = np.concatenate([kept, drawn[(size >= least) & (size <= clips - least)]])
    halves = kept[:SPLITS].copy()
    halves.flags.writeable = False
    return halves
