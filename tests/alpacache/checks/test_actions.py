"""Actions that are solved without torch are those of the action space, also of paths that stand, turn back or are
noisy."""

import numpy as np
import pytest
import torch

from alpacache.checks.actions import actions_of
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.poses import EgoPoses, ego_poses, interpolate, sample_times_us

SPACE = UnicycleActionSpace(accel_mean=0.0, accel_std=1.0, curvature_mean=0.0, curvature_std=1.0)


@pytest.mark.parametrize("noise_m", [0.0, 0.1])
def test_actions_are_those_of_the_action_space(drive, noise_m):
    track = drive()
    track.xyz[:, :2] += np.random.default_rng(0).normal(0, noise_m, (len(track.xyz), 2))
    begins = track.timestamps_us[0] + 1_500_000 + np.arange(0, 51_000_000, 3_000_000)
    each = [ego_poses(*interpolate(track, sample_times_us(int(t0_us)))) for t0_us in begins]
    paths = EgoPoses(*(np.stack(part) for part in zip(*each, strict=True)))
    accel, curvature, speed = actions_of(paths)
    poses = [torch.from_numpy(part) for part in paths]
    wanted = SPACE.to_action(*poses).double().numpy()
    assert speed.min() < 0.5 < 8 < speed.max()
    np.testing.assert_allclose(accel, wanted[..., 0], atol=1e-3)
    np.testing.assert_allclose(curvature, wanted[..., 1], atol=1e-4)
    np.testing.assert_allclose(speed, SPACE.initial_speed(*poses[:2]).double().numpy(), atol=1e-4)
