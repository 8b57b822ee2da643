"""Steering or speed: which of the two a predicted path has wrong, and how soon it takes the side it ends on.

An action is acceleration and curvature, so either of the two can be replaced by the driven path's: predicted curvature
at the driven speed has no error of speed left, predicted acceleration with the driven curvature none of steering.
"""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.sample import DT_S, Floats
from alpacache.driving.strata import CORRIDOR_M
from alpacache.metrics.path_frame import beside_driven
from alpacache.metrics.paths import displacement

COMMIT_KEY = "commit_s"
ACTION_KEYS = ("lateral_only", "speed_only", "accel_mae", "curvature_mae")
LATERAL_KEYS = ("lateral_error", "lateral_error_max")
STEERING_KEYS = (*ACTION_KEYS, *LATERAL_KEYS, COMMIT_KEY)


def action_errors(
    space: UnicycleActionSpace,
    action: Tensor,
    true_action: Tensor,
    history_xyz: Tensor,
    history_rot: Tensor,
    truth_xyz: ArrayLike,
) -> dict[str, float]:
    """Errors of K predicted actions by the driven one, each a mean over the K and all steps.

    Args:
        space: what the actions are of.
        action: `[K, 64, 2]` normalised acceleration and curvature.
        true_action: `[64, 2]` of the driven path.
        history_xyz: `[16, 3]` metres, ego frame at t0: it gives the speed at t0.
        history_rot: `[16, 3, 3]`.
        truth_xyz: `[64, 3]` the driven path.

    Returns:
        `lateral_only`, `speed_only`: distance in xy (m) to the driven path of the path with the predicted curvature and
        the driven acceleration, and of that with the predicted acceleration and the driven curvature, step by step.
        `accel_mae` (m/s^2), `curvature_mae` (1/m): absolute difference to the driven path's.
    """
    true = true_action.expand_as(action)
    steered = torch.stack([true[..., 0], action[..., 1]], dim=-1)
    sped = torch.stack([action[..., 0], true[..., 1]], dim=-1)
    paths = [space.to_path(mixed, history_xyz, history_rot)[0].numpy() for mixed in (steered, sped)]
    off = (action - true).double().abs().mean(dim=(0, 1)).tolist()
    return {
        "lateral_only": float(displacement(paths[0], truth_xyz).mean()),
        "speed_only": float(displacement(paths[1], truth_xyz).mean()),
        "accel_mae": off[0] * space.accel_std,
        "curvature_mae": off[1] * space.curvature_std,
    }


def lateral_errors(pred: ArrayLike, truth: ArrayLike, truth_rot: ArrayLike) -> dict[str, float]:
    """Distance beside the driven line (m), which a wrong speed on the right line leaves at 0; means over the K paths.

    Args:
        pred: `[K, 64, 3]` predicted paths, metres, ego frame at t0.
        truth: `[64, 3]` the driven path.
        truth_rot: `[64, 3, 3]` its rotations.

    Returns:
        `lateral_error`: the mean over the waypoints; `lateral_error_max`: the largest of a path's.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    beside = beside_driven(pred, truth, truth_rot)
    return {"lateral_error": float(beside.mean()), "lateral_error_max": float(beside.max(axis=1).mean())}


def commit_time(pred: ArrayLike) -> float:
    """Time (s) from t0 from which on a path stays on the side of straight on that it ends on; mean over paths.

    Of paths `[K, 64, 3]` (m, ego frame at t0, y left) those count that end more than 2 m beside straight on; NaN
    where none does.
    """
    times = [_committed(path[:, 1]) for path in np.asarray(pred, dtype=np.float64)]
    known = [time_s for time_s in times if time_s is not None]
    return float(np.mean(known)) if known else math.nan


def _committed(beside: Floats) -> float | None:
    """Time of the first waypoint of the last stretch on the side of the end, y `[64]`."""
    if abs(beside[-1]) <= CORRIDOR_M:
        return None
    elsewhere = np.flatnonzero(beside * np.sign(beside[-1]) <= 0)
    return DT_S * (int(elsewhere[-1]) + 2 if elsewhere.size else 1)
