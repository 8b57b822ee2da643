"""A drive's poses at the rear axle, and the pieces that clips are made of.

The order matters: first the mount is taken out of the rotation, then the point is moved along the vehicle's axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.config import Mount, Triple
from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.driving.poses import Track, check_track
from alpacache.driving.sample import FRAME_STEP_US, FUTURE_STEPS, HISTORY_STEPS, STEP_US
from alpacache.errors import BadClipError

SHORTEST_US = STEP_US * (HISTORY_STEPS + FUTURE_STEPS) + FRAME_STEP_US
"""Shortest drive that gives a sample: 1.6 s before t0, 6.4 s after it, and a step that times need not fit."""
STRAIGHT_RADPS, FAST_MPS, LEAST_STRAIGHT_S = 0.02, 8.0, 5.0
"""A mount is estimated where the drive turns slower and goes faster than this, over so much time at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A track of the rear axle, and how it came from the log's."""

    track: Track
    record: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a drive that becomes a clip."""

    name: str
    begin_us: int
    end_us: int
    """First instant behind it; for the last piece, one beyond its last row."""
    track: Track


def settle(drive: LoggedDrive, *, offset_m: Triple | None, mount_deg: Mount | None) -> Settled:
    """Move a drive's poses to the rear axle; `offset_m` and `mount_deg` take the place of the drive's own.

    Raises `BadClipError` for poses that are none, and where a mount is to be estimated and cannot be.
    """
    from scipy.spatial.transform import Rotation

    track = drive.track
    check_track(track, where=drive.name)
    wanted = drive.mount_deg if mount_deg is None else mount_deg
    rotation = Rotation.from_quat(track.quaternion_xyzw)
    mount: dict[str, Any] = {"given": wanted}
    if wanted == "estimate":
        wanted, mount["found_on_s"] = estimated_mount(track, where=drive.name)
    mount["degrees"] = dict(zip(("yaw", "pitch", "roll"), wanted, strict=True))
    if any(wanted):
        rotation = rotation * Rotation.from_euler("ZYX", wanted, degrees=True).inv()
    offset = drive.origin_offset_m if offset_m is None else offset_m
    xyz = track.xyz + rotation.apply(offset) if any(offset) else track.xyz
    record = {
        "point": drive.point,
        "origin_offset_m": list(offset),
        "origin_offset_from": "preset" if offset_m is None else "option",
        "mount": mount,
    }
    settled = replace(track, xyz=xyz, quaternion_xyzw=rotation.as_quat())
    return Settled(track=settled, record=record)


def estimated_mount(track: Track, *, where: str) -> tuple[Triple, float]:
    """Yaw and pitch (degrees) of a sensor as seen from the direction of travel, and the seconds they were found on.

    The medians over straights at speed, where a vehicle goes where it points. Roll cannot be seen so and is 0. Pitch is
    against the slope of the path itself. Raises `BadClipError` with too little of such driving.
    """
    from scipy.spatial.transform import Rotation

    times_s = (track.timestamps_us - track.timestamps_us[0]) / 1e6
    span = max(1, round(0.5 / max(float(np.median(np.diff(times_s))), 1e-3)))  # half a second either way
    ahead, behind = np.arange(2 * span, len(times_s)), np.arange(len(times_s) - 2 * span)
    middle = (ahead + behind) // 2
    if not len(middle):
        reason = "too few poses to estimate the mount; give it as --mount YAW,PITCH,ROLL"
        raise BadClipError("wrong_frame", f"{where}: {reason}.")
    lasted = times_s[ahead] - times_s[behind]
    travel = (track.xyz[ahead] - track.xyz[behind]) / lasted[:, None]
    rotation = Rotation.from_quat(track.quaternion_xyzw)
    turned = (rotation[behind].inv() * rotation[ahead]).magnitude() / lasted
    speed = np.linalg.norm(travel, axis=1)
    straight = (turned < STRAIGHT_RADPS) & (speed > FAST_MPS) & (lasted < 2.0)
    on_s = float(np.gradient(times_s)[middle][straight].sum())
    if on_s < LEAST_STRAIGHT_S:
        raise BadClipError(
            "wrong_frame",
            f"{where}: {on_s:.1f} s of straight driving above {FAST_MPS:.0f} m/s, and estimating the mount takes "
            f"{LEAST_STRAIGHT_S:.0f} s; give it as --mount YAW,PITCH,ROLL (0,0,0 leaves it).",
        )
    seen = rotation[middle[straight]].inv().apply(travel[straight])  # the direction of travel, in the sensor's axes
    left = np.median(np.arctan2(seen[:, 1], seen[:, 0]))
    up = np.median(np.arctan2(seen[:, 2], np.hypot(seen[:, 0], seen[:, 1])))
    # Travel that is seen to the right comes of a sensor that looks left; travel seen above, of one that looks down.
    return (float(np.degrees(-left)), float(np.degrees(up)), 0.0), on_s


def pieces(drive: LoggedDrive, track: Track, clip_seconds: float | None) -> tuple[list[Piece], list[Dropped]]:
    """Cut what poses and all cameras cover into pieces; without `clip_seconds` it is one, with all rows.

    A rest too short for a sample stays with the piece before it.
    """
    clocks = [track.timestamps_us, *(camera.times_us for camera in drive.cameras.values())]
    if not all(len(clock) for clock in clocks):
        return [], [Dropped(what="drives", count=1, reason=f"{drive.name} has no poses or a camera without frames")]
    begin = max(int(clock[0]) for clock in clocks)
    end = min(int(clock[-1]) for clock in clocks)
    if end - begin < SHORTEST_US:
        lasts = f"{drive.name}: poses and cameras cover {max(0, end - begin) / 1e6:.1f} s together"
        return [], [Dropped(what="drives", count=1, reason=f"{lasts}; a sample takes {SHORTEST_US / 1e6:.1f} s")]
    if clip_seconds is None:
        whole = Piece(
            name=drive.name,
            begin_us=min(int(clock[0]) for clock in clocks),
            end_us=max(int(clock[-1]) for clock in clocks) + 1,
            track=track,
        )
        return [whole], []
    edges = [*range(begin, end, round(clip_seconds * 1e6)), end + 1]
    if len(edges) > 2 and edges[-1] - edges[-2] < SHORTEST_US:
        del edges[-2]
    digits = max(3, len(str(len(edges) - 2)))
    parts = [
        Piece(name=f"{drive.name}-{number:0{digits}d}", begin_us=first, end_us=last, track=_between(track, first, last))
        for number, (first, last) in enumerate(pairwise(edges))
    ]
    return parts, []


def frames_between(times_us: NDArray[np.int64], piece: Piece) -> tuple[int, int]:
    """Numbers of a piece's first frame and of the one behind its last."""
    first, last = np.searchsorted(times_us, [piece.begin_us, piece.end_us])
    return int(first), int(last)


