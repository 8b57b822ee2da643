"""Generated drives: a road of known curvature and a car that follows it.

    make_drive:  _bend_times, speed  ->  bends  ->  _integrate: the road  ->  _drive_along: the car's poses

What a drive does is fixed relative to the default t0 of 5.1 s: a `late_curve` is exactly straight up to t0, so its
history says nothing and only the picture can tell which way, and how far, the path will bend. As on real roads, speeds
keep the lateral acceleration below what passengers accept: speed alone hints at how sharp a curve can be, not at its
side.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.poses import Track
from alpacache.driving.sample import DEFAULT_T0_US, FUTURE_S, Floats

Shape = Literal["straight", "early_curve", "late_curve", "curve_end", "fork", "s_curve", "recovery"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
"""Straight throughout; curving since before t0; beginning to curve after t0; straight again from around t0; parting
after t0 into two branches that mirror each other, of which only a route tells which is taken; beginning to curve after
t0, first to one side and then as much to the other; as any of the first three, but with a car that has drifted off the
middle of its lane by t0 and goes back to it."""

CLIP_US = 20_000_000
POSE_STEP_US = 50_000
Turn = tuple[int, Literal["left", "right"]]
"""Begin of a bend (us of the clip), and the side it leads to."""
SHARP_RAD = 0.5
"""Heading change from which `ClipKind` calls a curve sharp."""
_T0_S = DEFAULT_T0_US / 1e6
_RAMP_S = 0.6
"""Time that a bend takes to reach its full curvature."""
_LATERAL_MPS2 = 3.5
_SPEED_MPS = (5.0, 20.0)
_HEADING_RAD = (0.2, 1.2)
_FORK_RAD = 0.5
"""Least heading change of a branch: gentler ones lie over each other for long."""
_TURN_RAD = 0.1
"""Least heading change of a bend that a route speaks of."""
_RECOVERED: tuple[Shape, ...] = ("straight", "early_curve", "late_curve", "curve_end", "s_curve")
"""Roads on which a car recovers."""
_RECOVERED_LATER_S = (-4.0, 1.0)
"""Range by which their bends come later than elsewhere: a car that drives itself strays before, in and after them."""
_DRIFT_M, _ASKEW_RAD, _DRIFT_MPS = 1.5, 0.08, 0.9
"""Most that a car which recovers is off the middle, askew to the road, and drifting across it."""
_RETURN_S = 2.5
"""Time that its way back takes."""
_STRAY_S = 1.5
"""Time before t0 of even drift: as long as a history, so that only the picture tells where the lane is."""
_STRAYING_S = 2.5
"""Time that it takes until it drifts so."""
_S_GAP_S = 0.3
"""Driving time between the two bends of an S."""
_FINE_M = 0.05
"""Step of the integration along the road."""
_COARSE = 4
"""Fine steps between two rows of `Road.points`."""
_BEHIND_M, _AHEAD_M = 80.0, 180.0
"""Length of road before the start and after the end of a drive."""
Arc = Callable[[Any], Floats]
"""Driving time (s) to arc length (m)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipKind:
    """Course of the road around t0 = 5.1 s."""

    shape: Shape
    side: Literal["left", "right", "none"]
    strength: Literal["straight", "gentle", "sharp"]
    """`sharp` if heading changes by `SHARP_RAD` or more until t0 + 6.4 s."""
    onset_s: float | None
    """Begin of the curve in seconds after t0; None on a straight road."""
    heading_change_rad: float
    """Heading at t0 + 6.4 s less heading at t0, left positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """The centre of the ego lane, sampled every `spacing_m` from `start_m` on; the ego starts at arc length 0."""

    start_m: float
    spacing_m: float
    points: NDArray[np.float32]
    """`[M, 7]`: x, y, cosine and sine of heading, curvature, heading, arc length minus `start_m`. One array, so that a
    lookup reads one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """One clip's road and motion."""

    kind: ClipKind
    road: Road
    track: Track
    arc_m: Floats
    """`[N]` how far along the road the car is at each pose of `track`."""
    curve_starts_us: tuple[int, ...]
    turns: tuple[Turn, ...]
    """The bends that a route speaks of, in order."""
    branch: Road | None = None
    """The branch of a fork that is not taken."""


