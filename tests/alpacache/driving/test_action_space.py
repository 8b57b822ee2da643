"""The unicycle action space against golden actions and paths."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alpacache.driving.action_space import (
    UnicycleActionSpace,
    unwrap,
    yaw_of,
    yaw_rotation,
)

SPACE = UnicycleActionSpace(
    accel_mean=0.02902694707164455,
    accel_std=0.6810426736454882,
    curvature_mean=0.0002692167976330542,
    curvature_std=0.026148280660833106,
)
LABELS = Path(__file__).parents[2] / "data" / "action_labels.safetensors"
"""Labels of the public code of August 2026, and as it was before (`action_old`)."""
POSES = ("ego_history_xyz", "ego_history_rot", "ego_future_xyz", "ego_future_rot")


@pytest.mark.parametrize("case", ["actions", "clip0", "clip1", "clip2"])
def test_path_to_action_equals_golden(case, golden, relative_error):
    poses = [golden[f"{case}.{name}"] for name in POSES]
    action = SPACE.to_action(*poses, label_rule="unguarded")  # as the public code was when they were made
    assert action.dtype == torch.float32
    assert relative_error(action, golden[f"{case}.action"]) <= 1e-4


@pytest.fixture(scope="module")
def labels():
    return load_file(LABELS)


DRIVES = ("standstill", "brake_to_stop", "creep", "crawl", "pull_away_in_turn", "tight_turn", "normal", "reverse")


@pytest.mark.parametrize("drive", DRIVES)
def test_labels_are_those_of_the_public_code(drive, labels):
    """Heading noise of 0, 0.5 and 2 degrees; speeds are solved to 2e-5 of the public code's, none is so near to 0.6."""
    action = SPACE.to_action(*(labels[f"{drive}.{name}"] for name in POSES))
    assert float((action - labels[f"{drive}.action"]).abs().max()) <= 3e-4


def test_curvature_is_held_to_the_checkpoint_s_bounds(labels):
    space = replace(SPACE, curvature_bounds=(-0.2, 0.2))
    action = space.to_action(*(labels[f"tight_turn.{name}"] for name in POSES))
    assert float((action - labels["tight_turn.action_bounds_02"]).abs().max()) <= 3e-4


def test_the_former_rule_can_be_asked_for(labels):
    poses = [labels[f"crawl.{name}"] for name in POSES]
    former = replace(SPACE, label_rule="unguarded").to_action(*poses)
    assert torch.equal(former, SPACE.to_action(*poses, label_rule="unguarded"))
    for wrong in ("Guarded", ""):
        with pytest.raises(ValueError, match="'guarded' or 'unguarded'"):
            SPACE.to_action(*poses, label_rule=wrong)
        with pytest.raises(ValueError, match="'guarded' or 'unguarded'"):
            replace(SPACE, label_rule=wrong).to_action(*poses)
    assert float((former - labels["crawl.action_old"])[:, :, 0].abs().max()) <= 3e-4  # accelerations are the same
    square = [float(action[..., 1].square().mean()) for action in (former, SPACE.to_action(*poses))]
    assert square[0] > 9
    assert square[1] < 0.2


def test_action_to_path_equals_golden(golden, relative_error):
    xyz, rot = SPACE.to_path(
        golden["actions.action"], golden["actions.ego_history_xyz"], golden["actions.ego_history_rot"]
    )
    assert relative_error(xyz, golden["actions.pred_xyz"]) <= 1e-4
    assert relative_error(rot, golden["actions.pred_rot"]) <= 1e-4


@pytest.mark.parametrize("standing", [False, True])
def test_no_neighbour_changes_a_bit(golden, standing):
    """A path on which one of the problems is singular takes a larger ridge, its neighbours do not."""
    poses = [golden[f"actions.{name}"].repeat(5, *[1] * (golden[f"actions.{name}"].ndim - 1)) for name in POSES]
    if standing:
        poses[0][3], poses[2][3] = poses[0][3, -1:], poses[0][3, -1:]
    together = SPACE.to_action(*poses)
    assert len(together) == 20
    for rows in (slice(0, 1), slice(2, 5), slice(3, 4), slice(7, 20)):
        assert torch.equal(SPACE.to_action(*(pose[rows] for pose in poses)), together[rows])
    for row in range(4):
        assert torch.equal(SPACE.to_action(*(pose[row] for pose in poses)), together[row])


def test_a_drive_survives_there_and_back(relative_error):
    """10 m/s on a circle of 50 m: smoothing costs centimetres over 64 m."""
    turn, time = 10.0 / 50.0, torch.arange(-15, 65) * 0.1
    yaw = turn * time
    xyz = torch.stack([50 * torch.sin(yaw), 50 * (1 - torch.cos(yaw)), torch.full_like(yaw, 1.5)], dim=-1)
    rot = yaw_rotation(yaw)
    action = SPACE.to_action(xyz[:16], rot[:16], xyz[16:], rot[16:])
    back_xyz, back_rot = SPACE.to_path(action, xyz[:16], rot[:16])
    assert float((back_xyz - xyz[16:]).norm(dim=-1).max()) < 0.1
    assert back_xyz[:, 2].tolist() == [1.5] * 64
    assert relative_error(back_rot, rot[16:]) < 1e-2
    curvature = action[..., 1] * SPACE.curvature_std + SPACE.curvature_mean
    assert float(curvature[10:50].mean()) == pytest.approx(1 / 50, rel=0.02)


def test_autocast_does_not_reach_the_solves(golden):
    poses = [golden[f"clip0.{name}"] for name in POSES]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SPACE.to_action(*poses), SPACE.to_action(*poses))
        inside = SPACE.to_action(*poses)
    assert torch.equal(inside, SPACE.to_action(*poses))


def test_unwrap_and_yaw():
    yaw = torch.linspace(-4.0, 4.0, 50)
    assert torch.allclose(unwrap(yaw_of(yaw_rotation(yaw))) + yaw[0] - yaw_of(yaw_rotation(yaw[:1])), yaw, atol=1e-5)
    assert float(unwrap(torch.tensor([3.0, -3.0]))[1]) == pytest.approx(2 * math.pi - 3, rel=1e-6)
