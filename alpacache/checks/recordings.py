"""Checks of one clip's clocks, poses and frames: units of time, rates, gaps, jumps.

A wrong unit of time is corrected before anything else is judged, so that one mistake is reported once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.driving.poses import (
    JUMP_SLACK_M,
    JUMP_SLACK_RAD,
    MAX_GAP_US,
    MAX_SPEED_MPS,
    MAX_TURN_RATE_RADPS,
    NOT_FINITE,
    QUATERNION_NORM_SLACK,
    Track,
    finite_poses,
    sample_times_us,
)
from alpacache.driving.sample import Floats, Sample
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource

JUMP_M = 1.0
"""Least step off the course of the neighbouring poses that counts as a jump; localisation noise is centimetres."""
JUMP_MPS = 10.0
NEIGHBOURS = 7
MIN_HZ = 9.5
"""Rate from which on poses and frames count as 10 a second: cameras and loggers are a few per cent off."""
CORNER_MPS = 1.0
"""Speed from which on a path is looked at for corners."""
CORNER = 0.2
"""Change of velocity at a pose that makes a corner, as a share of the root mean square."""
MIN_CORNER_MPS = 0.02
MIN_CORNERS = 5
STRAIGHT_SHARE = 0.6
"""Least share of poses at which an interpolated path goes straight on."""
REGULAR = 0.8
"""Least share of corners that are sharp, and of times between them that are whole periods, to a tenth."""
MIN_PERIOD_S = 0.19
"""Shortest period that matters; samples hold poses 0.1 s apart."""
STALE_US = 200_000
"""Longest gap between frames that is not reported: a sample's frames are 0.1 s apart."""
DAY_US = 86_400_000_000
MAX_LOST = 0.01
MAX_JITTER = 0.3
MIN_OVERLAP = 0.8
_UNITS = {"milliseconds": 1e3, "nanoseconds": 1e-3, "seconds": 1e6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Poses (vehicle to world) and frame times of one clip."""

    track: Track
    frame_times_us: Mapping[str, NDArray[np.int64]]
    """Frame times of each camera that the clip has."""
    missing: Mapping[str, str]
    """Camera that the clip lacks -> why."""


def read_recording(source: RecordedSource, clip_id: str, cameras: Sequence[str]) -> Recording:
    """A clip of a source; `BadClipError` if its poses cannot be read."""
    frame_times: dict[str, NDArray[np.int64]] = {}
    missing = {}
    for camera in cameras:
        try:
            frame_times[camera] = source.frame_times_us(clip_id, camera)
        except BadClipError as error:
            missing[camera] = str(error)
    return Recording(track=source.track(clip_id), frame_times_us=frame_times, missing=missing)


def recording_of(sample: Sample) -> Recording:
    """The 8 s that a sample holds, in its ego frame, for sources that have samples only."""
    from scipy.spatial.transform import Rotation

    rot = np.concatenate([sample.history_rot, sample.future_rot]).astype(np.float64)
    track = Track(
        timestamps_us=sample_times_us(sample.ref.t0_us),
        xyz=np.concatenate([sample.history_xyz, sample.future_xyz]).astype(np.float64),
        quaternion_xyzw=Rotation.from_matrix(rot).as_quat(),
    )
    stamps = dict(zip(sample.cameras, sample.frame_timestamps_us, strict=True))
    return Recording(track=track, frame_times_us=stamps, missing={})


def time_unit(timestamps: NDArray[np.int64]) -> str:
    """`microseconds`, or the unit that fits the steps better, given 1 to 2,000 timestamps a second in any order."""
    if len(timestamps) < 3:
        return "microseconds"
    steps = np.diff(np.sort(timestamps))
    if (steps == 0).mean() > 0.5 and steps.any():
        return "microseconds" if steps[steps > 0].min() >= 1_000 else "seconds"
    step = float(np.median(steps))
    if step > 1.5e6 or np.abs(timestamps).max() > 1e17:
        return "nanoseconds"
    return "milliseconds" if 1 <= step < 500 else "microseconds"


def in_microseconds(recording: Recording) -> Recording:
    """The recording with times in other units converted."""
    track = recording.track
    return replace(
        recording,
        track=replace(track, timestamps_us=_converted(track.timestamps_us)),
        frame_times_us={camera: _converted(stamps) for camera, stamps in recording.frame_times_us.items()},
    )


def check_times(recording: Recording) -> Check:
    """Units of time, and whether timestamps increase."""
    clocks = {"poses": recording.track.timestamps_us, **recording.frame_times_us}
    units = {what: time_unit(stamps) for what, stamps in clocks.items()}
    wrong = {what: unit for what, unit in units.items() if unit != "microseconds"}
    if wrong:
        finding = ", ".join(f"timestamps of {what} are in {unit}" for what, unit in wrong.items())
        factors = " and ".join(sorted({f"{_UNITS[unit]:g}" for unit in wrong.values()}))
        remedy = f"Write whole microseconds: multiply these timestamps by {factors}."
        return verdict("times", f"{finding}, by their steps", fail=remedy)
    for what, stamps in clocks.items():
        steps = np.diff(stamps)
        back = np.flatnonzero(steps <= 0)
        if len(back):
            finding = f"timestamps of {what} do not increase in {len(back)} rows, the first is row {int(back[0]) + 1}"
            if (steps == 0).mean() <= 0.5:
                return verdict("times", finding, fail="Sort the rows by timestamp and drop duplicates.")
            finest = f"{steps[steps > 0].min() / 1e6:g} s" if (steps > 0).any() else "no step at all"
            finding += f"; most repeat the time before, the clock's finest step is {finest}"
            return verdict("times", finding, fail="Export times with their fractions, such as those of GPS sentences.")
    return verdict("times", f"microseconds, {np.ptp(recording.track.timestamps_us) / 1e6:.1f} s of poses")


def _duration(time_us: int) -> str:
    return f"{time_us / 1e6:.2f} s" if time_us < DAY_US else f"{time_us / DAY_US:.0f} days"


def check_poses(track: Track) -> Check:
    """Rate, gaps and jumps."""
    finite = finite_poses(track)
    track = Track(
        timestamps_us=track.timestamps_us[finite], xyz=track.xyz[finite], quaternion_xyzw=track.quaternion_xyzw[finite]
    )
    gaps_us: NDArray[np.int64] = np.diff(track.timestamps_us)
    if len(gaps_us) < 2 or (gaps_us <= 0).any():
        return not_judged("poses", "no poses in the order of time")
    rate = 1e6 / float(np.median(gaps_us))
    holes, leaps = np.flatnonzero(gaps_us > MAX_GAP_US), jumps(track)
    faults = {}
    if len(leaps):
        fault = f"{len(leaps)} jump{'s' * (len(leaps) > 1)}, the first at {track.timestamps_us[leaps[0]] / 1e6:.2f} s"
        faults[fault] = "Localisation was reset there: cut the clip in two, or keep t0 away from it."
    if len(holes):
        fault = f"{len(holes)} gap{'s' * (len(holes) > 1)} above 1 s"
        faults[fault] = "Samples across a gap are refused; cut the clip there."
        if gaps_us.max() > DAY_US:
            faults[fault] = "A clock was set while it ran: drop the poses before that."
    period_s = corner_period_s(track)
    if period_s is not None:
        fault = f"positions were interpolated along straight lines between points {period_s:.2g} s apart"
        remedy = "Export positions of a filter that follows speed and yaw rate: paths with corners teach to drive so."
        faults[fault] = remedy
    if rate < MIN_HZ:
        remedy = "Export poses at 10 Hz or more: between them a curve is only interpolated."
        faults["fewer than 10 poses a second"] = remedy
    finding = "; ".join([f"{rate:.4g} Hz, longest gap {_duration(int(gaps_us.max()))}", *faults])
    return verdict("poses", finding, warn=" ".join(faults.values()))


def jumps(track: Track) -> NDArray[np.int64]:
    """Indices of poses after which the vehicle leaps, which `extract` refuses, or leaves its neighbours' course."""
    from scipy.ndimage import median_filter

    gaps_s = np.diff(track.timestamps_us) / 1e6
    moved = np.diff(track.xyz, axis=0)
    velocity = moved / gaps_s[:, None]
    off_mps = np.linalg.norm(velocity - median_filter(velocity, size=(NEIGHBOURS, 1), mode="nearest"), axis=1)
    leaps = (off_mps > JUMP_MPS) & (off_mps * gaps_s > JUMP_M)
    unit = track.quaternion_xyzw / np.maximum(np.linalg.norm(track.quaternion_xyzw, axis=1, keepdims=True), 1e-9)
    turned = 2 * np.arccos(np.clip(np.abs((unit[1:] * unit[:-1]).sum(axis=1)), 0, 1))
    leaps |= turned > MAX_TURN_RATE_RADPS * gaps_s + JUMP_SLACK_RAD
    if np.median(np.linalg.norm(velocity, axis=1)) < MAX_SPEED_MPS:  # otherwise all poses are in another unit
        leaps |= np.linalg.norm(moved, axis=1) > MAX_SPEED_MPS * gaps_s + JUMP_SLACK_M
    return np.flatnonzero(leaps)


def corner_period_s(track: Track) -> float | None:
    """Time between the corners of a path that was interpolated linearly; None for one that bends as a drive does.

    Between corners, velocity stays as it is, so it changes at few poses, at regular times. That of positions on a grid
    does so, too, but comes back at once.
    """
    times_s = (track.timestamps_us - track.timestamps_us[0]) / 1e6
    velocity: Floats = np.diff(track.xyz, axis=0) / np.diff(times_s)[:, None]
    change = np.linalg.norm(np.diff(velocity, axis=0), axis=1)
    speed = np.linalg.norm(velocity, axis=1)
    moving = np.minimum(speed[1:], speed[:-1]) > CORNER_MPS
    if not moving.any():
        return None
    is_corner = moving & (change > CORNER * np.sqrt((change[moving] ** 2).mean()))
    edges = np.diff(is_corner.astype(np.int8), prepend=0, append=0)
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if len(begins) < MIN_CORNERS or is_corner.sum() > (1 - STRAIGHT_SHARE) * moving.sum():
        return None
    size = np.add.reduceat(np.where(is_corner, change, 0.0), begins)
    kept = np.linalg.norm(velocity[ends] - velocity[begins], axis=1) > 0.9 * size
    is_sharp = kept & (ends - begins <= 2)  # two where the corner lies between two poses
    corners_s = np.add.reduceat(np.where(is_corner, change * times_s[1:-1], 0.0), begins) / size
    spacing_s = np.diff(corners_s)
    period_s = float(np.median(spacing_s))
    periods = spacing_s / period_s
    is_regular = (np.abs(periods - np.round(periods)) < 0.1) & (periods > 0.5)
    if min(is_sharp.mean(), is_regular.mean()) < REGULAR or np.median(size) < MIN_CORNER_MPS:
        return None
    return period_s if period_s > MIN_PERIOD_S else None


def check_frames(recording: Recording) -> Check:
    """Rate, jitter, missing frames, and whether frames were taken while poses were recorded."""
    faults = {f"no {camera}": message.rpartition(": ")[2] for camera, message in recording.missing.items()}
    status, rates, span = "fail" if faults else "warn", [], _span(recording.track.timestamps_us)
    for camera, stamps in recording.frame_times_us.items():
        steps: NDArray[np.int64] = np.diff(stamps)
        if len(steps) < 9 or (steps <= 0).any():
            continue
        rates.append(1e6 / float(np.median(steps)))
        overlap = (min(stamps[-1], span[1]) - max(stamps[0], span[0])) / (stamps[-1] - stamps[0])
        if overlap <= 0:
            status = "fail"
            film, poses = (f"{begin / 1e6:.1f} s to {end / 1e6:.1f} s" for begin, end in (stamps[[0, -1]], span))
            faults[f"{camera}: frames from {film}, but poses from {poses}"] = "Put poses and frames on one clock."
        else:
            faults |= {f"{camera}: {fault}": remedy for fault, remedy in _frame_faults(steps, overlap).items()}
    if not rates and not faults:
        return not_judged("frames", "too few frame times")
    low, high = min(rates, default=0.0), max(rates, default=0.0)
    rate = f"{low:.4g} Hz" if high < 1.02 * low else f"{low:.4g} to {high:.4g} Hz"
    finding = "; ".join([rate, *faults] if rates else faults)
    return verdict("frames", finding, **{status: " ".join(dict.fromkeys(faults.values()))})


def _span(stamps: NDArray[np.int64]) -> tuple[int, int]:
    return int(stamps.min()), int(stamps.max())


def _frame_faults(steps_us: NDArray[np.int64], overlap: float) -> dict[str, str]:
    """Fault -> remedy of one camera."""
    step = float(np.median(steps_us))
    lost = int(np.maximum(np.round(steps_us / step) - 1, 0).sum())
    regular = steps_us[steps_us < 1.5 * step]
    jitter = float(np.percentile(np.abs(regular - step), 95)) / step
    faults = {}
    if lost > MAX_LOST * len(steps_us) or steps_us.max() > max(STALE_US, 1.5 * step):
        remedy = "Around a gap the model sees an old frame: look for frames dropped while recording or converting."
        faults[f"{lost} frames missing, the longest gap {steps_us.max() / 1e6:.2f} s"] = remedy
    if 1e6 / step < MIN_HZ:
        faults["fewer than 10 frames a second"] = "Frames 0.1 s apart will repeat; record at 10 Hz or more."
    if jitter > MAX_JITTER:
        remedy = "Take the camera's own times of exposure, not those of arrival."
        faults[f"intervals vary by {100 * jitter:.0f} %"] = remedy
    if overlap < MIN_OVERLAP:
        remedy = "Check that both are on one clock and cut to the same part."
        faults[f"poses cover {100 * overlap:.0f} % of the frames' time"] = remedy
    return faults


def check_finite(track: Track) -> Check | None:
    """Values that are not finite and quaternions that are not of length 1, if there are any."""
    bad = int((~finite_poses(track)).sum())
    if bad:
        finding = f"{bad} of {len(track.xyz)} poses hold {NOT_FINITE}"
        return verdict("rotations", finding, fail="Drop those rows if the rest is sound.")
    norms = np.linalg.norm(track.quaternion_xyzw, axis=1)
    worst = float(norms[np.argmax(np.abs(norms - 1))])
    if abs(worst - 1) > QUATERNION_NORM_SLACK:
        remedy = "Check the columns qx, qy, qz, qw, and whether they hold a quaternion at all."
        return verdict("rotations", f"quaternions of length {worst:.3g}, not 1", fail=remedy)
    return None


def _converted(stamps: NDArray[np.int64]) -> NDArray[np.int64]:
    unit = time_unit(stamps)
    return stamps if unit == "microseconds" else np.round(stamps * _UNITS[unit]).astype(np.int64)
