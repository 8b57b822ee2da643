"""Turns a recorded trajectory into the ego history and future of one sample.

Numbers have to agree with the public loader, so the interpolation is fixed: a not-a-knot cubic spline for translation
and slerp for rotation, on times relative to the first pose (large absolute times would cost precision), and never
beyond the recording. The ego frame takes the full 3-D rotation at t0, not only its yaw. Bad recordings are refused
here, before an expensive model sees them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.sample import FUTURE_STEPS, HISTORY_STEPS, STEP_US
from alpacache.errors import BadClipError

MAX_SPEED_MPS = 80.0
MAX_TURN_RATE_RADPS = 3.0
MAX_GAP_US = 1_000_000
"""Longest time between two poses that is still interpolated."""
JUMP_SLACK_M = 0.5
"""Localisation noise allowed on top of `MAX_SPEED_MPS`."""
JUMP_SLACK_RAD = 0.1
MAX_VALUE = 1e12
"""Beyond it no coordinate is one, in whatever unit: 1 million km in millimetres."""
NOT_FINITE = f"NaN, infinity or values beyond {MAX_VALUE:.0e}"
QUATERNION_NORM_SLACK = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """A recorded trajectory, vehicle to world."""

    timestamps_us: NDArray[np.int64]
    """`[N]`, strictly increasing."""
    xyz: NDArray[np.float64]
    """`[N, 3]` metres."""
    quaternion_xyzw: NDArray[np.float64]
    """`[N, 4]`, scalar last, length 1."""


class EgoPoses(NamedTuple):
    """History and future of one sample: metres in the ego frame at t0 (x forward, y left), float32."""

    history_xyz: NDArray[np.float32]
    history_rot: NDArray[np.float32]
    future_xyz: NDArray[np.float32]
    future_rot: NDArray[np.float32]


def history_and_future(track: Track, t0_us: int, *, where: str = "poses") -> EgoPoses:
    """The 16 poses ending at t0 and the 64 after it, at 10 Hz, in the ego frame at t0.

    Raises `BadClipError`: `wrong_shape`, `not_finite`, `time_order`, `pose_jump`, or `short_clip` where the recording
    does not reach from t0 - 1.5 s to t0 + 6.4 s. `where` names the recording in those messages.
    """
    times = sample_times_us(t0_us)
    check_usable(track, times, where=where)
    return ego_poses(*interpolate(track, times))


def history_alone(track: Track, t0_us: int, *, where: str = "poses") -> EgoPoses:
    """`history_and_future` of a moment whose future is not known: its poses are `[0, 3]` and `[0, 3, 3]`.

    Raises the same errors, `short_clip` where the recording does not reach from t0 - 1.5 s to t0.
    """
    times = sample_times_us(t0_us)[:HISTORY_STEPS]
    check_usable(track, times, where=where)
    return ego_poses(*interpolate(track, times))


def sample_times_us(t0_us: int) -> NDArray[np.int64]:
    """`[80]` the instants (us) of a sample's poses; number 15 is t0."""
    return t0_us + STEP_US * np.arange(1 - HISTORY_STEPS, FUTURE_STEPS + 1, dtype=np.int64)


def check_usable(track: Track, times_us: NDArray[np.int64], *, where: str) -> None:
    """Raise the errors of `history_and_future` for this track and these instants."""
    check_track(track, where=where)
    _check_covered(track.timestamps_us, times_us, what=f"{where}: poses")
    _check_motion(track, times_us, where=where)


def ego_poses(xyz: NDArray[np.float64], rot: NDArray[np.float64]) -> EgoPoses:
    """World poses at `sample_times_us` (`[80, 3]`, `[80, 3, 3]`) as history and future in the ego frame at t0.

    Without those after t0 the future is empty.
    """
    now = HISTORY_STEPS - 1
    to_ego = rot[now].T  # R_t0^-1 (p - p_t0) and R_t0^-1 R
    near, turned = ((xyz - xyz[now]) @ to_ego.T).astype(np.float32), (to_ego @ rot).astype(np.float32)
    return EgoPoses(near[:HISTORY_STEPS], turned[:HISTORY_STEPS], near[HISTORY_STEPS:], turned[HISTORY_STEPS:])


