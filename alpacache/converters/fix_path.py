"""A smooth path with headings from a stretch of fixes, and what speaks against one.

A receiver says where it was, not how the vehicle went on to the next fix. So a path is made where fixes are dense, or
say speed and course that agree with the places, or where the vehicle's own speed and yaw rate lie beside them. What
the smoother does not know well enough is refused, with the number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.dead_reckoning import dead_reckoned
from alpacache.converters.fixes import Fixes
from alpacache.converters.geodesy import convergence_rad, enu_m
from alpacache.converters.log_files import UnusableError
from alpacache.converters.smoothing import fused, headings_of, smoothed
from alpacache.driving.poses import MAX_SPEED_MPS
from alpacache.driving.sample import Floats

OFTEN_S = 0.3
"""Median step up to which places alone make a path."""
MAX_HOLE_S = 0.5
"""Longest time without the vehicle's own speed and yaw rate."""
MIN_STILL_S = 1.0
"""Least standstill from which the yaw rate's bias is taken."""
GRID_S = 0.1
"""Longest step between two poses that are written."""
PLACE_M, SPEED_MPS, COURSE_RAD = 0.5, 0.15, 0.006
"""Errors of a receiver that does not tell its own, from one fix to the next: 10 Hz against a fused pose they were
0.26 m, 0.11 m/s and 0.32 degrees at 9 m/s and more."""
HEIGHT = 2.0
"""Factor by which heights are worse than places."""
MIN_COURSE_MPS = 1.0
"""Speed from which a receiver's course is taken."""
STILL_MPS = 0.05
"""Speed below which a vehicle stands."""
STANDING_MPS = 0.7
"""Smoothed speed below which the heading is held."""
MAX_PLACE_M, MAX_YAW_RAD = 1.0, float(np.deg2rad(2.0))
"""Most that the smoother may not know (median standard deviation while moving)."""
MAX_DISAGREEMENT_M = 0.6
"""Most by which the way between two fixes and that of speed and course may differ (median), at one fix a second."""
SPEED_RATIO = (0.85, 1.18)
"""Way by the log's speeds over that by its places, beyond which the speed is in another unit."""
MAX_COURSE_GAP_DEG, MIN_COURSES = 25.0, 10
MIN_TURNED_RAD, MIN_YAW_LIKENESS = 0.3, 0.5
TOLD = ("uncertainty", "moved by smoothing")
"""Facts of a smoothed path that a report tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothPath:
    """A smoothed stretch."""

    times_us: NDArray[np.int64]
    xyz: Floats
    yaw_rad: Floats
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class VehicleMotion:
    """Speed and yaw rate by the vehicle's own log."""

    times_us: NDArray[np.int64]
    speed_mps: Floats
    yaw_rate: Floats
    """rad/s, left positive; or, if `steering`, an angle of any unit, sign and offset."""
    steering: bool


