"""Coverage of the 95 % intervals of an evaluation: how often they hold the true value, in simulated data sets.

A data set is drawn again and again from a world whose true value is known, and its interval taken as `alpacache eval`
takes it. `given` is the share of data sets that get one: with few turns there is none. `covered` is the share of these
that hold the truth, and should be 0.95. Beside it what Student's t over samples and a percentile bootstrap over clips
would have covered on the same data sets.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from benchmark_report import arguments, finish
from numpy.typing import NDArray
from scipy import signal, stats

from alpacache.metrics.bias import fit_slope
from alpacache.metrics.bootstrap import Interval, mean_difference, mean_share, slope_interval, splitting_units

Array = NDArray[np.float64]
CLIPS = (12, 20, 40, 120, 400)
T0S = (1, 5)
"""Samples a clip."""
PATHS = 6
BEND, STRAIGHT = 0.5, 0.02
"""Standard deviation of the heading change in clips that bend, and in the others, radians."""
SHARE = 0.6
"""The true share of the turn that the models of the slope's worlds take."""
LEAST_GIVEN = 1000
"""Fewer intervals than this do not tell the coverage to 0.015. Where few data sets get one, more are drawn."""
MOST_SETS = 5
"""Up to so many times the data sets that were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """One data set of N samples: the driven heading change, the mean of the paths, the variance of that mean."""

    truth: Array
    pred: Array
    clips: list[str]
    noise: Array | None = None
    other: Array | None = None
    """Another model's predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """How the samples of `clips` clips with `t0s` samples each come about, and what is estimated from them."""

    name: str
    true: float
    draw: Callable[[np.random.Generator, int, int], Data]
    estimate: Callable[[Data], Interval | None]
    pairs: Callable[[Data], tuple[Array, Array]] | None
    """x and y `[N]` of the slope, or of the mean (x of ones), for the two other methods; None where they have none."""
    clips: tuple[int, ...] = CLIPS
    t0s: tuple[int, ...] = T0S


def share_of(data: Data) -> Interval | None:
    line = fit_slope(data.truth, data.pred, data.clips)
    if line is None:
        return None
    return Interval(estimate=line.slope, low=line.low, high=line.high, n=line.n, clips=line.clips or 0)


def calibration_of(data: Data) -> Interval | None:
    line = fit_slope(data.truth, data.pred, data.clips, noise=data.noise)
    return None if line is None else line.calibration


def difference_of(data: Data) -> Interval | None:
    return slope_interval(data.truth, data.pred, data.clips, over=data.other)


def mean_of(data: Data) -> Interval | None:
    return mean_difference(np.zeros_like(data.pred), data.pred, data.clips)


def recall_of(data: Data) -> Interval | None:
    return mean_share(data.pred, data.clips)


def bends(rng: np.random.Generator, clips: int, t0s: int, share: float) -> Array:
    """Heading change of every sample; those of a clip are alike."""
    spread = np.where(rng.random(clips) < share, BEND, STRAIGHT)
    return np.repeat(spread * rng.normal(size=clips), t0s) * rng.normal(1.0, 0.1, clips * t0s)


def mixed(rng: np.random.Generator, clips: int, t0s: int) -> Array:
    """Unit normal, half of whose variance the samples of a clip have in common."""
    return (np.repeat(rng.normal(size=clips), t0s) + rng.normal(size=clips * t0s)) / np.sqrt(2)


def ids(clips: int, t0s: int) -> list[str]:
    return [f"{clip:04d}" for clip in range(clips) for _ in range(t0s)]


def alike(rng: np.random.Generator, clips: int, t0s: int) -> Data:
    """Every clip bends, and the error does not grow with the bend."""
    truth = bends(rng, clips, t0s, 1.0)
    return Data(truth=truth, pred=SHARE * truth + 0.2 * mixed(rng, clips, t0s), clips=ids(clips, t0s))


