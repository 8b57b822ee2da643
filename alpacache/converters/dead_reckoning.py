"""Paths from speed and yaw rate alone: of the right shape over seconds, and adrift over minutes."""

import numpy as np

from alpacache.driving.sample import Floats


def dead_reckoned(time_s: Floats, speed_mps: Floats, yaw_rate_radps: Floats) -> tuple[Floats, Floats]:
    """Path `[N, 3]` and quaternions `[N, 4]` of speeds and yaw rates; between two rows they are the mean of both."""

    def mean(values: Floats) -> Floats:
        return (values[1:] + values[:-1]) / 2

    dt = np.diff(time_s)
    yaw = np.concatenate([[0.0], np.cumsum(mean(yaw_rate_radps) * dt)])
    steps = (mean(speed_mps) * dt)[:, None] * np.stack([np.cos(mean(yaw)), np.sin(mean(yaw))], axis=1)
    xyz = np.zeros((len(time_s), 3))
    xyz[1:, :2] = np.cumsum(steps, axis=0)
    return xyz, yaw_quaternions(yaw)


def yaw_quaternions(yaw_rad: Floats) -> Floats:
    """`[N, 4]`, scalar last, of level headings."""
    nothing = np.zeros_like(yaw_rad)
    return np.stack([nothing, nothing, np.sin(yaw_rad / 2), np.cos(yaw_rad / 2)], axis=1)