def path_of(fixes: Fixes, begin: int, end: int, motion: VehicleMotion | None = None) -> SmoothPath:
    """A smoothed path over the rows of a stretch. Raises `UnusableError` with what makes it unusable."""
    rows = slice(begin, end)
    values = {name: column[rows] for name, column in fixes.values.items()}
    times_us = fixes.times_us[rows]
    heights = np.nan_to_num(values["height"], nan=float(np.nanmedian(values["height"])) if fixes.has("height") else 0.0)
    xyz = enu_m(values["latitude"], values["longitude"], heights)
    values["course"] = values["course"] - np.rad2deg(convergence_rad(values["latitude"], values["longitude"]))
    origin = f"latitude {values['latitude'][0]:.8f}, longitude {values['longitude'][0]:.8f}, height {heights[0]:.3f} m"
    facts = {"positions": "east, north, up (m) of the first fix on the WGS 84 ellipsoid", "origin": origin}
    seconds = (times_us - times_us[0]) / 1e6
    _check_places(seconds, xyz)
    _check_speed(seconds, xyz, values["speed"])
    _check_course(xyz, values["course"])
    spread = np.where(np.isfinite(values["accuracy"]), values["accuracy"], PLACE_M)
    step_s = float(np.median(np.diff(seconds)))
    if motion is None:
        _check_evidence(seconds, xyz, values, step_s)
    grid_us = _grid(times_us, motion)
    if motion is None:
        path, yaw, spreads, speed, more = _by_fixes(seconds, xyz, values, spread, (grid_us - times_us[0]) / 1e6)
    else:
        path, yaw, spreads, speed, more = _by_motion(times_us, xyz, values, spread, grid_us, motion)
    moving = speed > STANDING_MPS
    if not moving.any():
        raise UnusableError("the vehicle never moves, so nothing tells its heading")
    place_m, yaw_rad = (float(np.median(column[moving])) for column in spreads.T)
    if place_m > MAX_PLACE_M or yaw_rad > MAX_YAW_RAD:
        found = f"places are known to {place_m:.1f} m and headings to {np.rad2deg(yaw_rad):.1f} degrees"
        limits = f"at most {MAX_PLACE_M} m and {np.rad2deg(MAX_YAW_RAD):.0f} degrees are taken"
        raise UnusableError(f"{found}; {limits}. Record more fixes a second, or the vehicle's speed and yaw rate")
    facts |= {
        "fixes": f"{len(seconds)}, {step_s:.3f} s apart (median)",
        "uncertainty": f"{place_m:.2f} m and {np.rad2deg(yaw_rad):.2f} degrees by the smoother (median, moving)",
        **more,
    }
    return SmoothPath(times_us=grid_us, xyz=path, yaw_rad=yaw, facts=facts)


def driven_path(motion: VehicleMotion, begin: int, end: int) -> SmoothPath:
    """A path by speed and yaw rate alone, from where it begins: integrated, so it drifts.

    The yaw rate's bias is what it shows while the vehicle stands. Raises `UnusableError` for one that never moves.
    """
    rows = slice(begin, end)
    times_us, speed = motion.times_us[rows], motion.speed_mps[rows]
    if not (speed > STANDING_MPS).any():
        raise UnusableError("the vehicle never moves")
    stands = np.abs(speed) < STILL_MPS
    enough = float(np.median(np.diff(times_us))) / 1e6 * stands.sum() >= MIN_STILL_S
    bias = float(np.median(motion.yaw_rate[rows][stands])) if enough else 0.0
    xyz, quaternion = dead_reckoned((times_us - times_us[0]) / 1e6, speed, motion.yaw_rate[rows] - bias)
    facts = {
        "positions": "integrated from speed and yaw rate, not recorded; they drift, and east is where it first looks",
        "yaw rate bias": f"{bias:+.5f} rad/s, seen at standstill" if enough else "not known: the vehicle never stands",
    }
    yaw: Floats = np.unwrap(2 * np.arctan2(quaternion[:, 2], quaternion[:, 3]))
    return SmoothPath(times_us=times_us, xyz=xyz, yaw_rad=yaw, facts=facts)


