"""The baselines on drives whose continuation is known in closed form."""

import numpy as np
import pytest

from alpacache.driving.strata import heading
from alpacache.metrics.baselines import BASELINES, constant_turn_rate, constant_velocity


def circle(speed_mps: float, turn_rate_radps: float, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses on a circle through the origin, heading along x at time 0."""
    yaw = turn_rate_radps * times_s
    if turn_rate_radps:
        radius = speed_mps / turn_rate_radps
        xyz = np.stack([radius * np.sin(yaw), radius * (1 - np.cos(yaw)), 0 * yaw], axis=-1)
    else:
        xyz = np.stack([speed_mps * times_s, 0 * yaw, 0 * yaw], axis=-1)
    rot = np.zeros((len(yaw), 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0], rot[:, 0, 1], rot[:, 2, 2] = np.sin(yaw), -np.sin(yaw), 1.0
    return xyz, rot


PAST_S = 0.1 * np.arange(-15, 1)
FUTURE_S = 0.1 * np.arange(1, 65)


@pytest.mark.parametrize("turn_rate_radps", [0.0, 1e-9, 0.2, -0.6])
def test_constant_turn_rate_continues_a_circle(turn_rate_radps: float) -> None:
    expected_xyz, expected_rot = circle(8.0, turn_rate_radps, FUTURE_S)

    xyz, rot = constant_turn_rate(*circle(8.0, turn_rate_radps, PAST_S))

    # The speed of history is measured along chords, which are shorter than the arc by (w dt)^2 / 24.
    assert xyz == pytest.approx(expected_xyz, abs=0.01)
    assert rot == pytest.approx(expected_rot, abs=1e-9)


def test_constant_velocity_leaves_the_circle_straight_on() -> None:
    xyz, rot = constant_velocity(*circle(8.0, 0.2, PAST_S))

    assert xyz[-1] == pytest.approx([8.0 * 6.4, 0.0, 0.0], abs=0.01)
    assert rot == pytest.approx(np.broadcast_to(np.eye(3), (64, 3, 3)), abs=1e-12)


def test_reversing_keeps_its_sign() -> None:
    xyz, _ = constant_velocity(*circle(-2.0, 0.0, PAST_S))
    assert xyz[-1] == pytest.approx([-12.8, 0.0, 0.0])


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES.keys())
def test_noise_at_a_standstill_stays_a_standstill(baseline: object) -> None:
    assert callable(baseline)
    rng = np.random.default_rng(0)
    _, rot = circle(0.0, 0.0, PAST_S)
    wobble = rng.normal(0.0, 0.01, 16)
    rot[:, 0, 1], rot[:, 1, 0] = -np.sin(wobble), np.sin(wobble)
    history = rng.normal(0.0, 0.003, (16, 3))

    xyz, turned = baseline(history, rot)

    assert xyz == pytest.approx(np.broadcast_to(history[-1], (64, 3)))
    assert np.ptp(heading(turned)) == 0.0


def test_height_stays_and_rotation_is_orthonormal() -> None:
    history_xyz, history_rot = circle(8.0, 0.3, PAST_S)
    history_xyz[:, 2] = 0.05 * PAST_S

    xyz, rot = constant_turn_rate(history_xyz, history_rot)

    assert np.ptp(xyz[:, 2]) == 0.0
    assert rot @ rot.transpose(0, 2, 1) == pytest.approx(np.broadcast_to(np.eye(3), (64, 3, 3)), abs=1e-12)


def test_short_history_is_refused() -> None:
    xyz, rot = circle(8.0, 0.0, PAST_S)
    with pytest.raises(ValueError, match="history has 5 poses; the baselines need 6"):
        constant_velocity(xyz[:5], rot[:5])
