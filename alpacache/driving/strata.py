"""Strata: kinds of samples, judged by the driven path alone, so that no model can move a sample between them.

About 4 % of samples at the default t0 are turns: an average over all of them hides a model that always drives straight.
`straight_history_late_curve` is the sharpest of the strata: nothing in the ego history announces the curve, so a model
that gets it right must have seen it. Thresholds are explained in docs/reference/metrics.md.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alpacache.driving.sample import DT_S, Floats

Turn: TypeAlias = Literal["straight", "gentle", "sharp"]
TURNS: tuple[Turn, ...] = get_args(Turn)
Direction: TypeAlias = Literal["none", "left", "right"]
Side: TypeAlias = Literal["left", "right", "straight"]
SpeedBand: TypeAlias = Literal["stopped", "slow", "medium", "fast"]

STRAIGHT_HEADING_RAD = np.deg2rad(5.0)
"""Below this final heading change, and inside the corridor, a path is straight."""
CORRIDOR_M = 2.0
"""Half the width of the straight corridor: lane width minus car width. Outside it the car has left the lane."""
SHARP_HEADING_RAD = np.deg2rad(30.0)
HISTORY_HEADING_RAD = np.deg2rad(1.5)
"""Largest range of headings over the 1.5 s of a straight history."""
HISTORY_END_HEADING_RAD = np.deg2rad(0.5)
"""Largest range over its last 0.5 s: a curve that has just begun is announced."""
HISTORY_END_STEPS = 5
LATE_CURVE_HEADING_RAD = np.deg2rad(10.0)
"""Smallest final heading change of a late curve: above what the history's tolerance extrapolates to (6.4 degrees)."""
MOVING_MPS = 1.0
"""Slower than this at t0, a straight history says nothing: the sample is no late curve."""
STANDING_M, _STANDING_STEPS = 0.3, 10
"""A vehicle that gets less far than this in a second stands."""
CURVATURE_STEPS, LEAST_DRIVEN_M = 10, 2.0
"""A curvature is taken over a second, and over so many metres at least."""
SPEED_BANDS_MPS: tuple[tuple[float, SpeedBand], ...] = ((0.5, "stopped"), (5.0, "slow"), (15.0, "medium"))
"""Upper ends of the bands of mean speed; beyond the last one is `fast`."""

STRAIGHT_HISTORY = "straight_history"
LATE_CURVE = "straight_history_late_curve"
TURN_STRATA = ("straight", "gentle", "sharp", "left", "right", LATE_CURVE)
"""Strata that are chosen by how far the driven path turns."""
STRATA = ("all", *TURN_STRATA[:-1], STRAIGHT_HISTORY, LATE_CURVE, "stopped", "slow", "medium", "fast")
"""Every stratum, in the order of tables. They overlap: turn, direction and speed each split `all` in their own way."""


