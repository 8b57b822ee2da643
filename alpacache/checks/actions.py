"""Accelerations and curvatures of recorded paths: those of `UnicycleActionSpace`, to a thousandth, without torch.

`check` needs them for its verdicts alone, and importing torch would take longer than judging a dozen clips. So the same
least-squares problems are solved here by NumPy, all in float64; a test holds them against the action space, whose
module says what they mean.
"""

from functools import lru_cache

import numpy as np

from alpacache.driving.poses import EgoPoses
from alpacache.driving.sample import DT_S, Floats

_THETA_LAMBDA, _THETA_RIDGE = 1e-6, 1e-8
_V_LAMBDA, _V_RIDGE = 1e-6, 1e-4
_A_LAMBDA, _A_RIDGE = 1e-4, 1e-4
_KAPPA_LAMBDA, _KAPPA_RIDGE = 1e-4, 1e-4
_CURVATURE_PM = 0.33
_GUARDED_MPS = 0.6


def actions_of(paths: EgoPoses) -> tuple[Floats, Floats, Floats]:
    """Acceleration `[N, 64]` (m/s²), curvature `[N, 64]` (1/m), as guarded labels have them, and speed `[N]` at t0."""
    history_xy, future_xy = (xyz[..., :2].astype(np.float64) for xyz in (paths.history_xyz, paths.future_xyz))
    history_yaw, future_yaw = (
        np.arctan2(rot[..., 1, 0], rot[..., 0, 0]).astype(np.float64) for rot in (paths.history_rot, paths.future_rot)
    )
    first = _speeds(history_xy, np.unwrap(history_yaw))[:, -1]
    yaw = np.unwrap(np.concatenate([history_yaw[:, -1:], future_yaw], axis=1))
    size = yaw.shape[1]
    theta = _held(np.eye(size) + _penalty(size, 3, _THETA_LAMBDA, _THETA_RIDGE), yaw - yaw[:, :1], np.zeros_like(first))
    speed = _speeds(np.concatenate([history_xy[:, -1:], future_xy], axis=1), theta, first=first)
    steps = size - 1
    accel = _solved(np.eye(steps) + _penalty(steps, 2, _A_LAMBDA, _A_RIDGE), np.diff(speed) / DT_S)
    way = speed[:, :-1] * DT_S + accel * (DT_S**2 / 2)
    normal = np.eye(steps) * (way**2)[:, None] + _penalty(steps, 2, _KAPPA_LAMBDA, _KAPPA_RIDGE)
    curvature = np.clip(_solved(normal, way * np.diff(theta)), -_CURVATURE_PM, _CURVATURE_PM)
    slow = np.abs(speed) < _GUARDED_MPS
    return accel, np.where(slow[:, :-1] | slow[:, 1:], 0.0, curvature), first


def _speeds(xy: Floats, theta: Floats, *, first: Floats | None = None) -> Floats:
    """`[N, n]` speeds along the headings `theta` by positions `[N, n, 2]`; `first` `[N]` is held.

    A step is the mean of the velocities at both of its ends.
    """
    size = theta.shape[1]
    along = np.stack([np.cos(theta), np.sin(theta)], axis=-1)
    step = 2 * np.diff(xy, axis=1) / DT_S
    inner = np.ones((1, size))
    inner[:, 1:-1] = 2
    normal = np.eye(size) * inner[:, None] + _penalty(size, 3, _V_LAMBDA, _V_RIDGE)
    normal = np.repeat(normal, len(theta), axis=0)
    before, after, turned = np.arange(size - 1), np.arange(1, size), np.cos(np.diff(theta))
    normal[:, before, after] += turned
    normal[:, after, before] += turned
    right = np.zeros_like(theta)
    right[:, :-1] += (along[:, :-1] * step).sum(axis=-1)
    right[:, 1:] += (along[:, 1:] * step).sum(axis=-1)
    return _solved(normal, right) if first is None else _held(normal, right, first)


def _held(normal: Floats, right: Floats, first: Floats) -> Floats:
    """Solutions `[N, n]` whose first value is `first` `[N]`."""
    rest = right[:, 1:] - normal[..., 1:, 0] * first[:, None]
    return np.concatenate([first[:, None], _solved(normal[..., 1:, 1:], rest)], axis=1)


def _solved(normal: Floats, right: Floats) -> Floats:
    """Solutions `[N, n]` of normal equations, one `[n, n]` for all right sides `[N, n]` or each with its own."""
    if normal.ndim == 2:
        return np.asarray(np.linalg.solve(normal, right.T).T, dtype=np.float64)
    return np.asarray(np.linalg.solve(normal, right[..., None])[..., 0], dtype=np.float64)


@lru_cache
def _penalty(size: int, order: int, weight: float, ridge: float) -> Floats:
    """`[size, size]` for differences of this order. Shared: never write to it."""
    operator = np.diff(np.eye(size), n=order, axis=0) / DT_S**order
    return weight * (operator.T @ operator) + ridge * np.eye(size)
