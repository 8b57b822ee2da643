"""The unicycle action space: paths as acceleration and curvature, and back.

The expert never sees metres: a 6.4 s path is 64 normalised pairs of acceleration and curvature. To find them for a
recorded path, four small regularised least-squares problems are solved, which smooth the recording noise; the way back
is plain integration. The problems are set up in float32, as in the public code, and solved in float64. All in float64
a label would differ by 5e-4 from the public code's; all in float32 by up to 9e-4, as processors round differently.

Source: `UnicycleAccelCurvatureActionSpace` of the public Alpamayo code (its behaviour, pinned by golden actions).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from alpacache.driving.sample import DT_S, FUTURE_STEPS, LabelRule

_GUARDED_MPS = 0.6
"""Below this speed a turn of the heading is noise: divided by the distance, half a degree would be a hairpin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnicycleActionSpace:
    """The space's constants; means and standard deviations are the checkpoint's *after* rounding to its dtype."""

    accel_mean: float
    accel_std: float
    curvature_mean: float
    curvature_std: float
    dt_s: float = DT_S
    waypoints: int = FUTURE_STEPS
    theta_lambda: float = 1e-6
    theta_ridge: float = 1e-8
    v_lambda: float = 1e-6
    v_ridge: float = 1e-4
    a_lambda: float = 1e-4
    a_ridge: float = 1e-4
    kappa_lambda: float = 1e-4
    kappa_ridge: float = 1e-4
    curvature_bounds: tuple[float, float] = (-0.33, 0.33)
    """Least and greatest curvature (1/m) of a guarded label."""
    label_rule: LabelRule = "guarded"

    @torch.no_grad()
    def to_action(
        self,
        history_xyz: Tensor,
        history_rot: Tensor,
        future_xyz: Tensor,
        future_rot: Tensor,
        *,
        label_rule: LabelRule | None = None,
    ) -> Tensor:
        """Turn a recorded path into normalised actions.

        Args are `[..., 16, 3]`, `[..., 16, 3, 3]`, `[..., 64, 3]`, `[..., 64, 3, 3]`, metres, ego frame at t0.
        `label_rule` is the space's unless it is given. Returns `[..., 64, 2]` float32: acceleration, then curvature. A
        path gives the same bits whatever other paths are in the batch. Raises `ValueError` for any other rule.
        """
        rule = self.label_rule if label_rule is None else label_rule
        if rule not in get_args(LabelRule):
            raise ValueError(f"label_rule is {rule!r}; expected {' or '.join(map(repr, get_args(LabelRule)))}.")
        if math.prod(future_xyz.shape[:-2]) == 1:  # alone it would go through a matrix product that rounds differently
            lead = future_xyz.ndim - 2
            poses = (history_xyz, history_rot, future_xyz, future_rot)
            two = (torch.stack([pose.reshape(pose.shape[lead:])] * 2) for pose in poses)
            return self.to_action(*two, label_rule=rule)[0].reshape(*future_xyz.shape[:-2], -1, 2)
        with torch.autocast(future_xyz.device.type, enabled=False):
            history_xyz, history_rot = history_xyz.float(), history_rot.float()
            future_xyz, future_rot = future_xyz.float(), future_rot.float()
            speed0 = self.initial_speed(history_xyz, history_rot)
            theta = self._smooth_heading(history_rot, future_rot)
            xy = torch.cat([history_xyz[..., -1:, :2], future_xyz[..., :2]], dim=-2)
            speed = self._speed(xy, theta, first=speed0)
            accel = self._acceleration(speed)
            curvature = self._curvature(theta, speed[..., :-1], accel)
            if rule == "guarded":
                slow = speed.abs() < _GUARDED_MPS
                curvature = curvature.clamp(*self.curvature_bounds)
                curvature = curvature.masked_fill(slow[..., :-1] | slow[..., 1:], 0.0)
            accel = (accel - self.accel_mean) / self.accel_std
            curvature = (curvature - self.curvature_mean) / self.curvature_std
            return torch.stack([accel, curvature], dim=-1)

    def to_path(self, action: Tensor, history_xyz: Tensor, history_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Turn actions `[..., 64, 2]` into positions `[..., 64, 3]` (m) and rotations `[..., 64, 3, 3]` (yaw only).

        The history gives the speed at t0 and the height, which stays constant; its leading axes broadcast against
        those of `action`.
        """
        with torch.autocast(action.device.type, enabled=False):
            action, history_xyz, history_rot = action.float(), history_xyz.float(), history_rot.float()
            accel = action[..., 0] * self.accel_std + self.accel_mean
            curvature = action[..., 1] * self.curvature_std + self.curvature_mean
            dt = self.dt_s
            speed0 = self.initial_speed(history_xyz, history_rot).expand(accel.shape[:-1])[..., None]
            speed = torch.cat([speed0, speed0 + torch.cumsum(accel * dt, dim=-1)], dim=-1)
            turn = curvature * speed[..., :-1] * dt + curvature * accel * (dt * dt / 2)
            theta = torch.cat([torch.zeros_like(speed0), torch.cumsum(turn, dim=-1)], dim=-1)
            vx, vy = speed * torch.cos(theta), speed * torch.sin(theta)
            x = torch.cumsum((vx[..., :-1] + vx[..., 1:]) * (dt / 2), dim=-1)
            y = torch.cumsum((vy[..., :-1] + vy[..., 1:]) * (dt / 2), dim=-1)
            z = history_xyz[..., -1:, 2].expand(x.shape)
            return torch.stack([x, y, z], dim=-1), yaw_rotation(theta[..., 1:])

    def initial_speed(self, history_xyz: Tensor, history_rot: Tensor) -> Tensor:
        """Speed at t0 `[...]` (m/s), solved over the history with its recorded yaw and no value held fixed."""
        return self._speed(history_xyz[..., :2], unwrap(yaw_of(history_rot)), first=None)[..., -1]

    def _smooth_heading(self, history_rot: Tensor, future_rot: Tensor) -> Tensor:
        """Smoothed heading `[..., 65]` (rad) from t0 on; its first value is held at 0."""
        yaw = unwrap(torch.cat([yaw_of(history_rot[..., -1:, :, :]), yaw_of(future_rot)], dim=-1))
        yaw = yaw - yaw[..., :1]
        n = yaw.shape[-1]
        penalty = self._penalty(n, order=3, weight=self.theta_lambda, ridge=self.theta_ridge, like=yaw)
        normal = _identity(n, yaw.dtype, yaw.device) + penalty
        return _solve(normal.expand(*yaw.shape[:-1], n, n), yaw, first=torch.zeros_like(yaw[..., 0]))

    def _speed(self, xy: Tensor, theta: Tensor, *, first: Tensor | None) -> Tensor:
        """Speed at every pose `[..., N]` from N positions and headings; `v_k u_k + v_k+1 u_k+1 = 2 dp / dt`."""
        n = theta.shape[-1]
        u = torch.stack([torch.cos(theta), torch.sin(theta)], dim=-2)
        step = 2.0 * (xy[..., 1:, :] - xy[..., :-1, :]) / self.dt_s
        design = theta.new_zeros(*theta.shape[:-1], 2, n - 1, n)
        design.diagonal(0, -2, -1).copy_(u[..., :-1])
        design.diagonal(1, -2, -1).copy_(u[..., 1:])
        design, data = design.flatten(-3, -2), step.transpose(-1, -2).flatten(-2)
        normal = design.transpose(-1, -2) @ design
        normal = normal + self._penalty(n, order=3, weight=self.v_lambda, ridge=self.v_ridge, like=theta)
        return _solve(normal, (design.transpose(-1, -2) @ data[..., None])[..., 0], first=first)

    def _acceleration(self, speed: Tensor) -> Tensor:
        """Acceleration `[..., N - 1]` (m/s^2) from N speeds."""
        data = (speed[..., 1:] - speed[..., :-1]) / self.dt_s
        n = data.shape[-1]
        penalty = self._penalty(n, order=2, weight=self.a_lambda, ridge=0.0, like=speed)
        normal = _identity(n, speed.dtype, speed.device) + penalty
        return _solve_retrying(normal.expand(*data.shape, n), data, ridge=self.a_ridge)

    def _curvature(self, theta: Tensor, speed: Tensor, accel: Tensor) -> Tensor:
        """Curvature `[..., N]` (1/m): `s kappa = dtheta` over the distance `s = v dt + a dt^2 / 2`."""
        distance = speed * self.dt_s + accel * (self.dt_s**2 / 2)
        turn = theta[..., 1:] - theta[..., :-1]
        n = turn.shape[-1]
        penalty = self._penalty(n, order=2, weight=self.kappa_lambda, ridge=0.0, like=theta)
        return _solve_retrying(torch.diag_embed(distance * distance) + penalty, distance * turn, ridge=self.kappa_ridge)

    def _penalty(self, n: int, *, order: int, weight: float, ridge: float, like: Tensor) -> Tensor:
        return _penalty(n, order, weight / self.dt_s ** (2 * order), ridge, like.dtype, like.device)


def yaw_of(rot: Tensor) -> Tensor:
    """Yaw (rad) of rotation matrices `[..., 3, 3]`."""
    return torch.atan2(rot[..., 1, 0], rot[..., 0, 0])


def yaw_rotation(yaw: Tensor) -> Tensor:
    """Rotation matrices `[..., 3, 3]` about z."""
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).view(*yaw.shape, 3, 3)


def unwrap(angle: Tensor) -> Tensor:
    """Remove jumps of 2 pi from angles along the last axis."""
    step = angle[..., 1:] - angle[..., :-1]
    wrapped = torch.remainder(step + math.pi, 2 * math.pi) - math.pi
    return torch.cat([angle[..., :1], angle[..., :1] + torch.cumsum(wrapped, dim=-1)], dim=-1)


@lru_cache(maxsize=64)
def _penalty(n: int, order: int, weight: float, ridge: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`weight * D^T D + ridge * I` `[n, n]` for the difference operator D of this order. Shared: never write to it."""
    eye = _identity(n, dtype, device)
    operator = eye
    for _ in range(order):
        operator = operator[1:] - operator[:-1]
    with torch.autocast(device.type, enabled=False):  # the cached result outlives the caller's autocast
        return weight * (operator.T @ operator) + ridge * eye


@lru_cache(maxsize=64)
def _identity(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[n, n]`. Shared: never write to it."""
    return torch.eye(n, dtype=dtype, device=device)


def _solve(normal: Tensor, right: Tensor, *, first: Tensor | None) -> Tensor:
    """Solve normal equations `[..., n, n]`, `[..., n]` by Cholesky; a `first` value is held fixed."""
    if first is None:
        return _solve_by(torch.linalg.cholesky(normal.double()), right)
    right = right[..., 1:].double() - normal[..., 1:, 0].double() * first[..., None].double()
    rest = _solve_by(torch.linalg.cholesky(normal[..., 1:, 1:].double()), right)
    return torch.cat([first[..., None], rest.to(first.dtype)], dim=-1)


def _solve_by(factor: Tensor, right: Tensor) -> Tensor:
    """Solve by a Cholesky factor `[..., n, n]` in float64; in the dtype of the right side `[..., n]`."""
    return torch.cholesky_solve(right[..., None].double(), factor)[..., 0].to(right.dtype)


def _solve_retrying(normal: Tensor, right: Tensor, *, ridge: float) -> Tensor:
    """Solve by Cholesky; a matrix that is not positive definite (a standstill, say) gets a ridge that grows tenfold."""
    eye = _identity(normal.shape[-1], normal.dtype, normal.device)
    ridges = normal.new_full((*normal.shape[:-2], 1, 1), ridge)
    for _ in range(8):
        info = torch.linalg.cholesky_ex(normal + ridges * eye).info
        if not bool(info.any()):
            return _solve_by(torch.linalg.cholesky((normal + ridges * eye).double()), right)
        ridge *= 10.0
        ridges = ridges.where((info == 0)[..., None, None], ridge)
    raise ArithmeticError(f"the least-squares problem stays singular with a ridge of {ridge:g}; is the path finite?")