def growing(rng: np.random.Generator, clips: int, t0s: int, *, share: float) -> Data:
    """Some clips bend, and the error grows with the bend."""
    truth = bends(rng, clips, t0s, share)
    error = (0.02 + 0.3 * np.abs(truth)) * mixed(rng, clips, t0s)
    return Data(truth=truth, pred=SHARE * truth + error, clips=ids(clips, t0s))


def bimodal(rng: np.random.Generator, clips: int, t0s: int, *, share: float, often: float = SHARE) -> Data:
    """Some clips bend; of these the model takes 60 %, or so many, in full and drives straight through the others."""
    truth = bends(rng, clips, t0s, share)
    taken = np.repeat(rng.random(clips) < often, t0s)
    return Data(truth=truth, pred=taken * truth + 0.02 * mixed(rng, clips, t0s), clips=ids(clips, t0s))


def calibrated(rng: np.random.Generator, clips: int, t0s: int, *, known: float, share: float) -> Data:
    """A model without bias that knows a part of the variance, and draws the rest as the road does."""
    spread = np.where(rng.random(clips) < share, BEND, STRAIGHT).repeat(t0s)
    seen = spread * np.sqrt(known) * mixed(rng, clips, t0s)
    truth = seen + spread * np.sqrt(1 - known) * mixed(rng, clips, t0s)
    drawn = spread[:, None] * np.sqrt(1 - known) * rng.normal(size=(len(truth), PATHS))
    paths = seen[:, None] + drawn
    return _of_paths(truth, paths, clips, t0s)


def halved(rng: np.random.Generator, clips: int, t0s: int) -> Data:
    """A model that takes half of the turn, and is sure of it."""
    truth = bends(rng, clips, t0s, 1 / 3)
    error = (0.02 + 0.2 * np.abs(truth))[:, None] * rng.normal(size=(len(truth), PATHS))
    return _of_paths(truth, 0.5 * truth[:, None] + error, clips, t0s)


def forked(rng: np.random.Generator, clips: int, t0s: int) -> Data:
    """A model each of whose paths takes the turn or drives on, one as often as the other."""
    truth = bends(rng, clips, t0s, 1 / 3)
    taken = rng.random((len(truth), PATHS)) < 0.5
    return _of_paths(truth, taken * truth[:, None] + 0.02 * rng.normal(size=taken.shape), clips, t0s)


def _of_paths(truth: Array, paths: Array, clips: int, t0s: int) -> Data:
    noise = paths.var(axis=1, ddof=1) / PATHS
    return Data(truth=truth, pred=paths.mean(axis=1), noise=noise, clips=ids(clips, t0s))


def compared(rng: np.random.Generator, clips: int, t0s: int) -> Data:
    """Two models whose errors are alike in part; one takes 0.2 of the turn, the other 0.8."""
    truth = bends(rng, clips, t0s, 1 / 3)
    common = (0.02 + 0.3 * np.abs(truth)) * mixed(rng, clips, t0s)
    before = 0.2 * truth + common
    after = SHARE * truth + before + 0.2 * np.abs(truth) * mixed(rng, clips, t0s)
    return Data(truth=truth, pred=after, other=before, clips=ids(clips, t0s))


def errors(rng: np.random.Generator, clips: int, t0s: int) -> Data:
    """Differences of an error, with heavy tails."""
    gain = SHARE + np.repeat(rng.standard_t(4, size=clips), t0s) + rng.standard_t(4, size=clips * t0s)
    return Data(truth=np.ones_like(gain), pred=gain, clips=ids(clips, t0s))


def few_gains(rng: np.random.Generator, clips: int, t0s: int) -> Data:
    """Differences of an error that are 0 but for 15 % of the clips, as where only bends are learnt."""
    gain = np.where(rng.random(clips) < 0.15, rng.exponential(SHARE / 0.15, clips), 0.0).repeat(t0s)
    gain += 0.1 * rng.normal(size=clips * t0s)
    return Data(truth=np.ones_like(gain), pred=gain, clips=ids(clips, t0s))


