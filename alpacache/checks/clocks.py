"""Agreement of the clocks of pictures and poses: how the picture moves sideways against how the vehicle turns.

Half a second between both is no fault of either: all samples are sound, and what the model sees is not what the vehicle
does. So the sideways movement of the far field is compared with the turning of the poses at lags of up to 3 s, and at
lags that grow over a clip, as those of a clock do that runs too fast. Whether what fits best is known well enough shows
when parts of the film are left out: it must stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.glance import glance, most_at_once
from alpacache.checks.motion import Motion
from alpacache.checks.pictures import MIN_SHIFT_PX, MIN_TURN_RADPS, WIDTH_PX, Turn, far_field, shift_px
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource

STEP_US = 200_000
"""Time between two frames that are compared."""
LAG_STEP_S = 0.1
LAGS_S: Floats = np.arange(-30, 31) * np.float64(LAG_STEP_S)
BEYOND = 30
"""Lags beyond these on either side that are known, so that those of clocks which drift can be made of them."""
RATES: Floats = np.arange(-16, 17) * np.float64(0.005)
"""Rates by which a clock may run too fast; quartz is within 0.0001, a wrong frame rate is not."""
PAIRS = 300
"""Most pairs of frames to look at, all clips together."""
FEW = 10
"""Clips from which on half as many pairs are enough: more of them turn, and their samples take longer to read."""
PAIRS_A_CLIP = 50
"""Least pairs of a clip that is looked at; with many clips only those that turn most are."""
EARLY_US = 100_000_000
"""Part of a clip in which a clock that drifts has not gone too far to be recognised."""
MIN_TURNED_RAD = 0.3
"""Turning without which a clip tells nothing."""
PARTS = 8
APART_S = 0.2
"""Lag from which clocks count as apart, less its standard error; localisation filters lag by a tenth."""
SURE_S = 0.1
"""Lag that must lie below the best by two standard errors."""
MIN_LIKENESS = 0.5
MIN_PROMINENCE = 0.05
"""Least rise of the misfit at lags 1 s or more away from the best."""
MAX_ERROR_S = 0.1
DRIFT = 0.01
"""Rate from which a clock counts as one that drifts."""
SURE_DRIFT = 0.005
"""Rate that must lie below the best by two standard errors."""
DRIFTED_S = 0.35
"""Least change of the lag over what is compared: from turn to turn it differs by a tenth or so."""
SAME_FOCAL = 1.25
"""Largest ratio, either way, of a clip's pixels per radian to those of all clips together."""
APART_ERROR_S = 0.15
"""Greatest standard error of a lag that all clips' focal length makes clear."""
WORSE = 1.05
"""Least ratio of the movement that the common lag leaves unexplained in a clip to what its own lag does."""
OWN_SHARE, OTHER_SHARE = 0.3, 0.8
"""Most of the pictures' movement that a clip's own poses explain, and least that another's do, if they are another's.
Of sound clips, whatever the camera, more than 0.7 is explained."""
NEAR_S = 0.55
"""Lag beside the one that all clips show at which a clip's own poses may still explain its pictures."""
MIN_SEEN, SEEN = 15, 0.3
"""Least number and share of pairs whose movement is clear in such pictures."""
MIN_MOVED_PX = 2.0
"""Least movement of such pictures (root mean square)."""
LEFT_OVER = 0.8
"""Most of the variance that one lag leaves unexplained which a lag that grows may still leave."""