def stratum_name(stratum: str) -> str:
    """Name of a stratum for people; data have the key itself."""
    return "curve after t0" if stratum == LATE_CURVE else stratum.replace("_", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strata:
    """The strata of one sample, and the numbers that decided them."""

    turn: Turn
    direction: Direction
    """`none` for a straight path."""
    straight_history: bool = False
    """Straight and moving through its history, whatever comes: only the image knows."""
    straight_history_late_curve: bool
    """Those with a straight history that curve afterwards."""
    speed: SpeedBand
    heading_change_rad: float
    """Heading at 6.4 s less heading at t0, unwrapped, left positive; while the vehicle stands it is held."""
    lateral_offset_m: float
    """y at 6.4 s in the ego frame at t0, left positive."""
    mean_speed_mps: float
    """Length of the driven path over its duration."""
    largest_curvature_pm: float = 0.0
    """Largest curvature of the driven path (1/m) over any second of it, whichever side it bends to."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the strata this sample counts in, in the order of `STRATA`."""
        late_curve = LATE_CURVE if self.straight_history_late_curve else None
        history = STRAIGHT_HISTORY if self.straight_history else None
        labels = ("all", self.turn, self.direction, self.speed, history, late_curve)
        return tuple(name for name in STRATA if name in labels)


def classify(history_xyz: ArrayLike, history_rot: ArrayLike, future_xyz: ArrayLike, future_rot: ArrayLike) -> Strata:
    """Find the strata of one sample from its driven poses: `[16, 3]`, `[16, 3, 3]`, `[64, 3]`, `[64, 3, 3]`.

    They are 10 Hz, in metres in the ego frame at t0, and vehicle-to-ego-frame rotations. Raises `ValueError` for shapes
    that do not fit or values that are not finite.
    """
    past, past_rot = checked_poses(history_xyz, history_rot, "history")
    future, turned = checked_poses(future_xyz, future_rot, "future")
    before, driven = heading(past_rot), np.concatenate([past[-1:], future])
    end, ahead = before[-1 - HISTORY_END_STEPS :], driven_heading(driven, np.concatenate([past_rot[-1:], turned]))
    change, lateral = float(ahead[-1] - ahead[0]), float(future[-1, 1])
    mean_speed = float(np.linalg.norm(np.diff(driven, axis=0), axis=-1).sum() / (len(future) * DT_S))
    straight_history = bool(
        np.ptp(before) <= HISTORY_HEADING_RAD
        and np.ptp(end) <= HISTORY_END_HEADING_RAD
        and np.linalg.norm(past[-1] - past[-2]) / DT_S >= MOVING_MPS
    )
    return Strata(
        turn=turn_of(change, lateral),
        direction=direction_of(change, lateral),
        straight_history=straight_history,
        straight_history_late_curve=straight_history and abs(change) >= LATE_CURVE_HEADING_RAD,
        speed=speed_band(mean_speed),
        heading_change_rad=change,
        lateral_offset_m=lateral,
        mean_speed_mps=mean_speed,
        largest_curvature_pm=float(curvatures(driven, ahead).max()),
    )


def heading(rot: ArrayLike) -> Floats:
    """Yaw of rotations `[..., T, 3, 3]` in radians `[..., T]`, unwrapped along T, left positive."""
    matrices = np.asarray(rot, dtype=np.float64)
    yaw: Floats = np.unwrap(np.arctan2(matrices[..., 1, 0], matrices[..., 0, 0]), axis=-1)
    return yaw


def driven_heading(xyz: ArrayLike, rot: ArrayLike) -> Floats:
    """Heading `[..., T]` of poses `[..., T, 3]`, `[..., T, 3, 3]` at 10 Hz, held while the vehicle stands.

    A standing vehicle does not turn, whatever its recorded headings say: at a red light their noise can be degrees.
    """
    points, yaw = np.asarray(xyz, dtype=np.float64)[..., :2], heading(rot)
    count, half = points.shape[-2], _STANDING_STEPS // 2
    first, last = np.clip(np.arange(count) - half, 0, None), np.clip(np.arange(count) + half, None, count - 1)
    covered = np.linalg.norm(points[..., last, :] - points[..., first, :], axis=-1)
    stands = covered < STANDING_M * (last - first) / _STANDING_STEPS
    turned = np.where(stands[..., 1:] & stands[..., :-1], 0.0, np.diff(yaw, axis=-1))
    held: Floats = yaw[..., :1] + np.concatenate([np.zeros_like(yaw[..., :1]), np.cumsum(turned, axis=-1)], axis=-1)
    return held


def curvatures(xyz: ArrayLike, headings: ArrayLike) -> Floats:
    """Unsigned curvature (1/m) over each second `[T - 10]` of a path `[T, 3]` at 10 Hz with these headings `[T]`.

    It is the change of heading over the distance, of which a metre or two say nothing: less than 2 m count as that. A
    path shorter than a second has one value.
    """
    steps = min(CURVATURE_STEPS, len(np.asarray(headings)) - 1)
    points, yaw = np.asarray(xyz, dtype=np.float64)[:, :2], np.asarray(headings, dtype=np.float64)
    way = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=-1))])
    driven = np.maximum(way[steps:] - way[:-steps], LEAST_DRIVEN_M)
    bent: Floats = np.abs(yaw[steps:] - yaw[:-steps]) / driven
    return bent


def turn_of(heading_change_rad: float, lateral_offset_m: float) -> Turn:
    """Straight is a small heading change inside the corridor; a lane change is gentle, however straight its end."""
    if abs(heading_change_rad) >= SHARP_HEADING_RAD:
        return "sharp"
    if abs(heading_change_rad) >= STRAIGHT_HEADING_RAD or abs(lateral_offset_m) > CORRIDOR_M:
        return "gentle"
    return "straight"


def turns_ahead(history_rot: NDArray[Any], future_xyz: NDArray[Any], future_rot: NDArray[Any]) -> list[Turn]:
    """The turns that `classify` finds for B samples, from the same arrays `[B, ...]`, which are not checked."""
    points = np.concatenate([np.zeros_like(future_xyz[:, :1]), future_xyz], axis=1)
    headings = driven_heading(points, np.concatenate([history_rot[:, -1:], future_rot], axis=1))
    changes, laterals = headings[:, -1] - headings[:, 0], future_xyz[:, -1, 1]
    return [turn_of(change, lateral) for change, lateral in zip(changes.tolist(), laterals.tolist(), strict=True)]


def direction_of(heading_change_rad: float, lateral_offset_m: float) -> Direction:
    """Side by the heading if it changes, else by where the path leaves the corridor."""
    if turn_of(heading_change_rad, lateral_offset_m) == "straight":
        return "none"
    leading = heading_change_rad if abs(heading_change_rad) >= STRAIGHT_HEADING_RAD else lateral_offset_m
    return "left" if leading > 0 else "right"


def side_of(lateral_offset_m: float) -> Side:
    """Side on which a path with this lateral offset at its end, left positive, has left the straight corridor."""
    if abs(lateral_offset_m) <= CORRIDOR_M:
        return "straight"
    return "left" if lateral_offset_m > 0 else "right"


def speed_band(mean_speed_mps: float) -> SpeedBand:
    """Name of the band that a mean speed falls into."""
    return next((name for upper_mps, name in SPEED_BANDS_MPS if mean_speed_mps < upper_mps), "fast")


def checked_poses(xyz: ArrayLike, rot: ArrayLike, name: str) -> tuple[Floats, Floats]:
    """Poses `[T, 3]` and `[T, 3, 3]` as float64. Raises ValueError, with their name, for other shapes or NaN."""
    points, matrices = np.asarray(xyz, dtype=np.float64), np.asarray(rot, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < 2 or matrices.shape != (*points.shape, 3):
        shapes = f"{points.shape} and {matrices.shape}"
        raise ValueError(f"{name} has shapes {shapes}, expected [T, 3] and [T, 3, 3] with T >= 2.")
    if not (np.isfinite(points).all() and np.isfinite(matrices).all()):
        raise ValueError(f"{name} holds values that are not finite.")
    return points, matrices
