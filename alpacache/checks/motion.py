"""A vehicle's motion from its poses alone: speed, course and heading on a coarse time grid.

Any fixed world frame is allowed, so everything is measured against the vehicle's own axes. The world is first turned so
that the vehicle's mean z axis points up; course and heading are angles in that plane, left positive.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.poses import Track
from alpacache.driving.sample import Floats

RASTER_US = 200_000
"""Step of the grid: so long that centimetres of localisation noise do not turn the course."""
MOVING_MPS = 2.0
"""Speed below which the course is mostly noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """`[N]` steps of about 0.2 s between two poses."""

    times_us: NDArray[np.int64]
    """Middle of each step."""
    dt_s: Floats
    speed_mps: Floats
    course_rad: Floats
    """Direction of the movement."""
    heading_rad: Floats
    """Direction of the vehicle's x axis in the middle of the step."""
    turned_rad: Floats
    """Change of heading within the step."""
    direction: Floats
    """`[N, 3]` unit vectors of the movement, in the vehicle's own axes."""
    z_axis: Floats
    """`[N, 3]` the vehicle's z axis in the world as recorded."""

    @property
    def moving(self) -> NDArray[np.bool_]:
        return self.speed_mps > MOVING_MPS

    @property
    def turn_rate_radps(self) -> Floats:
        return self.turned_rad / self.dt_s

    @property
    def sideways_mps2(self) -> Floats:
        """Lateral acceleration."""
        return np.abs(self.speed_mps * self.turn_rate_radps)


def motion_of(track: Track) -> Motion | None:
    """Motion of a track; None if too few poses are finite and in order of time."""
    from scipy.spatial.transform import Rotation

    norms = np.linalg.norm(track.quaternion_xyzw, axis=1)
    sound = np.isfinite(track.xyz).all(axis=1) & np.isfinite(norms) & (norms > 1e-6)
    times, first = np.unique(track.timestamps_us[sound], return_index=True)
    if len(times) < 3:
        return None
    chosen = np.unique(np.searchsorted(times, np.arange(times[0], times[-1] + 1, RASTER_US)))
    if len(chosen) < 3:
        return None
    times, xyz = times[chosen], track.xyz[sound][first[chosen]]
    rot = Rotation.from_quat(track.quaternion_xyzw[sound][first[chosen]]).as_matrix()
    dt_s, moved = np.diff(times) / 1e6, np.diff(xyz, axis=0)
    level = _levelling(rot[:, :, 2].mean(axis=0))
    forward, flat = (rot[:, :, 0] @ level.T), moved @ level.T
    yaw = np.unwrap(np.arctan2(forward[:, 1], forward[:, 0]))
    direction = np.einsum("nij,ni->nj", rot[:-1] + rot[1:], moved)
    return Motion(
        times_us=(times[:-1] + times[1:]) // 2,
        dt_s=dt_s,
        speed_mps=np.linalg.norm(moved, axis=1) / dt_s,
        course_rad=np.arctan2(flat[:, 1], flat[:, 0]),
        heading_rad=(yaw[:-1] + yaw[1:]) / 2,
        turned_rad=np.diff(yaw),
        direction=direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-9),
        z_axis=rot[:-1, :, 2],
    )


def wrapped(angle_rad: Floats) -> Floats:
    """Angles brought to between -pi and pi."""
    turned: Floats = (angle_rad + np.pi) % (2 * np.pi) - np.pi
    return turned


def concentration(angle_rad: Floats) -> tuple[float, float]:
    """How alike angles are, 0 to 1, and their mean in radians."""
    mean = complex(np.exp(1j * angle_rad).mean())
    return abs(mean), float(np.angle(mean))


def _levelling(up: Floats) -> Floats:
    """The rotation matrix that turns `up` to +z; the identity where `up` is hardly a direction."""
    from scipy.spatial.transform import Rotation

    length = float(np.linalg.norm(up))
    if length < 0.1:
        return np.eye(3)
    axis = np.cross(up / length, [0.0, 0.0, 1.0])
    sine, cosine = float(np.linalg.norm(axis)), float(up[2]) / length
    if sine < 1e-9:
        return np.diag([1.0, 1.0, 1.0] if cosine > 0 else [1.0, -1.0, -1.0])
    matrix: Floats = Rotation.from_rotvec(axis / sine * np.arctan2(sine, cosine)).as_matrix()
    return matrix
