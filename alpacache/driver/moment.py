"""A moment as a car knows it: the newest frames of its cameras and its poses up to now, made a sample like any other.

Frames are chosen and poses interpolated by the code that cuts samples from recordings, so a model sees live what it
would see of the same moment in a store. What a recording may leave to its source to refuse is refused here: arrays that
do not fit together, cameras that have stopped.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alpacache.driver.arguments import array, camera_names, whole
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.poses import Track, check_timestamps, frame_indices, history_alone, interpolate
from alpacache.driving.route import check_route
from alpacache.driving.sample import DT_S, HISTORY_STEPS, Floats, Sample, SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.recording import Shot, sample_of, wanted_frame_times_us

STALE_US = 200_000
"""Longest time by which one camera's newest frame may lie behind another's, or behind the newest pose."""
MAX_FRAME_AGE_US = 1_000_000
"""Longest time by which a frame may lie behind the instant that it stands for; poses have the same limit."""
_HISTORY_S = (HISTORY_STEPS - 1) * DT_S


def track_of_poses(poses: ArrayLike, times_us: ArrayLike, *, name: str) -> Track:
    """The track of poses `[m, 7]`: x y z (m) and qx qy qz qw, vehicle to world, at `[m]` times (us)."""
    values, stamps = array(poses, f"{name}: poses", np.float64), _stamps(times_us, what=f"{name}: pose times")
    if values.ndim != 2 or values.shape[1] != 7 or len(values) != len(stamps):
        raise UsageError(
            f"{name}: poses are {list(values.shape)} with {len(stamps)} times; expected [m, 7] (x y z in metres and "
            "qx qy qz qw, vehicle to world) with m times."
        )
    return Track(timestamps_us=stamps, xyz=values[:, :3], quaternion_xyzw=values[:, 3:])


def moment_of(
    frames: NDArray[np.uint8],
    frame_times_us: ArrayLike,
    track: Track,
    *,
    cameras: Sequence[str],
    count: int,
    t0_us: int | None,
    route: str | None,
    name: str,
) -> Sample:
    """The sample of a moment, its future empty.

    Args:
        frames: `[cameras, n, H, W, 3]` RGB, n of 1 or more at any rate.
        frame_times_us: `[cameras, n]`, or `[n]` where all cameras have the same.
        cameras: as `frames` has them, in any order; short names such as `front_wide` too.
        count: frames of each camera that the model sees, 0.1 s apart.
        t0_us: the moment; None: when the newest frame that every camera has was taken.

    Raises `UsageError` for arrays that do not fit together, `BadClipError` for frames or poses that do not reach far
    enough, and for what makes a recording unusable.
    """
    pictures, names = array(frames, f"{name}: frames"), camera_names(cameras, "cameras")
    if pictures.dtype != np.uint8 or pictures.ndim != 5 or pictures.shape[-1] != 3 or 0 in pictures.shape:
        shown = f"{pictures.dtype} {list(pictures.shape)}"
        raise UsageError(f"{name}: frames are {shown}; expected uint8 RGB [cameras, n, H, W, 3].")
    if len(names) != len(pictures) or len(set(names)) != len(names):
        raise UsageError(
            f"{name}: frames are of {len(pictures)} cameras, named are {', '.join(names) or 'none'}; expected one name "
            "for each, none twice."
        )
    stamps = _frame_stamps(frame_times_us, pictures.shape[:2], names, name=name)
    newest = stamps[:, -1]
    if (late := int(newest.max() - newest.min())) > STALE_US:
        slowest, fastest = names[int(newest.argmin())], names[int(newest.argmax())]
        reason = f"{slowest} shows {late / 1e6:.3f} s before the newest frame of {fastest}; its frames come late"
        raise BadClipError("short_clip", f"{name}: the newest frame of {reason}.")
    last_pose = int(track.timestamps_us[-1]) if len(track.timestamps_us) else None
    if t0_us is None:
        t0_us = int(newest.min())
        if last_pose is not None and last_pose - t0_us > STALE_US:
            reason = f"frames end at {t0_us / 1e6:.3f} s, {(last_pose - t0_us) / 1e6:.3f} s before the newest pose"
            raise BadClipError("short_clip", f"{name}: {reason}; they come late. Bring newer ones, or name t0_us.")
    t0_us = whole(t0_us, f"{name}: t0_us", expected="whole microseconds")
    if last_pose is not None and last_pose < t0_us:
        reason = f"poses end at {last_pose / 1e6:.3f} s, before the moment to drive from, {t0_us / 1e6:.3f} s"
        raise BadClipError("short_clip", f"{name}: {reason}; bring {_HISTORY_S:g} s of them up to it, or name t0_us.")
    where = f"{name} at {t0_us / 1e6:.3f} s"
    poses = history_alone(track, t0_us, where=where)
    wanted = wanted_frame_times_us(t0_us, count)
    places = [names.index(camera) for camera in sorted(names, key=CAMERAS.index)]
    rows = [_without_copy(_chosen(stamps[place], wanted, where=f"{where}: {names[place]}")) for place in places]
    shots: dict[str, Shot] = {}
    for place, row in zip(places, rows, strict=True):
        shots[names[place]] = pictures[place, row].transpose(0, 3, 1, 2), stamps[place, row]
    together = None
    if places == list(range(len(places))) and all(isinstance(row, slice) and row == rows[0] for row in rows):
        together = pictures[:, rows[0]].transpose(0, 1, 4, 2, 3)
    sample = sample_of(SampleRef(clip_id=name, t0_us=t0_us), poses, shots, None, together=together)
    try:
        text = check_route(route)
    except ValueError as error:
        raise BadClipError("bad_route", f"{where}: its route cannot go into a prompt: {error}.") from error
    return replace(sample, route=text)


def pose_at(track: Track, t0_us: int) -> tuple[Floats, Floats]:
    """Position `[3]` (m) and rotation `[3, 3]` of the vehicle in the world at a moment that the track covers."""
    xyz, rot = interpolate(track, np.array([t0_us], np.int64))
    return xyz[0], rot[0]


def _chosen(stamps: NDArray[np.int64], wanted: NDArray[np.int64], *, where: str) -> NDArray[np.int64]:
    """Index of the frame at or before each wanted time; a single frame is enough where one is wanted at its time.

    The newest stands for up to `STALE_US` after it: of a moment that is now, no later frame may be known. Raises
    `BadClipError` for a frame older than `MAX_FRAME_AGE_US`.
    """
    if 0 < wanted[-1] - stamps[-1] <= STALE_US:
        wanted = np.minimum(wanted, stamps[-1])
    if len(stamps) == 1 and len(wanted) == 1 and stamps[0] == wanted[0]:
        return np.zeros(1, np.int64)
    chosen = frame_indices(stamps, wanted, where=where)
    ages_s = (wanted - stamps[chosen]) / 1e6
    at = int(ages_s.argmax())
    if ages_s[at] > MAX_FRAME_AGE_US / 1e6:
        reason = f"the newest frame for {wanted[at] / 1e6:.3f} s is {ages_s[at]:.3f} s older"
        raise BadClipError("short_clip", f"{where}: {reason}; at most {MAX_FRAME_AGE_US / 1e6:g} s is taken.")
    return chosen


def _without_copy(chosen: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Indices that follow one another as a slice, which copies no pictures: 100 MB with four cameras of 1080p."""
    if len(chosen) and np.array_equal(chosen, np.arange(chosen[0], chosen[0] + len(chosen))):
        return slice(int(chosen[0]), int(chosen[-1]) + 1)
    return chosen


def _frame_stamps(
    times_us: ArrayLike, shape: tuple[int, ...], cameras: Sequence[str], *, name: str
) -> NDArray[np.int64]:
    """Times `[cameras, n]` of frames of that shape."""
    values = array(times_us, f"{name}: frame times")
    if values.shape not in (shape, shape[1:]):
        raise UsageError(
            f"{name}: frame times are {list(values.shape)} for frames [{shape[0]}, {shape[1]}, ...]; expected "
            f"[{shape[0]}, {shape[1]}] or [{shape[1]}]."
        )
    rows = zip(cameras, np.broadcast_to(values, shape), strict=True)
    return np.stack([_stamps(row, what=f"{name}: {camera}: frame times") for camera, row in rows])


def _stamps(times_us: ArrayLike, *, what: str) -> NDArray[np.int64]:
    """Whole microseconds `[n]`. Raises `UsageError` for anything else, such as seconds, `BadClipError` for disorder."""
    values = array(times_us, what)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise UsageError(f"{what} are {values.dtype} {list(values.shape)}; expected whole microseconds in one column.")
    stamps = values.astype(np.int64)
    if len(stamps) > 1:  # of fewer, what follows says what is missing
        check_timestamps(stamps, what=what)
    return stamps
