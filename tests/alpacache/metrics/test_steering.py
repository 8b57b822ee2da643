"""A planted error of speed leaves lateral-only as it was, one of steering speed-only; sides and when they are taken."""

import math

import numpy as np
import pytest
import torch

from alpacache.driving.action_space import UnicycleActionSpace, yaw_rotation
from alpacache.metrics.steering import action_errors, commit_time, lateral_errors

SPACE = UnicycleActionSpace(accel_mean=0.1, accel_std=0.8, curvature_mean=0.001, curvature_std=0.02)
TIMES = torch.arange(-1.5, 0.05, 0.1)
HISTORY_XYZ = torch.stack([9.0 * TIMES, 0 * TIMES, 0 * TIMES], dim=-1)
HISTORY_ROT = torch.eye(3).expand(16, 3, 3)


def actions(accel, curvature):
    """Normalised actions `[64, 2]` of these accelerations (m/s^2) and curvatures (1/m)."""
    accel, curvature = (torch.as_tensor(part, dtype=torch.float32).expand(64) for part in (accel, curvature))
    return torch.stack(
        [(accel - SPACE.accel_mean) / SPACE.accel_std, (curvature - SPACE.curvature_mean) / SPACE.curvature_std], dim=-1
    )


CURVATURE = 0.02 * torch.sin(torch.arange(64) / 12)
TRUE = actions(0.3, CURVATURE)
TRUTH = SPACE.to_path(TRUE, HISTORY_XYZ, HISTORY_ROT)[0].double().numpy()


def errors(*predicted):
    return action_errors(SPACE, torch.stack(predicted), TRUE, HISTORY_XYZ, HISTORY_ROT, TRUTH)


def test_the_driven_actions_have_no_error():
    assert errors(TRUE, TRUE) == pytest.approx(dict.fromkeys(errors(TRUE), 0.0), abs=1e-9)


def test_a_planted_speed_error_leaves_lateral_only_unchanged():
    steered = actions(0.3, CURVATURE + 0.004)
    both = errors(actions(-0.5, CURVATURE + 0.004), actions(1.1, CURVATURE + 0.004))
    assert both["lateral_only"] == pytest.approx(errors(steered)["lateral_only"], rel=1e-12)
    assert both["lateral_only"] > 1.0
    assert both["speed_only"] > 5.0
    assert errors(steered)["speed_only"] == pytest.approx(0.0, abs=1e-6)
    assert both["accel_mae"] == pytest.approx(0.8)


def test_a_planted_steering_error_leaves_speed_only_unchanged():
    sped = actions(0.5, CURVATURE)
    both = errors(actions(0.5, CURVATURE - 0.01), actions(0.5, CURVATURE + 0.02))
    assert both["speed_only"] == pytest.approx(errors(sped)["speed_only"], rel=1e-12)
    assert both["speed_only"] > 0.5
    assert both["lateral_only"] > 2.0
    assert errors(sped)["lateral_only"] == pytest.approx(0.0, abs=1e-6)
    assert both["curvature_mae"] == pytest.approx(0.015)


def circle(radius_m, speed_mps):
    turned = speed_mps * 0.1 * torch.arange(1, 65).double() / radius_m
    xyz = torch.stack([radius_m * torch.sin(turned), radius_m * (1 - torch.cos(turned)), 0 * turned], dim=-1)
    return xyz.numpy(), yaw_rotation(turned).numpy()


def test_beside_the_driven_line_a_wrong_speed_is_no_error():
    truth, rot = circle(80.0, 8.0)
    slower, faster = circle(80.0, 5.0)[0], circle(80.0, 8.0)[0]
    found = lateral_errors(np.stack([slower, faster]), truth, rot)
    assert found == pytest.approx({"lateral_error": 0.0, "lateral_error_max": 0.0}, abs=5e-3)
    straight = np.stack([np.arange(1.0, 65.0), np.zeros(64), np.zeros(64)], axis=-1)
    beside, wave = straight.copy(), straight.copy()
    beside[:, 1], wave[20, 1] = 1.0, -3.0
    found = lateral_errors(np.stack([beside, wave]), straight, np.broadcast_to(np.eye(3), (64, 3, 3)))
    assert found == pytest.approx({"lateral_error": (1.0 + 3.0 / 64) / 2, "lateral_error_max": 2.0})


def path(beside):
    return np.stack([np.arange(1.0, 65.0), beside, np.zeros(64)], axis=-1)


def test_a_path_commits_when_it_is_last_on_the_other_side():
    at_once = path(np.linspace(0.1, 6.0, 64))
    late = path(np.concatenate([np.full(30, -0.5), np.linspace(0.1, 5.0, 34)]))
    lane = path(np.full(64, 1.5))
    assert commit_time(at_once[None]) == pytest.approx(0.1)
    assert commit_time(late[None]) == pytest.approx(3.1)
    assert commit_time(np.stack([at_once, late, lane])) == pytest.approx(1.6)
    assert math.isnan(commit_time(lane[None]))
    assert commit_time(late[None] * [1.0, -1.0, 1.0]) == pytest.approx(3.1)
