"""Agreement of the clocks of pictures and poses: how the picture moves sideways against how the vehicle turns.

Half a second between both is no fault of either: all samples are sound, and what the model sees is not what the vehicle
does. So the sideways movement of the far field is compared with the turning of the poses at lags of up to 3 s. Whether
the lag that fits best is known well enough shows when parts of the film are left out: it must stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.motion import Motion
from alpacache.checks.pictures import MIN_SHIFT_PX, MIN_TURN_RADPS, Turn, far_field, shift_px
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource

STEP_US = 200_000
"""Time between two frames that are compared."""
LAGS_S: Floats = np.arange(-30, 31) * np.float64(0.1)
PAIRS = 300
"""Most pairs of frames to look at, all clips together."""
FEW = 10
"""Clips from which on half as many pairs are enough: more of them turn, and their samples take longer to read."""
PAIRS_A_CLIP = 50
"""Least pairs of a clip that is looked at; with many clips only those that turn most are."""
MIN_TURNED_RAD = 0.3
"""Turning without which a clip tells nothing."""
CHUNK = 16
"""Frames held at a time."""
PARTS = 8
APART_S = 0.25
"""Lag from which clocks count as apart; localisation filters lag by a tenth."""
SURE_S = 0.1
"""Lag that must lie below the best by two standard errors."""
MIN_LIKENESS = 0.5
MIN_PROMINENCE = 0.05
"""How much worse lags must fit that are 1 s or more from the best."""
MAX_ERROR_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sideways:
    """How pictures of one clip moved sideways, and how much the vehicle turned at each lag."""

    clip_id: str
    shift_px: Floats
    """`[N]` pixels, right positive; NaN where that is not clear."""
    turned_rad: Floats
    """`[N, lags]`, left positive; NaN beyond the poses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LagCurve:
    """Likeness of both movements at each lag, over some clips."""

    lags_s: tuple[float, ...]
    """Positive: pictures carry later times than the poses of the same moments."""
    likeness: tuple[float | None, ...]
    """Correlation of both movements; negative where they go opposite ways; None where hardly anything overlaps."""
    best_s: float | None
    """The lag that fits best; None if it is not clear."""
    error_s: float | None
    """Standard error of the best lag, by leaving out each eighth."""
    seconds: float
    """Length of film that was compared."""
    clips: tuple[str, ...]