def routes_between(routes: Sequence[tuple[int, str]], piece: Piece) -> list[tuple[int, str]]:
    """Texts of a piece, with the one that holds when it begins."""
    inside = [(time, text) for time, text in routes if piece.begin_us < time < piece.end_us]
    before = [text for time, text in routes if time <= piece.begin_us]
    return [(piece.begin_us, before[-1]), *inside] if before else inside


def check_drive(drive: LoggedDrive) -> None:
    """Raise `BadClipError` for times that do not increase."""
    for what, times in (
        *((name, camera.times_us) for name, camera in drive.cameras.items()),
        ("routes", np.array([time for time, _ in drive.routes], np.int64)),
    ):
        if len(times) > 1 and (np.diff(times) <= 0).any():
            at = int(np.argmax(np.diff(times) <= 0)) + 1
            raise BadClipError("time_order", f"{drive.name}: {what}: times do not increase at row {at}.")


def _between(track: Track, begin_us: int, end_us: int) -> Track:
    """Poses of a piece, with one beyond each end, so that it is covered."""
    first = max(int(np.searchsorted(track.timestamps_us, begin_us, side="right")) - 1, 0)
    last = int(np.searchsorted(track.timestamps_us, end_us)) + 1
    rows = slice(first, last)
    return Track(
        timestamps_us=track.timestamps_us[rows], xyz=track.xyz[rows], quaternion_xyzw=track.quaternion_xyzw[rows]
    )