def _by_fixes(
    seconds: Floats, xyz: Floats, values: Mapping[str, Floats], spread: Floats, grid_s: Floats
) -> tuple[Floats, Floats, Floats, Floats, dict[str, Any]]:
    """Path `[M, 3]`, headings, spreads of both `[M, 2]`, speeds on the grid, and what to report."""
    at = np.searchsorted(grid_s, seconds)
    measured, sigmas = np.full((len(grid_s), 3, 2), np.nan), np.full((len(grid_s), 3, 2), 1.0)
    measured[at, :, 0] = xyz
    sigmas[at, :, 0] = spread[:, None] * np.array([1.0, 1.0, HEIGHT])
    course = np.deg2rad(90 - values["course"])
    told = np.isfinite(course) & (values["speed"] >= MIN_COURSE_MPS)
    stands = values["speed"] < STILL_MPS  # a course is noise there, and the velocity nothing
    course = np.where(told, course, 0.0)
    speed_sigma = np.hypot(SPEED_MPS, COURSE_RAD * np.nan_to_num(values["speed"]))
    for axis, part in enumerate((np.cos(course), np.sin(course))):
        measured[at, axis, 1] = np.where(told, values["speed"] * part, np.where(stands, 0.0, np.nan))
        sigmas[at, axis, 1] = speed_sigma
    result = smoothed(grid_s, measured, sigmas)
    velocity = result.states[:, :2, 1]
    headings = headings_of(velocity, standing_mps=STANDING_MPS)
    if headings is None:
        raise UnusableError("the vehicle never moves, so nothing tells its heading")
    speed = np.hypot(*velocity.T)
    yaw_spread = result.spreads[:, :2, 1].max(axis=1) / np.maximum(speed, 1e-3)
    place_spread = result.spreads[:, :2, 0].max(axis=1)
    apart = np.linalg.norm(result.states[at, :2, 0] - xyz[:, :2], axis=1)
    more: dict[str, Any] = {
        "smoothing": "Rauch-Tung-Striebel over places, speed and course; heading is the course, held below "
        f"{STANDING_MPS} m/s",
        "moved by smoothing": f"{float(np.median(apart)):.2f} m (median), {float(apart.max()):.2f} m at most",
        "standing": f"{100 * float(headings.held.mean()):.0f} % of the time",
    }
    if headings.reversing.any():
        more["reversing"] = f"{100 * float(headings.reversing.mean()):.0f} % of the time, between two stops"
    return result.states[:, :, 0], headings.yaw_rad, np.stack([place_spread, yaw_spread], axis=1), speed, more


def _by_motion(
    times_us: NDArray[np.int64],
    xyz: Floats,
    values: Mapping[str, Floats],
    spread: Floats,
    grid_us: NDArray[np.int64],
    motion: VehicleMotion,
) -> tuple[Floats, Floats, Floats, Floats, dict[str, Any]]:
    """The same, along the vehicle's own speed and yaw rate."""
    grid_s, seconds = (grid_us - times_us[0]) / 1e6, (times_us - times_us[0]) / 1e6
    motion_s = (motion.times_us - times_us[0]) / 1e6
    _check_covered(motion_s, seconds[-1])
    speed = np.interp(grid_s, motion_s, motion.speed_mps)
    yaw_rate = np.interp(grid_s, motion_s, motion.yaw_rate)
    course = np.deg2rad(90 - values["course"])
    told = np.isfinite(course) & (np.interp(seconds, grid_s, speed) >= 2 * MIN_COURSE_MPS)
    chord = _chords(seconds, xyz)
    more: dict[str, Any] = {"smoothing": "Rauch-Tung-Striebel along speed and yaw rate, extended"}
    if motion.steering:
        yaw_rate, more["steering"] = _yaw_rate_of_steering(grid_s, speed, yaw_rate, chord)
    _check_turns(grid_s, yaw_rate, chord)
    at = np.searchsorted(grid_us, times_us)
    measured, sigmas = np.full((len(grid_s), 3), np.nan), np.full((len(grid_s), 3), 1.0)
    measured[at, :2], sigmas[at, :2] = xyz[:, :2], spread[:, None]
    measured[at, 2] = np.where(told, course, np.nan)
    sigmas[at, 2] = np.hypot(COURSE_RAD, SPEED_MPS / np.maximum(speed[at], 1.0))
    first = chord.yaw_rad[0]
    result = fused(grid_s, speed, yaw_rate, measured, sigmas, first_yaw_rad=float(first))
    heights, height_sigmas = np.full((len(grid_s), 1, 2), np.nan), np.ones((len(grid_s), 1, 2))
    heights[at, 0, 0], height_sigmas[at, 0, 0] = xyz[:, 2], spread * HEIGHT
    up = smoothed(grid_s, heights, height_sigmas, jerk=0.02).states[:, 0, 0]
    more["yaw rate bias"] = f"{float(result.states[-1, 3]):+.4f} rad/s"
    more["speed's scale"] = f"{1 + float(result.states[-1, 4]):.4f}"
    place_spread = result.spreads[:, :2].max(axis=1)
    path = np.column_stack([result.states[:, :2], up])
    return path, result.states[:, 2], np.stack([place_spread, result.spreads[:, 2]], axis=1), speed, more