class _Bend(NamedTuple):
    """A stretch of constant curvature (1/m, left positive) with smooth ends, placed by driving time."""

    start_s: float
    end_s: float
    curvature: float


def make_drive(rng: np.random.Generator, shape: Shape) -> Drive:
    """Draw a 20 s drive of the given shape; the order of draws is part of what a seed means."""
    if shape != "recovery":
        return _draw(rng, shape)
    road = _RECOVERED[int(rng.integers(len(_RECOVERED)))]
    drive = _draw(rng, road, later_s=rng.uniform(*_RECOVERED_LATER_S))
    return replace(drive, kind=replace(drive.kind, shape=shape), track=_strayed(rng, drive))


def _draw(rng: np.random.Generator, shape: Shape, *, later_s: float = 0.0) -> Drive:
    """A drive along the middle of its lane; bends come so much later than their shape has them."""
    start_s, end_s = _bend_times(rng, shape)
    target = rng.uniform(*_HEADING_RAD) * rng.choice((-1.0, 1.0))
    if shape == "fork":
        target = float(np.sign(target) * max(abs(target), _FORK_RAD))
    inside_s = min(end_s, _T0_S + FUTURE_S) - max(start_s, _T0_S)
    inside_s = (end_s - start_s if shape == "curve_end" else inside_s) - _RAMP_S
    speed = rng.uniform(_SPEED_MPS[0], np.clip(_LATERAL_MPS2 * inside_s / abs(target), 6.0, _SPEED_MPS[1]))
    start_s, end_s = start_s + later_s, end_s + later_s
    swing, rate, phase = rng.uniform(0.0, 0.06), rng.uniform(0.2, 0.5), rng.uniform(0.0, 2 * np.pi)

    def arc(time_s: Any) -> Floats:
        wave = np.cos(rate * np.asarray(time_s) + phase) - np.cos(phase)
        return np.asarray(speed * (np.asarray(time_s) - swing / rate * wave), dtype=np.float64)

    limit = _LATERAL_MPS2 / speed**2
    curvature = float(np.clip(target / (speed * inside_s), -limit, limit))
    if shape == "straight":
        curvature = rng.uniform(-0.02, 0.02) / (speed * FUTURE_S)
    bends = [_Bend(start_s, end_s, curvature), *_extra_bends(rng, limit)]
    if shape == "s_curve":
        back_s = end_s + _S_GAP_S
        bends.insert(1, _Bend(back_s, back_s + end_s - start_s, -curvature))
    fine_arc, heading, xy, bent = _integrate(bends, arc)
    track, arcs = _drive_along(fine_arc, xy, heading, arc, offset_m=rng.uniform(-0.35, 0.35))
    columns = (xy[:, 0], xy[:, 1], np.cos(heading), np.sin(heading), bent, heading, fine_arc - fine_arc[0])
    points = np.stack([column[::_COARSE] for column in columns], axis=1).astype(np.float32)
    road = Road(start_m=float(fine_arc[0]), spacing_m=_FINE_M * _COARSE, points=points)
    change = float(np.diff(np.interp(arc(np.array([_T0_S, _T0_S + FUTURE_S])), fine_arc, heading))[0])
    kind = ClipKind(
        shape=shape,
        side="none" if shape == "straight" else "left" if curvature > 0 else "right",
        strength="straight" if shape == "straight" else "sharp" if abs(change) >= SHARP_RAD else "gentle",
        onset_s=None if shape == "straight" else start_s - _T0_S,
        heading_change_rad=change,
    )
    starts = tuple(round(bend.start_s * 1e6) for bend in bends if shape != "straight" or bend is not bends[0])
    return Drive(
        kind=kind,
        road=road,
        track=track,
        arc_m=arcs,
        curve_starts_us=starts,
        turns=tuple(sorted(_turn(bend) for bend in bends if abs(_turned(bend, arc)) >= _TURN_RAD)),
        branch=_mirrored(road) if shape == "fork" else None,
    )