class Seam(NamedTuple):
    """Measures of how a path goes on at t0: a future that is not of its history begins with another velocity."""

    change_mps: float
    """Change of the horizontal velocity from the step before t0 to the one after it."""
    times: float
    """The same as a multiple of what it is within a second of t0 (root mean square)."""


def seam_of(history_xyz: NDArray[np.float32], future_xyz: NDArray[np.float32]) -> Seam:
    """The seam of `[16, 3]` and `[64, 3]` positions in the ego frame at t0 (m)."""
    velocity = np.diff(np.concatenate([history_xyz, future_xyz])[:, :2].astype(np.float64), axis=0) * (1e6 / STEP_US)
    changes, now = np.linalg.norm(np.diff(velocity, axis=0), axis=1), HISTORY_STEPS - 2
    around = np.concatenate([changes[now - 10 : now - 1], changes[now + 2 : now + 11]])  # t0 itself is in three
    usual = max(float(np.sqrt((around**2).mean())), 1e-3)
    return Seam(float(changes[now]), float(changes[now]) / usual)


def interpolate(track: Track, times_us: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """World positions `[M, 3]` and rotations `[M, 3, 3]` at `times_us`, all of which the track must cover.

    At the instant of a recorded pose the position is the recorded one, also of the last pose, where the spline alone
    would miss it by a rounding: what is known of a moment is the same while it is the newest as later on.
    """
    from scipy.interpolate import CubicSpline
    from scipy.spatial.transform import Rotation, Slerp

    start = track.timestamps_us[0]
    known, wanted = track.timestamps_us - start, times_us - start
    xyz = CubicSpline(known, track.xyz, extrapolate=False)(wanted)
    at = np.searchsorted(known, wanted)
    recorded = known[at] == wanted
    xyz[recorded] = track.xyz[at[recorded]]
    rot = Slerp(known, Rotation.from_quat(track.quaternion_xyzw))(wanted).as_matrix()
    return xyz, rot


def frame_indices(
    timestamps_us: NDArray[np.int64], times_us: NDArray[np.int64], *, where: str = "video"
) -> NDArray[np.int64]:
    """Index of the frame at or before each requested time. Raises `BadClipError` (`short_clip`) outside the video."""
    check_timestamps(timestamps_us, what=f"{where}: frame timestamps")
    _check_covered(timestamps_us, times_us, what=f"{where}: frames")
    return np.searchsorted(timestamps_us, times_us, side="right").astype(np.int64) - 1


def check_track(track: Track, *, where: str) -> None:
    """Raise `BadClipError` for wrong shapes, values that are not finite, times out of order or quaternions that are no
    rotation, anywhere in the recording: one bad pose bends a whole spline.
    """
    count = len(track.timestamps_us)
    check_timestamps(track.timestamps_us, what=f"{where}: pose timestamps")
    if track.xyz.shape != (count, 3) or track.quaternion_xyzw.shape != (count, 4):
        shapes = f"positions {track.xyz.shape} and quaternions {track.quaternion_xyzw.shape}"
        expected = f"expected ({count}, 3) and ({count}, 4)"
        raise BadClipError("wrong_shape", f"{where}: {count} pose timestamps, but {shapes}; {expected}.")
    bad = ~finite_poses(track)
    if bad.any():
        first = _seconds(track.timestamps_us[np.argmax(bad)])
        reason = f"{bad.sum()} of {count} poses hold {NOT_FINITE}, the first at {first}"
        raise BadClipError("not_finite", f"{where}: {reason}; drop those rows if the rest is sound.")
    norms = np.linalg.norm(track.quaternion_xyzw, axis=1)
    at = int(np.argmax(np.abs(norms - 1.0)))
    if abs(norms[at] - 1.0) > QUATERNION_NORM_SLACK:
        reason = f"the quaternion at {_seconds(track.timestamps_us[at])} has length {norms[at]:.3g}, not 1, so it is no"
        raise BadClipError("pose_jump", f"{where}: {reason} rotation; check the order of columns (qx, qy, qz, qw).")


def _check_motion(track: Track, times_us: NDArray[np.int64], *, where: str) -> None:
    """Raise `BadClipError` for a hole, a jump or a sudden turn in the poses that these times are interpolated from."""
    begin = max(int(np.searchsorted(track.timestamps_us, times_us[0], side="right")) - 2, 0)
    end = int(np.searchsorted(track.timestamps_us, times_us[-1], side="left")) + 2
    times = track.timestamps_us[begin:end]
    gaps_s = np.diff(times) / 1e6
    at = int(np.argmax(gaps_s))
    if gaps_s[at] > MAX_GAP_US / 1e6:
        hole = f"no poses for {gaps_s[at]:.2f} s after {_seconds(times[at])}"
        limit_s = f"{MAX_GAP_US / 1e6:g} s"
        raise BadClipError("time_order", f"{where}: {hole}; a path is not interpolated over more than {limit_s}.")
    quaternions = track.quaternion_xyzw[begin:end]
    moved = np.linalg.norm(np.diff(track.xyz[begin:end], axis=0), axis=1)
    cosines = np.abs((quaternions[1:] * quaternions[:-1]).sum(axis=1))
    turned = 2.0 * np.arccos(np.clip(cosines, 0.0, 1.0))
    for what, amount, limit in (
        ("moves {:.2f} m", moved, MAX_SPEED_MPS * gaps_s + JUMP_SLACK_M),
        ("turns {:.2f} rad", turned, MAX_TURN_RATE_RADPS * gaps_s + JUMP_SLACK_RAD),
    ):
        if (amount > limit).any():
            at = int(np.argmax(amount > limit))
            jump = f"{what.format(amount[at])} within {gaps_s[at]:.3f} s at {_seconds(times[at])}"
            remedy = "Localisation may have been reset there; choose a t0 away from it."
            raise BadClipError("pose_jump", f"{where}: the vehicle {jump}; no car does. {remedy}")


def finite_poses(track: Track) -> NDArray[np.bool_]:
    """Tell for each pose `[N]` whether all of its values are numbers that one can calculate with."""
    values = np.concatenate([track.xyz, track.quaternion_xyzw], axis=1)
    finite: NDArray[np.bool_] = (np.abs(values) <= MAX_VALUE).all(axis=1)  # False for NaN
    return finite


def check_timestamps(timestamps_us: NDArray[np.int64], *, what: str) -> None:
    """Raise `BadClipError` unless timestamps are one column of at least two that increase strictly."""
    if timestamps_us.ndim != 1:
        raise BadClipError("wrong_shape", f"{what} have shape {timestamps_us.shape}; expected one column.")
    if len(timestamps_us) < 2:
        raise BadClipError("short_clip", f"{what}: {len(timestamps_us)} in the whole recording; at least 2 are needed.")
    steps = np.diff(timestamps_us)
    if (steps <= 0).any():
        at = int(np.argmax(steps <= 0))
        step = f"go from {timestamps_us[at]} to {timestamps_us[at + 1]} us in row {at + 1}"
        remedy = "they must increase strictly. Sort the rows and drop duplicates."
        raise BadClipError("time_order", f"{what} {step}; {remedy}")


def _check_covered(timestamps_us: NDArray[np.int64], times_us: NDArray[np.int64], *, what: str) -> None:
    """Raise `BadClipError` unless every requested time lies within the recording."""
    first, last = int(timestamps_us[0]), int(timestamps_us[-1])
    wanted_first, wanted_last = int(times_us.min()), int(times_us.max())
    if wanted_first < first or wanted_last > last:
        needed = f"{_seconds(wanted_first)} to {_seconds(wanted_last)} is needed"
        reason = f"{what} cover {_seconds(first)} to {_seconds(last)}, but {needed}"
        raise BadClipError("short_clip", f"{reason}; choose another t0 or a longer recording.")


def _seconds(time_us: Any) -> str:
    return f"{int(time_us) / 1e6:.3f} s"