def _check_covered(motion_s: Floats, end_s: float) -> None:
    """Refuse a vehicle's log with holes: speed and yaw rate are not made up."""
    known = np.concatenate([[0.0], motion_s[(motion_s > 0) & (motion_s < end_s)], [end_s]])
    hole_s, at = float(np.diff(known).max()), float(known[np.argmax(np.diff(known))])
    if hole_s > MAX_HOLE_S:
        raise UnusableError(
            f"no speed and yaw rate for {hole_s:.1f} s from {at:.1f} s on; at most {MAX_HOLE_S} s are bridged"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chord:
    """Directions from place to place, far enough apart."""

    seconds: Floats
    yaw_rad: Floats


def _chords(seconds: Floats, xyz: Floats, *, far_m: float = 4.0) -> _Chord:
    """Lay chords along the path. Raises `UnusableError` for a vehicle that does not get anywhere."""
    kept = [0]
    for row in range(1, len(xyz)):
        if np.hypot(*(xyz[row, :2] - xyz[kept[-1], :2])) >= far_m:
            kept.append(row)
    if len(kept) < 3:
        raise UnusableError("the vehicle never moves, so nothing tells its heading")
    moved = np.diff(xyz[kept, :2], axis=0)
    middle = (seconds[kept[1:]] + seconds[kept[:-1]]) / 2
    return _Chord(seconds=middle, yaw_rad=np.unwrap(np.arctan2(moved[:, 1], moved[:, 0])))


def _turned(grid_s: Floats, yaw_rate: Floats, chord: _Chord) -> tuple[Floats, Floats]:
    """Turns between chords, by the yaw rate and by the places."""
    gone = np.concatenate([[0.0], np.cumsum((yaw_rate[1:] + yaw_rate[:-1]) / 2 * np.diff(grid_s))])
    return np.diff(np.interp(chord.seconds, grid_s, gone)), np.diff(chord.yaw_rad)


def _check_turns(grid_s: Floats, yaw_rate: Floats, chord: _Chord) -> None:
    """Refuse a yaw rate that turns the other way than the places do."""
    told, seen = _turned(grid_s, yaw_rate, chord)
    if np.abs(seen).sum() < MIN_TURNED_RAD:
        return
    likeness = float((told * seen).sum() / max(1e-12, np.linalg.norm(told) * np.linalg.norm(seen)))
    if likeness < -MIN_YAW_LIKENESS:
        raise UnusableError("the yaw rate turns right where the places turn left; it must be left positive: negate it")


def _yaw_rate_of_steering(grid_s: Floats, speed: Floats, steering: Floats, chord: _Chord) -> tuple[Floats, str]:
    """Yaw rate = speed times (factor times angle + offset), both found where the places turn."""
    by_angle, seen = _turned(grid_s, speed * steering, chord)
    by_offset, _ = _turned(grid_s, speed, chord)
    if np.abs(seen).sum() < MIN_TURNED_RAD:
        raise UnusableError("it turns too little to tell what the steering's unit and sign are; give a yaw rate")
    (factor, offset), *_ = np.linalg.lstsq(np.stack([by_angle, by_offset], axis=1), seen, rcond=None)
    left = seen - factor * by_angle - offset * by_offset
    explained = 1 - float((left**2).sum() / (seen**2).sum())
    if explained < MIN_YAW_LIKENESS:
        raise UnusableError(f"the steering explains {100 * explained:.0f} % of the turns; is it that of this drive?")
    words = f"curvature {factor:.5g} per unit of the column, offset {offset:+.2g}/m, {100 * explained:.0f} % explained"
    return speed * (factor * steering + offset), words


def _check_places(seconds: Floats, xyz: Floats) -> None:
    """Refuse places that no vehicle drives to."""
    speed = float(np.median(np.linalg.norm(np.diff(xyz[:, :2], axis=0), axis=1) / np.diff(seconds)))
    if speed > MAX_SPEED_MPS:
        reason = f"it goes {speed:.0f} m/s from place to place; are the times in another unit, or degrees swapped?"
        raise UnusableError(reason)


def _check_course(xyz: Floats, course_deg: Floats) -> None:
    """Refuse courses that are not those of the places: of another zero, turning round or unit."""
    moved = xyz[2:, :2] - xyz[:-2, :2]
    told = np.deg2rad(90 - course_deg[1:-1])
    far = np.isfinite(told) & (np.linalg.norm(moved, axis=1) > 2 * PLACE_M)
    if far.sum() < MIN_COURSES:
        return
    apart = (np.arctan2(moved[far, 1], moved[far, 0]) - told[far] + np.pi) % (2 * np.pi) - np.pi
    median = float(np.rad2deg(np.median(np.abs(apart))))
    if median > MAX_COURSE_GAP_DEG:
        expected = "expected degrees, 0 = north, clockwise"
        raise UnusableError(f"courses and places are {median:.0f} degrees apart (median); {expected}")


def _check_speed(seconds: Floats, xyz: Floats, speed: Floats) -> None:
    """Refuse speeds in another unit than they are said to be in."""
    known = np.isfinite(speed)
    if known.sum() < 2:
        return
    way = np.linalg.norm(np.diff(xyz[known, :2], axis=0), axis=1)
    told = (speed[known][1:] + speed[known][:-1]) / 2 * np.diff(seconds[known])
    moving = told > 2 * np.diff(seconds[known])
    if way[moving].sum() < 100:
        return
    ratio = float(told[moving].sum() / way[moving].sum())
    if not SPEED_RATIO[0] <= ratio <= SPEED_RATIO[1]:
        names = {3.6: "speed_kmh", 2.237: "speed_mph", 1.944: "speed_knots"}
        likely = [name for factor, name in names.items() if abs(ratio / factor - 1) < 0.1]
        remedy = f"; name the column {likely[0]}" if likely else ""
        raise UnusableError(f"speeds are {ratio:.2f} times what the places say{remedy}")


def _check_evidence(seconds: Floats, xyz: Floats, values: Mapping[str, Floats], step_s: float) -> None:
    """Refuse rare fixes that do not say how the vehicle went on between them, or whose parts disagree."""
    if step_s <= OFTEN_S:
        return
    told = np.isfinite(values["speed"]) & (np.isfinite(values["course"]) | (values["speed"] < MIN_COURSE_MPS))
    remedy = "record 5 fixes a second or more, or the vehicle's speed and yaw rate beside them"
    if told.mean() < 0.9:
        lacking = f"{100 * (1 - told.mean()):.0f} % of them without speed and course"
        raise UnusableError(f"a fix each {step_s:.2f} s, {lacking}, does not tell the path between; {remedy}")
    course = np.deg2rad(90 - np.nan_to_num(values["course"]))
    velocity = (values["speed"] * np.array([np.cos(course), np.sin(course)])).T
    between = (velocity[1:] + velocity[:-1]) / 2 * np.diff(seconds)[:, None]
    apart = np.linalg.norm(np.diff(xyz[:, :2], axis=0) - between, axis=1)
    moving = np.linalg.norm(between, axis=1) > 1.0
    if moving.any() and (median := float(np.median(apart[moving]))) > MAX_DISAGREEMENT_M:
        found = f"places and speeds differ by {median:.2f} m from a fix to the next"
        raise UnusableError(f"a fix each {step_s:.2f} s, and {found} (median); {remedy}")


def _grid(times_us: NDArray[np.int64], motion: VehicleMotion | None) -> NDArray[np.int64]:
    """The times of fixes, those of a grid between them, and the vehicle's own where they are not denser than that."""
    step_us = round(GRID_S * 1e6)
    grid = np.arange(times_us[0], times_us[-1], step_us)
    if motion is not None:
        within = motion.times_us[(motion.times_us > times_us[0]) & (motion.times_us < times_us[-1])]
        if len(within) and np.median(np.diff(within)) >= 0.02e6:
            grid = within
    near = np.searchsorted(times_us, grid).clip(1, len(times_us) - 1)
    apart = np.minimum(np.abs(times_us[near] - grid), np.abs(times_us[near - 1] - grid))
    return np.union1d(times_us, grid[apart > 0.02e6])