def _turned(bend: _Bend, arc: Arc) -> float:
    """Heading change (rad) over a bend, approximately."""
    return bend.curvature * float(arc(bend.end_s) - arc(bend.start_s))


def _turn(bend: _Bend) -> Turn:
    return round(bend.start_s * 1e6), "left" if bend.curvature > 0 else "right"


def _mirrored(road: Road) -> Road:
    """The road with left for right, seen along x, which both follow until they part."""
    return replace(road, points=road.points * np.array([1, -1, 1, -1, -1, -1, 1], np.float32))


def _bend_times(rng: np.random.Generator, shape: Shape) -> tuple[float, float]:
    """Start and end of the main bend, in seconds of the clip."""
    if shape == "straight":
        return -30.0, 60.0
    if shape in ("late_curve", "fork"):
        start = rng.uniform(0.2, 2.0)
        return _T0_S + start, _T0_S + start + rng.uniform(3.0, FUTURE_S + 1.0 - start)
    if shape == "s_curve":
        start = rng.uniform(0.2, 1.0)
        return _T0_S + start, _T0_S + start + rng.uniform(2.2, 2.8)
    if shape == "early_curve":
        return _T0_S - rng.uniform(0.8, 4.0), _T0_S + rng.uniform(2.5, FUTURE_S + 1.0)
    return _T0_S - rng.uniform(3.0, 4.5), _T0_S + rng.uniform(-0.3, 0.8)


def _extra_bends(rng: np.random.Generator, limit: float) -> list[_Bend]:
    """Add one more bend to six of ten drives, for samples at a later t0: one at 5.1 s sees little of it."""
    start, length, strength = rng.uniform(15.0, 17.0), rng.uniform(2.0, 4.0), rng.uniform(-0.8, 0.8)
    if rng.uniform() < 0.4:
        return []
    return [_Bend(start, start + length, float(strength * min(limit, 0.05)))]


def _strayed(rng: np.random.Generator, drive: Drive) -> Track:
    """The drive's poses, but for a drift across the lane, and a way back to its middle that begins shortly before t0.

    Up to there the car drifts evenly, so that its history does not say where the lane is. Whoever learns from cars that
    are in the middle never sees how to come back to it (Ross et al. 2011, arXiv:1011.0686; Laskey et al. 2017,
    arXiv:1703.09327).
    """
    track, time_s = drive.track, drive.track.timestamps_us / 1e6
    back_s = _T0_S - rng.uniform(0.0, 1.0)
    speed = np.gradient(drive.arc_m, time_s)
    usual = lane_place(drive.road, track.xyz[0, :2], near_m=float(drive.arc_m[0]))[1]
    aside_m = rng.uniform(-_DRIFT_M, _DRIFT_M) - usual
    drift_mps = rng.uniform(-1.0, 1.0) * min(_DRIFT_MPS, _ASKEW_RAD * float(np.interp(back_s, time_s, speed)))
    even_s = back_s - _STRAY_S
    here, there = (even_s, aside_m - drift_mps * _STRAY_S, drift_mps), (back_s, aside_m, drift_mps)
    before = _between(time_s, (even_s - _STRAYING_S, 0.0, 0.0), here)
    after = _between(time_s, there, (back_s + _RETURN_S, -usual, 0.0))
    aside = np.select([time_s < even_s, time_s < back_s], [before, aside_m + drift_mps * (time_s - back_s)], after)
    z, w = track.quaternion_xyzw[:, 2:].T
    yaw = 2 * np.arctan2(z, w)
    left = np.stack([-np.sin(yaw), np.cos(yaw)], axis=1)
    turned = yaw + np.arctan2(np.gradient(aside, time_s), speed)
    zeros = np.zeros_like(yaw)
    return replace(
        track,
        xyz=track.xyz + np.concatenate([aside[:, None] * left, zeros[:, None]], axis=1),
        quaternion_xyzw=np.stack([zeros, zeros, np.sin(turned / 2), np.cos(turned / 2)], axis=1),
    )


