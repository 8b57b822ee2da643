"""Paths without a model: the vehicle goes on as in the last moments before t0.

A trained expert has to beat both. Neither can follow a curve that begins after t0, which makes them a control for the
straight-line bias. They move in the plane and keep the height of t0, as the public action space does.
"""

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import DT_S, FUTURE_STEPS, Floats
from alpacache.driving.strata import HISTORY_END_STEPS, checked_poses, heading

SPEED_STEPS = 3
"""Steps before t0 that give the speed: 0.3 s, long enough against noise, short enough for braking."""
TURN_STEPS = HISTORY_END_STEPS
"""Steps before t0 that give the turn rate: the 0.5 s in which a straight history may turn by half a degree."""
STANDSTILL_MPS = 0.1
"""Below this a vehicle stands: the noise of its poses is neither speed nor turn."""


def constant_velocity(history_xyz: ArrayLike, history_rot: ArrayLike) -> tuple[Floats, Floats]:
    """Drive straight on along the heading of t0 with the speed of the last 0.3 s.

    Args:
        history_xyz: `[16, 3]` driven poses up to t0, 10 Hz, metres, ego frame at t0.
        history_rot: `[16, 3, 3]` vehicle-to-ego-frame rotations.

    Returns:
        xyz `[64, 3]` in metres and rot `[64, 3, 3]` (yaw only), t0 + 0.1 s to t0 + 6.4 s.

    Raises:
        ValueError: shapes that do not fit or values that are not finite.
    """
    return _arc(*_state_at_t0(history_xyz, history_rot)[:3], turn_rate_radps=0.0)


def constant_turn_rate(history_xyz: ArrayLike, history_rot: ArrayLike) -> tuple[Floats, Floats]:
    """Drive a circle with the speed of the last 0.3 s and the turn rate of the last 0.5 s; a standing vehicle stays.

    Arguments, results and errors are those of `constant_velocity`.
    """
    return _arc(*_state_at_t0(history_xyz, history_rot))


BASELINES = {"constant velocity": constant_velocity, "constant turn rate": constant_turn_rate}
"""Label in tables and pictures -> function."""


def _state_at_t0(history_xyz: ArrayLike, history_rot: ArrayLike) -> tuple[Floats, float, float, float]:
    """Position `[3]`, heading (rad), speed (m/s, negative in reverse) and turn rate (rad/s) at the end of history."""
    xyz, rot = checked_poses(history_xyz, history_rot, "history")
    if len(xyz) <= TURN_STEPS:
        raise ValueError(f"history has {len(xyz)} poses; the baselines need {TURN_STEPS + 1} or more.")
    headings = heading(rot)
    steps = np.diff(xyz[-1 - SPEED_STEPS :, :2], axis=0)
    middle = (headings[-SPEED_STEPS:] + headings[-1 - SPEED_STEPS : -1]) / 2
    # Along the heading, so that sideways noise adds nothing and reversing keeps its sign.
    forward = steps[:, 0] * np.cos(middle) + steps[:, 1] * np.sin(middle)
    speed_mps = float(forward.sum() / (SPEED_STEPS * DT_S))
    turn_rate_radps = float((headings[-1] - headings[-1 - TURN_STEPS]) / (TURN_STEPS * DT_S))
    if abs(speed_mps) < STANDSTILL_MPS:
        speed_mps, turn_rate_radps = 0.0, 0.0
    return xyz[-1], float(headings[-1]), speed_mps, turn_rate_radps


def _arc(start: Floats, start_heading: float, speed_mps: float, turn_rate_radps: float) -> tuple[Floats, Floats]:
    """Poses on a circle, exact also where the turn rate is zero: the chord is `v t sinc(w t / 2)` along `w t / 2`."""
    times_s = DT_S * np.arange(1, FUTURE_STEPS + 1, dtype=np.float64)
    turned = turn_rate_radps * times_s
    chord = speed_mps * times_s * np.sinc(turned / (2 * np.pi))
    along = start_heading + turned / 2
    offset = np.stack([chord * np.cos(along), chord * np.sin(along), np.zeros_like(chord)], axis=-1)
    yaw = start_heading + turned
    rot = np.zeros((FUTURE_STEPS, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0] = np.sin(yaw)
    rot[:, 0, 1] = -rot[:, 1, 0]
    rot[:, 2, 2] = 1.0
    return start + offset, rot
