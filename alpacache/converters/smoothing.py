"""Smooths noisy fixes forwards and backwards (Kalman filter, Rauch-Tung-Striebel smoother).

Without inertial sensors each axis is a point whose jerk is white noise, measured in position and velocity: linear, so
exact in one pass. With speed and yaw rate the state is a vehicle's, and the smoother works on it linearised (extended).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.sample import Floats

JERK = 5.0
"""Spectral density of the jerk, (m/s³)²/Hz: that of a car which brakes and turns in. Slower changes than 2 s pass."""
FIRST_SPREAD = np.array([1e3, 50.0, 5.0])
"""Standard deviations of position (m), velocity (m/s) and acceleration (m/s²) before the first fix: next to unknown."""


class Smoothed(NamedTuple):
    """Smoothed states of `[N]` instants on `[A]` axes."""

    states: Floats
    """`[N, A, 3]` position (m), velocity (m/s), acceleration (m/s²)."""
    spreads: Floats
    """`[N, A, 3]` their standard deviations."""


def smoothed(times_s: Floats, values: Floats, sigmas: Floats, *, jerk: float = JERK) -> Smoothed:
    """Smooth `[N, A, 2]` positions and velocities, NaN where there is none, of standard errors of the same shape."""
    count, axes = values.shape[:2]
    states, covariances = np.empty((count, axes, 3)), np.empty((count, axes, 3, 3))
    before, spread_before = np.empty_like(states), np.empty_like(covariances)
    known = np.isfinite(values)
    values, variances = np.where(known, values, 0.0), np.where(known, sigmas, np.inf) ** 2
    first = [np.flatnonzero(known[:, axis, 0])[0] for axis in range(axes)]
    state = np.zeros((axes, 3))
    state[:, 0] = values[first, range(axes), 0]
    covariance = np.tile(np.diag(FIRST_SPREAD**2), (axes, 1, 1))
    steps = np.diff(times_s, prepend=times_s[0])
    for row in range(count):
        move, noise = _motion(steps[row], jerk)
        state, covariance = state @ move.T, move @ covariance @ move.T + noise
        before[row], spread_before[row] = state, covariance
        for what in (0, 1):
            gain = covariance[:, :, what] / (covariance[:, what, what] + variances[row, :, what])[:, None]
            state = state + gain * (values[row, :, what] - state[:, what])[:, None]
            covariance = covariance - gain[:, :, None] * covariance[:, what, None, :]
            covariance = (covariance + covariance.swapaxes(1, 2)) / 2
        states[row], covariances[row] = state, covariance
    for row in range(count - 2, -1, -1):
        move, _ = _motion(steps[row + 1], jerk)
        back = covariances[row] @ move.T @ np.linalg.inv(spread_before[row + 1])
        states[row] += np.einsum("aij,aj->ai", back, states[row + 1] - before[row + 1])
        covariances[row] += back @ (covariances[row + 1] - spread_before[row + 1]) @ back.swapaxes(1, 2)
    spreads = np.sqrt(np.maximum(np.diagonal(covariances, axis1=2, axis2=3), 0.0))
    return Smoothed(states, spreads)


def _motion(step_s: float, jerk: float) -> tuple[Floats, Floats]:
    """Transition of a state over a time, and the covariance that this adds."""
    t = float(step_s)
    move = np.array([[1.0, t, t * t / 2], [0.0, 1.0, t], [0.0, 0.0, 1.0]])
    noise = np.array([[t**5 / 20, t**4 / 8, t**3 / 6], [t**4 / 8, t**3 / 3, t**2 / 2], [t**3 / 6, t**2 / 2, t]])
    return move, jerk * noise


class Fused(NamedTuple):
    """A vehicle's path from speed, yaw rate and fixes."""

    states: Floats
    """`[N, 5]` east, north (m), yaw (rad, 0 = east, left positive, not wrapped), yaw rate bias (rad/s), speed's scale
    (true speed over the log's, minus 1)."""
    spreads: Floats
    """`[N, 5]` their standard deviations."""


WALK = np.array([0.05, 0.05, 0.002, 1e-4, 1e-4])
"""Standard deviation by which each part of the state wanders in a second beyond what speed and yaw rate say."""
FIRST_FUSED = np.array([10.0, 10.0, 0.5, 0.03, 0.05])


def fused(
    times_s: Floats,
    speed_mps: Floats,
    yaw_rate_radps: Floats,
    measured: Floats,
    sigmas: Floats,
    *,
    first_yaw_rad: float,
    passes: int = 2,
) -> Fused:
    """Smooth `[N, 3]` fixes of east, north (m) and course (rad), NaN where there is none, along speeds and yaw rates.

    All have the times `times_s`. The last pass begins with what the one before found.
    """
    start = np.array([*measured[np.flatnonzero(np.isfinite(measured[:, 0]))[0], :2], first_yaw_rad, 0.0, 0.0])
    result = _fused_once(times_s, speed_mps, yaw_rate_radps, measured, sigmas, start)
    for _ in range(passes - 1):
        result = _fused_once(times_s, speed_mps, yaw_rate_radps, measured, sigmas, result.states[0])
    return result