def _between(time_s: Floats, begin: tuple[float, float, float], end: tuple[float, float, float]) -> Floats:
    """The smoothest way (a quintic, no acceleration at its ends) between two (time, place, speed); level beyond."""
    (begin_s, begin_m, begin_mps), (end_s, end_m, end_mps) = begin, end
    span = end_s - begin_s
    gone = np.clip((time_s - begin_s) / span, 0.0, 1.0)

    def place(x: Floats) -> Floats:
        return np.asarray(1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x * x))

    def lean(x: Floats) -> Floats:
        return np.asarray(x - x**3 * (6.0 - 8.0 * x + 3.0 * x * x))

    moved = begin_m * place(gone) + end_m * place(1.0 - gone)
    return np.asarray(moved + span * (begin_mps * lean(gone) - end_mps * lean(1.0 - gone)))


def _integrate(bends: list[_Bend], arc: Arc) -> tuple[Floats, Floats, Floats, Floats]:
    """Arc length, heading, position and curvature of the road every 5 cm; at arc length 0 it heads along x."""
    end = float(arc(CLIP_US / 1e6)) + _AHEAD_M
    origin = round(_BEHIND_M / _FINE_M)
    arcs: Floats = np.arange(-origin, int(end / _FINE_M) + 1) * np.float64(_FINE_M)
    curvature = np.zeros(len(arcs))
    for bend in bends:
        start, stop = float(arc(bend.start_s)), float(arc(bend.end_s))
        ramp = float(arc(bend.start_s + _RAMP_S)) - start
        curvature = curvature + bend.curvature * _smooth((arcs - start) / ramp) * _smooth((stop - arcs) / ramp)
    heading = _cumulate(curvature, origin)
    xy = np.stack([_cumulate(np.cos(heading), origin), _cumulate(np.sin(heading), origin)], axis=1)
    return arcs, heading, xy, curvature


def _cumulate(values: Floats, origin: int) -> Floats:
    """Trapezoid integral over arc length, zero at index `origin`."""
    total = np.cumsum(np.concatenate([[0.0], (values[1:] + values[:-1]) * (_FINE_M / 2)]))
    return np.asarray(total - total[origin])


def _smooth(x: Floats) -> Floats:
    """0 below 0, 1 above 1, a cubic between them that begins and ends level."""
    ramp = np.clip(x, 0.0, 1.0)
    return np.asarray(ramp * ramp * (3.0 - 2.0 * ramp))


def _drive_along(fine_arc: Floats, xy: Floats, heading: Floats, arc: Arc, *, offset_m: float) -> tuple[Track, Floats]:
    """Poses every 50 ms, `offset_m` to the left of the lane's centre and parallel to it, and their arc lengths."""
    stamps = np.arange(0, CLIP_US + 1, POSE_STEP_US, dtype=np.int64)
    arcs = arc(stamps / 1e6)
    yaw = np.interp(arcs, fine_arc, heading)
    centre = np.stack([np.interp(arcs, fine_arc, xy[:, axis]) for axis in (0, 1)], axis=1)
    left = np.stack([-np.sin(yaw), np.cos(yaw)], axis=1)
    zeros = np.zeros_like(yaw)
    track = Track(
        timestamps_us=stamps,
        xyz=np.concatenate([centre + offset_m * left, zeros[:, None]], axis=1),
        quaternion_xyzw=np.stack([zeros, zeros, np.sin(yaw / 2), np.cos(yaw / 2)], axis=1),
    )
    return track, arcs


def lane_place(road: Road, xy: Floats, *, near_m: float) -> tuple[float, float]:
    """Arc length (m) of the point of a road's centre line nearest to `xy` `[2]`, and how far to its left that is (m).

    Looked for within 40 m of `near_m` along the road.
    """
    first = max(0, int((near_m - 40.0 - road.start_m) / road.spacing_m))
    part = road.points[first : first + round(80.0 / road.spacing_m)].astype(np.float64)
    at = int(((part[:, :2] - xy) ** 2).sum(axis=1).argmin())
    x, y, cos, sin, _, _, along = part[at]
    dx, dy = xy[0] - x, xy[1] - y
    return float(along + road.start_m + dx * cos + dy * sin), float(dy * cos - dx * sin)