def recalls(rng: np.random.Generator, clips: int, t0s: int, *, share: float) -> Data:
    """Whether the turn lies among the paths; the samples of a clip agree."""
    has = np.repeat(rng.random(clips) < share, t0s).astype(np.float64)
    return Data(truth=np.ones_like(has), pred=has, clips=ids(clips, t0s))


def drives(rng: np.random.Generator, clips: int, t0s: int) -> Data:
    """A few drives with a t0 every 2 s: bends last ten seconds or so, and so does what a model makes of them."""
    truth, pred, units = [], [], []
    for drive in range(clips):
        turning, error = (_wandering(rng, t0s) for _ in range(2))
        bend = BEND * turning * (np.abs(turning) > 1)
        truth.append(bend + STRAIGHT * rng.normal(size=t0s))
        pred.append(SHARE * truth[-1] + (0.02 + 0.3 * np.abs(bend)) * error)
        units += splitting_units([str(drive)] * t0s, [2.0 * step for step in range(t0s)])
    return Data(truth=np.concatenate(truth), pred=np.concatenate(pred), clips=units)


def _wandering(rng: np.random.Generator, steps: int) -> Array:
    """Unit normal series whose values five steps apart hardly agree."""
    kept = 0.6
    values: Array = signal.lfilter([np.sqrt(1 - kept**2)], [1.0, -kept], rng.normal(size=steps + 50))[50:]
    return values


def slope_pairs(data: Data) -> tuple[Array, Array]:
    return data.truth - data.truth.mean(), data.pred - (0 if data.other is None else data.other)


def mean_pairs(data: Data) -> tuple[Array, Array]:
    return data.truth, data.pred


def worlds() -> list[World]:
    def of_share(name: str, draw: Callable[..., Data], **more: Any) -> World:
        settings = {key: more.pop(key) for key in ("share", "often") if key in more}
        return World(
            name=f"share taken: {name}",
            true=settings.get("often", SHARE),
            draw=lambda rng, clips, t0s: draw(rng, clips, t0s, **settings),
            estimate=share_of,
            pairs=slope_pairs,
            **more,
        )

    def of_calibration(name: str, true: float, draw: Callable[..., Data], **settings: float) -> World:
        return World(
            name=f"calibration: {name}",
            true=true,
            draw=lambda rng, clips, t0s: draw(rng, clips, t0s, **settings),
            estimate=calibration_of,
            pairs=None,
        )

    return [
        of_share("all clips bend, errors alike", alike),
        of_share("1 in 3 bends, errors grow with the bend", growing, share=1 / 3),
        of_share("15 % bend, errors grow", growing, share=0.15),
        of_share("5 % bend, errors grow", growing, share=0.05),
        of_share("1 in 3 bends, taken or not", bimodal, share=1 / 3),
        of_share("15 % bend, taken or not", bimodal, share=0.15),
        of_share("1 in 3 bends, 9 in 10 taken", bimodal, share=1 / 3, often=0.9),
        of_share("all clips bend, 9 in 10 taken", bimodal, share=1.0, often=0.9),
        of_share("drives of 20 minutes", drives, clips=(2, 3, 6), t0s=(600,)),
        of_calibration("knows 0.6, all clips bend", 1.0, calibrated, known=0.6, share=1.0),
        of_calibration("knows 0.9, 1 in 3 bends", 1.0, calibrated, known=0.9, share=1 / 3),
        of_calibration("takes half, 1 in 3 bends", 2.0, halved),
        of_calibration("paths turn or not, 1 in 3 bends", 2.0, forked),
        World(
            name="difference of shares, 1 in 3 bends",
            true=SHARE,
            draw=compared,
            estimate=difference_of,
            pairs=slope_pairs,
        ),
        World(name="difference of errors, heavy tails", true=SHARE, draw=errors, estimate=mean_of, pairs=mean_pairs),
        World(name="difference of errors, 15 % gain", true=SHARE, draw=few_gains, estimate=mean_of, pairs=mean_pairs),
        World(
            name="turn among the paths, 0.8",
            true=0.8,
            draw=lambda rng, clips, t0s: recalls(rng, clips, t0s, share=0.8),
            estimate=recall_of,
            pairs=mean_pairs,
        ),
    ]