class Stretch(NamedTuple):
    """A part of a clip."""

    begin_us: int
    end_us: int
    turned_rad: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sideways:
    """Sideways movement of one clip's pictures, and the vehicle's turns at each lag."""

    clip_id: str
    pairs_us: NDArray[np.int64]
    """`[N, 2]` times of both frames."""
    seconds: Floats
    """`[N]` time since the clip's first pose."""
    shift_px: Floats
    """`[N]` pixels, right positive; NaN where that is not clear."""
    turned_rad: Floats
    """`[N, BEYOND + lags + BEYOND]`, left positive; NaN beyond the poses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LagCurve:
    """Likeness of both movements at each lag, over some clips."""

    lags_s: tuple[float, ...]
    """Positive: pictures carry later times than the poses of the same moments."""
    likeness: tuple[float | None, ...]
    """Correlation of both movements; negative where they go opposite ways; None where hardly anything overlaps."""
    best_s: float | None
    """The lag that fits best; None if it is not clear. That in the middle of what was compared if it grows."""
    error_s: float | None
    """Standard error of the best lag, by leaving out each eighth."""
    drift: float | None
    """Growth of the lag each second; None unless that is clear, and then `likeness` is that with this drift."""
    drift_error: float | None
    span_s: tuple[float, float] | None
    """First and last lag if it grows: at the beginning and at the end of what was compared."""
    focal_px: float | None
    """Pixels of 256 across that the picture moves for each radian of a turn; None if no lag is clear."""
    seconds: float
    """Length of film that was compared."""
    clips: tuple[str, ...]


def choose(motions: Mapping[str, Motion], *, suspects: Sequence[str] = ()) -> dict[str, list[Stretch]]:
    """Clip -> what to look at: the clips that turn most and `suspects` that turn at all, in their stretches that do."""
    most_pairs = PAIRS if len(motions) < FEW else PAIRS // 2
    pairs = max(PAIRS_A_CLIP, most_pairs // max(1, len(motions)))
    stretches = {clip_id: _stretches(motion, pairs * STEP_US) for clip_id, motion in motions.items()}
    turned = {clip_id: sum(part.turned_rad for part in parts) for clip_id, parts in stretches.items()}
    turning = [clip_id for clip_id in motions if turned[clip_id] > MIN_TURNED_RAD]
    most = sorted(turning, key=lambda clip_id: -turned[clip_id])[: most_pairs // pairs]
    return {clip_id: stretches[clip_id] for clip_id in turning if clip_id in {*most, *suspects}}


def _stretches(motion: Motion, length_us: int) -> list[Stretch]:
    """The stretches, at most this long together, in which the vehicle turns most: one early and one late, if both turn,
    since there a clock that drifts is seen best."""
    begin, end = int(motion.times_us[0]), int(motion.times_us[-1])
    if end - begin > length_us:
        middle = begin + min(end - begin, EARLY_US) // 2
        halves = [_stretch(motion, length_us // 2, *half) for half in ((begin, middle), (middle, 2 * middle - begin))]
        if min(half.turned_rad for half in halves) > MIN_TURNED_RAD:
            return halves
    return [_stretch(motion, length_us, begin, end)]


def _stretch(motion: Motion, length_us: int, begin_us: int, end_us: int) -> Stretch:
    """The part between these instants, at most this long, in which the vehicle turns most."""
    turned = np.abs(np.diff(motion.heading_rad)) * motion.moving[1:]
    gone, last = np.concatenate([[0.0], np.cumsum(turned)]), int(np.searchsorted(motion.times_us, end_us, side="right"))
    times = motion.times_us[:last]
    ends = np.minimum(np.searchsorted(times, times + length_us, side="right"), last) - 1
    gained = np.where(times >= begin_us, gone[ends] - gone[:last], -1.0)
    best = int(np.argmax(gained))
    return Stretch(int(times[best]), int(times[ends[best]]), float(gained[best]))


def sideways_of(source: RecordedSource, clip_id: str, motion: Motion, stretches: Sequence[Stretch]) -> Sideways | None:
    """Compare frames 0.2 s apart of these stretches; None if their pictures cannot be read."""
    chunk = most_at_once(source)
    try:
        stamps = source.frame_times_us(clip_id, FRONT_CAMERA)
        if (np.diff(stamps) <= 0).any():
            return None
        each = [_every_step(stamps, stretch) for stretch in stretches]
        wanted = np.concatenate(each)
        fields = [
            far_field(picture)
            for start in range(0, len(wanted), chunk)
            for picture in glance(source, clip_id, wanted[start : start + chunk], about_px=WIDTH_PX)
        ]
    except BadClipError:
        return None
    ends = np.cumsum([len(times) for times in each])
    firsts = [at for at in range(len(wanted) - 1) if at + 1 not in ends]  # the others are the last of a stretch
    if len(firsts) < 2:
        return None
    pairs = np.stack([wanted[firsts], wanted[np.array(firsts) + 1]], axis=1)
    shifts = [shift_px(fields[at], fields[at + 1], quick=True) for at in firsts]
    return Sideways(
        clip_id=clip_id,
        pairs_us=pairs,
        seconds=pairs.mean(axis=1) / 1e6 - motion.times_us[0] / 1e6,
        shift_px=np.array([np.nan if moved is None else moved for moved in shifts], dtype=np.float64),
        turned_rad=_turns(pairs, motion),
    )


def _every_step(stamps_us: NDArray[np.int64], stretch: Stretch) -> NDArray[np.int64]:
    """Times of frames of a stretch about `STEP_US` apart."""
    within = stamps_us[(stamps_us >= stretch.begin_us) & (stamps_us <= stretch.end_us)]
    steps = (within - stretch.begin_us + STEP_US // 4) // STEP_US
    times: NDArray[np.int64] = within[np.flatnonzero(np.diff(steps, prepend=-1))]
    return times


def _turns(pairs_us: NDArray[np.int64], motion: Motion) -> Floats:
    """`[N, BEYOND + lags + BEYOND]` how far the vehicle turns between both times `[N, 2]`, at each lag."""
    known_s, lags_s = motion.times_us / 1e6, LAG_STEP_S * np.arange(-BEYOND, len(LAGS_S) + BEYOND) + LAGS_S[0]
    before, after = (
        np.interp(times[:, None] / 1e6 - lags_s, known_s, motion.heading_rad, left=np.nan, right=np.nan)
        for times in pairs_us.T
    )
    return np.asarray(after - before)


def lag_curve(parts: Sequence[Sideways]) -> LagCurve | None:
    """The curve over some clips together; None if pictures never clearly moved."""
    seconds, shift, turned = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("seconds", "shift_px", "turned_rad")
    )
    known = np.isfinite(shift)
    seconds, shift, turned = seconds[known], shift[known], turned[known]
    if len(shift) < PAIRS_A_CLIP // 2 or not shift.any():
        return None
    middle_s = (seconds.min() + seconds.max()) / 2
    sums = np.stack([_sums(shift, _drifted(turned, rate * (seconds - middle_s))) for rate in RATES])
    steady = int(np.argmin(np.abs(RATES)))
    fit, rate = _fit(sums[steady : steady + 1], RATES[steady : steady + 1]), 0.0
    drifting = _fit(sums, RATES)
    change_s = drifting.rate * np.ptp(seconds)
    if drifting.is_clear and abs(change_s) > DRIFTED_S and _explains(drifting, fit):
        fit, rate = drifting, drifting.rate
    at = int(np.argmin(np.abs(RATES - rate)))
    likeness = _likeness(sums[at].sum(axis=0))
    return LagCurve(
        lags_s=tuple(round(float(lag), 1) for lag in LAGS_S),
        likeness=tuple(round(float(value), 4) if np.isfinite(value) else None for value in likeness),
        best_s=round(fit.lag_s, 2) if fit.is_clear else None,
        error_s=None if np.isnan(fit.error_s) else round(fit.error_s, 2),
        drift=round(rate, 4) if rate else None,
        drift_error=round(fit.rate_error, 4) if rate else None,
        span_s=(round(fit.lag_s - change_s / 2, 2), round(fit.lag_s + change_s / 2, 2)) if rate else None,
        focal_px=_slope(shift, turned, fit.lag_s) if fit.is_clear and not rate else None,
        seconds=round(len(shift) * STEP_US / 1e6, 1),
        clips=tuple(part.clip_id for part in parts),
    )


def own_lag_curve(part: Sideways, together: LagCurve | None) -> LagCurve | None:
    """The curve of one clip; `together`: that of all clips, for a lag that is not clear by the clip alone.

    A bend that hardly changes is alike at many lags, each with another focal length. That of all clips tells the lag
    of one whose clock is apart from theirs; of others nothing is said.
    """
    curve = lag_curve([part])
    if curve is None or curve.best_s is not None or together is None:
        return curve
    if together.best_s is None or together.focal_px is None:
        return curve
    known = np.isfinite(part.shift_px)
    sums = _sums(part.shift_px[known], part.turned_rad[known, BEYOND : BEYOND + len(LAGS_S)])
    whole = _explained(sums.sum(axis=0), together.focal_px)
    rests = [_explained(sums.sum(axis=0) - without, together.focal_px) for without in sums]
    if not all(np.isfinite(explained).any() for explained in (whole, *rests)):
        return curve
    _, lag_s, most = _best(whole[None], np.zeros(1))
    error_s = float(np.sqrt((PARTS - 1) * np.var([_best(rest[None], np.zeros(1))[1] for rest in rests])))
    left = 1 - float(whole[int(np.argmin(np.abs(LAGS_S - together.best_s)))])  # NaN where that lag is not known
    is_apart = abs(lag_s - together.best_s) >= APART_S and left > WORSE * (1 - most)
    if not is_apart or most < MIN_LIKENESS or error_s > APART_ERROR_S:
        return curve
    return replace(curve, best_s=round(lag_s, 2), error_s=round(error_s, 2))


def judge_pairing(part: Sideways, motions: Mapping[str, Motion], together: LagCurve | None) -> Check | None:
    """A check of `clocks` if a clip's pictures are those of another drive; None if they are not, or it is not clear.

    They clearly move, but hardly any of it is explained by the turns of the clip's own poses at about the lag that all
    clips show together. One of `motions` that does explain it, counted from its beginning, is named.
    """
    known = np.isfinite(part.shift_px)
    shift, pairs = part.shift_px[known], part.pairs_us[known]
    if known.sum() < max(MIN_SEEN, SEEN * len(known)) or np.sqrt((shift**2).mean()) < MIN_MOVED_PX:
        return None
    lag_s, focal_px = (0.0, None) if together is None else (together.best_s or 0.0, together.focal_px)
    near, begin_us = np.abs(LAGS_S - lag_s) < NEAR_S, motions[part.clip_id].times_us[0]

    def share(motion: Motion) -> float:
        turned = _turns(pairs + (motion.times_us[0] - begin_us), motion)[:, BEYOND : BEYOND + len(LAGS_S)]
        shares = _explained(_sums(shift, turned).sum(axis=0), focal_px)[near]
        return float(np.nanmax(shares, initial=0.0))

    own = share(motions[part.clip_id])
    if own > OWN_SHARE:
        return None
    shares = {clip_id: share(motion) for clip_id, motion in motions.items() if clip_id != part.clip_id}
    finding = f"the poses' turns explain {100 * own:.0f} % of how the pictures move sideways"
    best = max(shares, key=shares.__getitem__, default=None)
    if best is not None and shares[best] > OTHER_SHARE:
        finding += f", those of {best} {100 * shares[best]:.0f} %"
        remedy = "Were the pictures of clips exchanged? Put each beside the poses that were recorded with it."
        return verdict("clocks", finding, fail=remedy)
    if focal_px is None:
        return None
    remedy = "Are they of this drive? If so, find out how far the clocks of pictures and poses are apart."
    return verdict("clocks", finding, warn=remedy)


def turns_seen(part: Sideways, lag_s: float) -> list[Turn]:
    """Moments at which the vehicle turned and the picture clearly moved, with clocks that are this far apart."""
    turned = part.turned_rad[:, BEYOND + int(np.argmin(np.abs(LAGS_S - lag_s)))]
    with np.errstate(invalid="ignore"):
        clear = (np.abs(part.shift_px) >= MIN_SHIFT_PX) & (np.abs(turned) >= MIN_TURN_RADPS * STEP_US / 1e6)
    return [Turn(part.clip_id, bool(agrees)) for agrees in (part.shift_px[clear] > 0) == (turned[clear] > 0)]


def judge_clocks(curve: LagCurve | None) -> Check:
    """Judge whether the lag that fits best is small, and stays."""
    if curve is None:
        return not_judged("clocks", "hardly any turn with pictures that move")
    if curve.best_s is None:
        return not_judged("clocks", f"no lag fits clearly best over {curve.seconds:.0f} s of film")
    if curve.drift is not None and curve.span_s is not None:
        faster = "faster" if curve.drift > 0 else "slower"
        finding = f"the clock of the pictures runs {100 * abs(curve.drift):.1f} % {faster} than that of the poses: "
        finding += "the lag that fits best goes from {:+.1f} s to {:+.1f} s within a clip".format(*curve.span_s)
        remedy = "Take recorded times: were those of one of both counted up at a nominal rate, such as 10 a second?"
        return verdict("clocks", finding, warn=remedy)
    least_s = abs(curve.best_s) - (curve.error_s or 0.0)
    if least_s < APART_S or least_s - (curve.error_s or 0.0) < SURE_S:
        return verdict("clocks", f"pictures and poses agree to {max(0.1, abs(curve.best_s)):.1f} s")
    amount, (pictures, poses) = (
        f"{abs(curve.best_s):.1f} s",
        ("late", "early") if curve.best_s > 0 else ("early", "late"),
    )
    finding = f"the lag that fits best is {amount}: pictures are stamped {amount} {pictures}, or poses {amount} {poses}"
    remedy = (
        f"Find out which clock is wrong (times of arrival in place of exposure?), and shift its timestamps by {amount}."
    )
    return verdict("clocks", finding, warn=remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """The lag, and the rate at which it grows, at which both movements are most alike."""

    lag_s: float
    rate: float
    error_s: float
    """Standard errors by the jackknife over consecutive parts."""
    rate_error: float
    peak: float
    """Likeness there; that of mirrored pictures is turned round, they have clocks, too."""
    elsewhere: float
    """Greatest likeness 1 s or more beside it, at any rate."""

    @property
    def is_clear(self) -> bool:
        prominent = self.peak > MIN_LIKENESS and self.peak - self.elsewhere > MIN_PROMINENCE
        return bool(prominent and self.error_s < MAX_ERROR_S)


def _explains(drifting: _Fit, steady: _Fit) -> bool:
    """Tell whether a lag that grows is clear, and clearly better than one that does not."""
    surely = abs(drifting.rate) > DRIFT and abs(drifting.rate) - 2 * drifting.rate_error > SURE_DRIFT
    within = abs(drifting.rate) < RATES[-1]
    return bool(surely and within and 1 - drifting.peak**2 < LEFT_OVER * (1 - steady.peak**2))


def _drifted(turned: Floats, by_s: Floats) -> Floats:
    """`[N, lags]`: turns at the lags of `LAGS_S`, moved by these seconds `[N]`; NaN where that is unknown."""
    place = BEYOND + np.arange(len(LAGS_S)) + by_s[:, None] / LAG_STEP_S
    lower = np.clip(np.floor(place).astype(np.intp), 0, turned.shape[1] - 2)
    part, row = place - lower, np.arange(len(turned))[:, None]
    moved = np.where(part == 0, turned[row, lower], turned[row, lower] * (1 - part) + turned[row, lower + 1] * part)
    return np.where((part >= 0) & (part <= 1), moved, np.nan)


def _sums(shift: Floats, turned: Floats) -> Floats:
    """`[PARTS, 5, lags]` over each part: number of pairs, of known ones, and products of both movements."""
    known = np.isfinite(turned)
    turned, shifts = np.where(known, turned, 0.0), np.where(known, shift[:, None], 0.0)
    columns = np.stack([np.ones_like(turned), known, turned * shifts, turned**2, shifts**2], axis=1)
    return np.stack([part.sum(axis=0) for part in np.array_split(columns, PARTS)])


def _likeness(sums: Floats) -> Floats:
    """`[..., lags]` correlation through the origin, a lag each; NaN where fewer than half the pairs are known."""
    pairs, known, products, turns, shifts = np.moveaxis(sums, -2, 0)
    norms = np.sqrt(turns * shifts)
    return np.where((known >= 0.5 * pairs) & (norms > 1e-9), products / np.maximum(norms, 1e-12), np.nan)


def _explained(sums: Floats, focal_px: float | None) -> Floats:
    """`[lags]` share of the pictures' movement that turns explain at about this focal length, or at any (None); NaN as
    in `_likeness`."""
    pairs, known, products, turns, shifts = sums
    slope = products / np.maximum(turns, 1e-12)
    if focal_px is not None:
        slope = np.clip(slope, focal_px / SAME_FOCAL, focal_px * SAME_FOCAL)
    share = (2 * slope * products - slope**2 * turns) / np.maximum(shifts, 1e-12)
    return np.where((known >= 0.5 * pairs) & (shifts > 1e-9), share, np.nan)


def _fit(sums: Floats, rates: Floats) -> _Fit:
    """The best of these rates; `sums` are those of `_sums` for each."""
    whole = _likeness(sums.sum(axis=1))
    if not np.isfinite(whole).any():
        return _Fit(lag_s=0.0, rate=0.0, error_s=np.nan, rate_error=np.nan, peak=0.0, elsewhere=0.0)
    sign = -1.0 if -np.nanmin(whole) > np.nanmax(whole) else 1.0
    rate, lag_s, peak = _best(sign * whole, rates)
    rests = [sign * _likeness(sums.sum(axis=1) - sums[:, part]) for part in range(PARTS)]
    found = [_best(rest, rates)[:2] if np.isfinite(rest).any() else (np.inf, np.inf) for rest in rests]
    with np.errstate(invalid="ignore"):
        rate_error, error_s = np.sqrt((PARTS - 1) * np.var(found, axis=0))
    return _Fit(
        lag_s=lag_s,
        rate=rate,
        error_s=float(np.nan_to_num(error_s, nan=np.inf)),
        rate_error=float(np.nan_to_num(rate_error, nan=np.inf)),
        peak=peak,
        elsewhere=float(np.nanmax(sign * whole[:, np.abs(LAGS_S - lag_s) > 0.95], initial=-1.0)),
    )


def _best(likeness: Floats, rates: Floats) -> tuple[float, float, float]:
    """Rate, lag (s) and height of the peak of `[rates, lags]`, between grid points by parabolas."""
    row, column = np.unravel_index(int(np.nanargmax(likeness)), likeness.shape)
    lag_s = float(LAGS_S[column]) + LAG_STEP_S * _vertex(likeness[row, :], int(column))
    rate_step = float(rates[1] - rates[0]) if len(rates) > 1 else 0.0
    rate = float(rates[row]) + rate_step * _vertex(likeness[:, column], int(row))
    return rate, lag_s, float(likeness[row, column])


def _vertex(values: Floats, at: int) -> float:
    """Place of the parabola's vertex beside the peak `at`, in steps."""
    if not 0 < at < len(values) - 1 or not np.isfinite(around := values[at - 1 : at + 2]).all():
        return 0.0
    bend = around[0] - 2 * around[1] + around[2]
    return float((around[0] - around[2]) / (2 * bend)) if bend < -1e-12 else 0.0


def _slope(shift: Floats, turned: Floats, lag_s: float) -> float | None:
    """Pixels by which the picture moves for each radian, both movements being noisy; None if it moves the wrong way."""
    turns = _drifted(turned, np.full(len(turned), lag_s))[:, len(LAGS_S) // 2]
    known = np.isfinite(turns)
    turns, shift = turns[known], shift[known]
    ratio = float(np.sqrt((shift**2).sum() / max(1e-12, (turns**2).sum())))
    return round(ratio, 1) if (turns * shift).sum() > 0 else None