def _fused_once(
    times_s: Floats, speed_mps: Floats, yaw_rate_radps: Floats, measured: Floats, sigmas: Floats, start: Floats
) -> Fused:
    count = len(times_s)
    states, covariances = np.empty((count, 5)), np.empty((count, 5, 5))
    before, spread_before, moves = np.empty_like(states), np.empty_like(covariances), np.empty_like(covariances)
    state, covariance = start.copy(), np.diag(FIRST_FUSED**2)
    known = np.isfinite(measured)
    for row in range(count):
        moves[row] = np.eye(5)
        if row:
            state, moves[row] = _driven(
                state,
                times_s[row] - times_s[row - 1],
                (speed_mps[row - 1] + speed_mps[row]) / 2,
                (yaw_rate_radps[row - 1] + yaw_rate_radps[row]) / 2,
            )
            covariance = moves[row] @ covariance @ moves[row].T + np.diag(WALK**2) * (times_s[row] - times_s[row - 1])
        before[row], spread_before[row] = state, covariance
        for what in np.flatnonzero(known[row]):
            gap = measured[row, what] - state[what]
            if what == 2:
                gap = (gap + np.pi) % (2 * np.pi) - np.pi
            gain = covariance[:, what] / (covariance[what, what] + sigmas[row, what] ** 2)
            state = state + gain * gap
            covariance = covariance - np.outer(gain, covariance[what])
            covariance = (covariance + covariance.T) / 2
        states[row], covariances[row] = state, covariance
    for row in range(count - 2, -1, -1):
        back = covariances[row] @ moves[row + 1].T @ np.linalg.inv(spread_before[row + 1])
        states[row] += back @ (states[row + 1] - before[row + 1])
        covariances[row] += back @ (covariances[row + 1] - spread_before[row + 1]) @ back.T
    return Fused(states, np.sqrt(np.maximum(np.diagonal(covariances, axis1=1, axis2=2), 0.0)))


def _driven(state: Floats, step_s: float, speed_mps: float, yaw_rate_radps: float) -> tuple[Floats, Floats]:
    """The state a step later, and its derivative by the state before."""
    way, turn = speed_mps * step_s * (1 + state[4]), (yaw_rate_radps - state[3]) * step_s
    middle = state[2] + turn / 2
    cos, sin = np.cos(middle), np.sin(middle)
    move = np.eye(5)
    move[0, 2:] = [-way * sin, way * sin * step_s / 2, speed_mps * step_s * cos]
    move[1, 2:] = [way * cos, -way * cos * step_s / 2, speed_mps * step_s * sin]
    move[2, 3] = -step_s
    return state + np.array([way * cos, way * sin, turn, 0.0, 0.0]), move


class Headings(NamedTuple):
    """Headings from the course."""

    yaw_rad: Floats
    """`[N]`, 0 = east, left positive, not wrapped."""
    held: NDArray[np.bool_]
    """`[N]` at standstill, where the course is noise: the heading goes evenly from that before to that behind."""
    reversing: NDArray[np.bool_]
    """`[N]` where the vehicle drives backwards: between two stops the course is opposite to the rest."""


def headings_of(velocity_mps: Floats, *, standing_mps: float) -> Headings | None:
    """Headings of `[N, 2]` velocities to the east and to the north; None if the vehicle never moves.

    The course is that of travel. Two legs between stops whose courses are opposite are one forwards and one backwards:
    no vehicle turns round on the spot. The longer way is forwards.
    """
    speed = np.hypot(*velocity_mps.T)
    moving = speed >= standing_mps
    if not moving.any():
        return None
    course = np.arctan2(velocity_mps[:, 1], velocity_mps[:, 0])
    leg = np.cumsum(np.diff(moving.astype(int), prepend=0) == 1)  # number of the leg, from 1, where moving
    legs = range(1, int(leg.max()) + 1)
    sign, before = {1: 1}, 0.0
    for number in legs:
        rows = np.flatnonzero(moving & (leg == number))
        if number > 1:
            apart = abs((course[rows[0]] - before + np.pi) % (2 * np.pi) - np.pi)
            sign[number] = -sign[number - 1] if apart > np.deg2rad(120) else sign[number - 1]
        before = course[rows[-1]]
    ways = {number: float(speed[moving & (leg == number)].sum()) for number in legs}
    forwards = 1 if sum(sign[number] * ways[number] for number in legs) >= 0 else -1
    reversing = moving & np.isin(leg, [number for number in legs if sign[number] != forwards])
    rows = np.flatnonzero(moving)
    yaw = np.unwrap(course[rows] + np.where(reversing[rows], np.pi, 0.0))
    return Headings(np.interp(np.arange(len(course)), rows, yaw), ~moving, reversing)