def choose(motions: Mapping[str, Motion]) -> dict[str, tuple[int, int]]:
    """Clip -> first and last instant (us) to look at: the clips that turn most, in their stretches that do."""
    most_pairs = PAIRS if len(motions) < FEW else PAIRS // 2
    pairs = max(PAIRS_A_CLIP, most_pairs // max(1, len(motions)))
    stretches = {clip_id: _stretch(motion, pairs * STEP_US) for clip_id, motion in motions.items()}
    turned = {clip_id: stretch[2] for clip_id, stretch in stretches.items() if stretch[2] > MIN_TURNED_RAD}
    most = sorted(turned, key=lambda clip_id: -turned[clip_id])[: most_pairs // pairs]
    return {clip_id: stretches[clip_id][:2] for clip_id in motions if clip_id in most}


def _stretch(motion: Motion, length_us: int) -> tuple[int, int, float]:
    """Begin, end and turning of the part, at most this long, in which the vehicle turns most."""
    times, turned = motion.times_us, np.abs(np.diff(motion.heading_rad)) * motion.moving[1:]
    gone = np.concatenate([[0.0], np.cumsum(turned)])
    ends = np.minimum(np.searchsorted(times, times + length_us, side="right"), len(times)) - 1
    best = int(np.argmax(gone[ends] - gone))
    return int(times[best]), int(times[ends[best]]), float(gone[ends[best]] - gone[best])


def sideways_of(source: RecordedSource, clip_id: str, motion: Motion, begin_us: int, end_us: int) -> Sideways | None:
    """Compare frames 0.2 s apart of one stretch; None if its pictures cannot be read."""
    try:
        stamps = source.frame_times_us(clip_id, FRONT_CAMERA)
        stamps = stamps[(stamps >= begin_us) & (stamps <= end_us)]
        stamps = stamps[np.flatnonzero(np.diff((stamps - begin_us + STEP_US // 4) // STEP_US, prepend=-1))]
        if len(stamps) < 3 or (np.diff(stamps) <= 0).any():
            return None
        fields = [
            far_field(picture)
            for start in range(0, len(stamps), CHUNK)
            for picture in source.film(clip_id, FRONT_CAMERA, stamps[start : start + CHUNK])
        ]
    except BadClipError:
        return None
    shifts = [shift_px(before, after, quick=True) for before, after in pairwise(fields)]
    seconds, known_s = stamps / 1e6, motion.times_us / 1e6
    headings = [np.interp(seconds - lag, known_s, motion.heading_rad, left=np.nan, right=np.nan) for lag in LAGS_S]
    shift = np.array([np.nan if moved is None else moved for moved in shifts], dtype=np.float64)
    return Sideways(clip_id=clip_id, shift_px=shift, turned_rad=np.diff(np.array(headings), axis=1).T)


def lag_curve(parts: Sequence[Sideways]) -> LagCurve | None:
    """The curve over some clips together; None if pictures never clearly moved."""
    shift, turned = (np.concatenate([getattr(part, name) for part in parts]) for name in ("shift_px", "turned_rad"))
    known = np.isfinite(shift)
    shift, turned = shift[known], turned[known]
    if len(shift) < PAIRS_A_CLIP // 2 or not shift.any():
        return None
    whole = _likeness(shift, turned)
    best_s, error_s = None, None
    if np.isfinite(whole).any():
        sign = -1.0 if -np.nanmin(whole) > np.nanmax(whole) else 1.0  # mirrored pictures have clocks, too
        best_s, error_s = _best(sign * whole), _error(shift, turned, sign)
        elsewhere = sign * whole[np.abs(LAGS_S - best_s) > 0.95]
        peak = float(np.nanmax(sign * whole))
        if not (peak > MIN_LIKENESS and error_s < MAX_ERROR_S and peak - np.nanmax(elsewhere) > MIN_PROMINENCE):
            best_s = None
    return LagCurve(
        lags_s=tuple(round(float(lag), 1) for lag in LAGS_S),
        likeness=tuple(round(float(value), 4) if np.isfinite(value) else None for value in whole),
        best_s=None if best_s is None else round(best_s, 2),
        error_s=None if error_s is None else round(error_s, 2),
        seconds=round(len(shift) * STEP_US / 1e6, 1),
        clips=tuple(part.clip_id for part in parts),
    )


def turns_seen(part: Sideways, lag_s: float) -> list[Turn]:
    """Moments at which the vehicle turned and the picture clearly moved, with clocks that are this far apart."""
    turned = part.turned_rad[:, int(np.argmin(np.abs(LAGS_S - lag_s)))]
    with np.errstate(invalid="ignore"):
        clear = (np.abs(part.shift_px) >= MIN_SHIFT_PX) & (np.abs(turned) >= MIN_TURN_RADPS * STEP_US / 1e6)
    return [Turn(part.clip_id, bool(agrees)) for agrees in (part.shift_px[clear] > 0) == (turned[clear] > 0)]


def judge_clocks(curve: LagCurve | None) -> Check:
    """Judge whether the lag that fits best is small."""
    if curve is None:
        return not_judged("clocks", "hardly any turn with pictures that move")
    if curve.best_s is None:
        return not_judged("clocks", f"no lag fits clearly best over {curve.seconds:.0f} s of film")
    if abs(curve.best_s) < APART_S or abs(curve.best_s) - 2 * (curve.error_s or 0.0) < SURE_S:
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


def _likeness(shift: Floats, turned: Floats) -> Floats:
    """`[lags]` correlation through the origin, a lag each; NaN where fewer than half the pairs are known."""
    known = np.isfinite(turned)
    values = np.where(known, turned, 0.0)
    shifts = np.where(known, shift[:, None], 0.0)
    norms = np.sqrt((values**2).sum(axis=0) * (shifts**2).sum(axis=0))
    likeness: Floats = (values * shifts).sum(axis=0) / np.maximum(norms, 1e-12)
    return np.where((known.mean(axis=0) >= 0.5) & (norms > 1e-9), likeness, np.nan)


def _best(likeness: Floats) -> float:
    """Lag (s) of the highest likeness, between grid points by a parabola."""
    at = int(np.nanargmax(likeness))
    lag = float(LAGS_S[at])
    if 0 < at < len(likeness) - 1 and np.isfinite(around := likeness[at - 1 : at + 2]).all():
        bend = around[0] - 2 * around[1] + around[2]
        lag += 0.1 * float((around[0] - around[2]) / (2 * bend)) if bend < -1e-12 else 0.0
    return lag


def _error(shift: Floats, turned: Floats, sign: float) -> float:
    """Standard error (s) of the best lag, by the jackknife over consecutive parts."""
    lags = []
    for left_out in np.array_split(np.arange(len(shift)), PARTS):
        rest: NDArray[np.bool_] = np.ones(len(shift), dtype=bool)
        rest[left_out] = False
        likeness = sign * _likeness(shift[rest], turned[rest])
        if not np.isfinite(likeness).any():
            return float("inf")
        lags.append(_best(likeness))
    return float(np.sqrt((PARTS - 1) * np.var(lags)))