def student(x: Array, y: Array, *, has_intercept: bool) -> tuple[float, float]:
    """Student's t over samples, of equal variance and independent."""
    slope = float(x @ y / (x @ x))
    residual = y - slope * x - (y.mean() if has_intercept else 0.0)
    freedom = len(x) - 1 - has_intercept
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(residual @ residual / freedom / (x @ x)))
    return slope - half, slope + half


@lru_cache(maxsize=1)
def counts(clips: int, draws: int = 1000) -> NDArray[np.int64]:
    return np.random.default_rng(0).multinomial(clips, np.full(clips, 1 / clips), size=draws)


def percentile(x: Array, y: Array, clips: list[str], *, has_intercept: bool) -> tuple[float, float]:
    """Percentile bootstrap over clips."""
    index = np.unique(clips, return_inverse=True)[1]
    columns = [np.ones_like(x), x, y, x * y, x * x]
    sums = np.stack([np.bincount(index, column) for column in columns], axis=-1)
    n, sx, sy, sxy, sxx = (counts(len(sums)) @ sums).T
    with np.errstate(all="ignore"):
        found = (sxy - sx * sy / n) / (sxx - sx * sx / n) if has_intercept else sxy / sxx
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def measure(world: World, clips: int, t0s: int, *, sets: int, seed: int = 0) -> dict[str, Any]:
    """Coverage in one world with so many clips."""
    rng, started = np.random.default_rng(seed), time.perf_counter()
    hits: dict[str, list[bool]] = {}
    widths, spent_s, drawn, least = list[float](), 0.0, 0, min(LEAST_GIVEN, sets // 2)
    while drawn < sets or (len(widths) < least and drawn < MOST_SETS * sets):
        drawn += 1
        data = world.draw(rng, clips, t0s)
        before = time.perf_counter()
        interval = world.estimate(data)
        spent_s += time.perf_counter() - before
        if interval is None or not np.isfinite(interval.low):
            continue
        ends = {"covered": (interval.low, interval.high)}
        if world.pairs is not None:
            (x, y), has_intercept = world.pairs(data), world.pairs is not mean_pairs
            ends["percentile bootstrap"] = percentile(x, y, data.clips, has_intercept=has_intercept)
            ends["Student's t"] = student(x, y, has_intercept=has_intercept)
        for method, (low, high) in ends.items():
            hits.setdefault(method, []).append(low <= world.true <= high)
        widths.append(interval.high - interval.low)
    row: dict[str, Any] = {"world": world.name, "clips": clips, "t0s": t0s, "given": len(widths) / drawn}
    if len(widths) >= least:
        row |= {method: float(np.mean(each)) for method, each in hits.items()} | {"width": float(np.median(widths))}
    print(row, f"{time.perf_counter() - started:.1f} s", flush=True)
    return row | {"ms": 1e3 * spent_s / drawn}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sets", type=int, default=2000, help="data sets a row")
    parser.add_argument("--world", default="", help="only worlds with this in their name")
    options = parser.parse_args()
    rows = []
    for world in (each for each in worlds() if options.world in each.name):
        for clips in world.clips[:2] if options.quick else world.clips:
            for t0s in world.t0s[:1] if options.quick else world.t0s:
                rows.append(measure(world, clips, t0s, sets=40 if options.quick else options.sets))
    finish("intervals", rows, options)


if __name__ == "__main__":
    main()
