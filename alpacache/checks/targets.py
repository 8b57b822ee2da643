"""Checks of what the expert is trained on: acceleration and curvature of the path, and the speed at t0.

A path may be within centimetres of the truth and still teach nothing: at 10 Hz, 5 cm of noise in the positions are
accelerations that change by 1 m/s² from step to step, more than a driver's own. So the targets that `train` would see
are computed all along the recording, and judged by what a car can do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.actions import actions_of
from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.motion import MOVING_MPS, sound_poses
from alpacache.driving.poses import EgoPoses, Track, check_usable, ego_poses, interpolate, sample_times_us
from alpacache.driving.sample import DT_S, FUTURE_STEPS, HISTORY_STEPS, STEP_US, Floats
from alpacache.errors import BadClipError

WINDOW_US = 1_600_000
"""Time between two paths: each step of 0.1 s is part of four."""
MOST_WINDOWS = 64
"""Most paths of one recording, evenly spread."""
MARGIN_US = 2_000_000
"""Poses beyond a path that its spline still depends on."""
ROUGH_MPS2 = (0.85, 3.0)
"""Change of acceleration beside its neighbours' mean, root mean square, from which targets are noise (warn, fail)."""
ROUGH_SHARE = 0.25
"""Least roughness as a share of the accelerations: positions in a wrong unit make both larger alike."""
EVEN = 0.25
"""Least share of the roughness in the median step: noise is in all steps, a hard pedal in few."""
ROUGHNESS_A_METRE = 23.0
"""Roughness (m/s²) that a metre of white noise in positions gives, measured."""
GRID_M = (0.09, 0.25)
"""Grids of positions that are named (warn, fail)."""
LATE_SHARE = 0.05
"""Spread of pose intervals from which their times may be those of arrival."""
ROLLING_MPS = 0.8
"""Speed above which curvature is known."""
FAST_MPS = 15.0
HARD_MPS2 = (5.0, 7.0)
"""Acceleration that one in twenty moments above `FAST_MPS` exceeds: cars on roads keep below 4 there (warn, fail)."""
TIGHT_M = 3.3
"""Radius that no car's rear axle turns on."""
TIGHT_SHARE = 0.02
"""Share of the moments at which a car turns too tightly, from which it is no slip of the localisation."""
WALKING_MPS = 5.0
"""A drive of `WALKING_S` that never gets faster than this may be in a wrong unit."""
WALKING_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Targets of N paths cut from one recording."""

    accel_mps2: Floats
    """`[N, 64]`."""
    curvature_pm: Floats
    """`[N, 64]` in 1/m, left positive."""
    speed_mps: Floats
    """`[N, 64]` at the beginning of each step; the first is the speed at t0."""
    grid_m: float
    """Step of the grid that positions lie on; 0 if they lie on none."""
    is_float32: bool
    """True if that grid is the one of float32 at positions this large."""
    late_share: float
    """Spread of pose intervals, where speeds contradict them as they do if poses carry times of arrival; else 0."""

    @property
    def changes_mps2(self) -> Floats:
        """`[N, 62]` how much the acceleration lies beside its neighbours' mean, twice."""
        return np.diff(self.accel_mps2, n=2, axis=1)


def targets_of(track: Track) -> Targets | None:
    """Targets all along a recording with times in microseconds; None if it has no path of 8 s without gaps."""
    track = sound_poses(track)
    paths = _paths(track)
    if paths is None:
        return None
    accel, curvature, speed = actions_of(paths)
    if not all(np.isfinite(part).all() for part in (accel, curvature, speed)):
        return None
    gained = np.cumsum(accel * DT_S, axis=1)
    grid_m, is_float32 = _grid(track.xyz)
    return Targets(
        accel_mps2=accel,
        curvature_pm=curvature,
        speed_mps=speed[:, None] + np.concatenate([np.zeros_like(gained[:, :1]), gained[:, :-1]], axis=1),
        grid_m=grid_m,
        is_float32=is_float32,
        late_share=_late_share(track),
    )


def judge_targets(targets: Sequence[Targets]) -> Check:
    """Judge whether accelerations and curvatures are those of a car, and say what made them if not."""
    if not targets:
        return not_judged("targets", "no path of 8 s without gaps and with headings along it")
    gridded = [each for each in targets if each.grid_m >= GRID_M[0]]
    if 2 * len(gridded) > len(targets):
        return _judge_grid(gridded)
    changes = np.concatenate([each.changes_mps2 for each in targets])
    rough = float(np.median(np.sqrt((changes**2).mean(axis=1))))  # of the typical path: standstill has no noise to see
    usual = 1.48 * float(np.median(np.abs(changes)))  # equal for normal noise
    accel, curvature, speed = (
        np.concatenate([getattr(each, name).ravel() for each in targets])
        for name in ("accel_mps2", "curvature_pm", "speed_mps")
    )
    is_noise = rough > ROUGH_SHARE * float(np.percentile(np.abs(accel), 95)) and usual > EVEN * rough
    if rough > ROUGH_MPS2[0] and is_noise:
        return _judge_noise(targets, rough)
    return _judge_scale(accel, curvature, speed, rough)


def _judge_grid(gridded: Sequence[Targets]) -> Check:
    grid = float(np.median([each.grid_m for each in gridded]))
    finding = f"positions lie on a grid of {grid:.2g} m"
    remedy = "Export positions with centimetres: between such steps speeds and accelerations are made up."
    if all(each.is_float32 for each in gridded):
        finding += ", float32's at coordinates this large"
        remedy = "Keep UTM or ECEF coordinates in float64, and subtract an origin before anything is made float32."
    return verdict("targets", finding, **{"fail" if grid >= GRID_M[1] else "warn": remedy})


def _judge_noise(targets: Sequence[Targets], rough: float) -> Check:
    late = [each.late_share for each in targets if each.late_share > 0]
    finding = f"accelerations change by {rough:.1f} m/s² from step to step"
    if 2 * len(late) > len(targets):
        finding += f", and pose intervals vary by {100 * np.median(late):.0f} % while the distances between do not"
        remedy = "Poses seem to carry times of arrival: take the times at which they were measured."
    else:
        finding += f", as from {100 * rough / ROUGHNESS_A_METRE:.0f} cm of noise in the positions"
        remedy = "Smooth the localisation (fuse it with speed and yaw rate): the expert would be trained on its noise."
    return verdict("targets", finding, **{"fail" if rough > ROUGH_MPS2[1] else "warn": remedy})


def _judge_scale(accel: Floats, curvature: Floats, speed: Floats, rough: float) -> Check:
    sideways, rolling, fast = curvature * speed**2, speed > ROLLING_MPS, speed > FAST_MPS
    tight = rolling & (np.abs(curvature) * TIGHT_M > 1)
    if fast.sum() >= FUTURE_STEPS:
        hard = float(np.percentile(np.hypot(accel, sideways)[fast], 95))
        if hard > HARD_MPS2[0]:
            finding = (
                f"above {FAST_MPS:g} m/s, one moment in twenty accelerates or turns with more than {hard:.1f} m/s²"
            )
            remedy = "Positions look too large: km/h taken for m/s (3.6 times), or feet (3.3 times)?"
            return verdict("targets", finding, **{"fail" if hard > HARD_MPS2[1] else "warn": remedy})
    if tight.sum() >= max(10, TIGHT_SHARE * rolling.sum()):
        radius = 1 / float(np.median(np.abs(curvature[tight])))
        finding = f"turns on a radius of {radius:.1f} m, which no car does"
        remedy = "Positions look too small, such as 3.6 times (m/s taken for km/h); or the vehicle slides or is no car."
        return verdict("targets", finding, fail=remedy)
    fastest, moving_s = float(np.percentile(speed, 99.5)), rolling.sum() * WINDOW_US / 1e6 / FUTURE_STEPS
    if fastest < WALKING_MPS and moving_s > WALKING_S:
        finding = f"never faster than {fastest:.1f} m/s in {moving_s:.0f} s of movement"
        remedy = "If it drove on roads, positions are too small, such as 3.6 times (m/s taken for km/h)."
        return verdict("targets", finding, warn=remedy)
    bound = float(np.percentile(np.hypot(accel, sideways), 95))
    finding = f"accelerations up to {bound:.1f} m/s² (95 %), changing by {rough:.2f} m/s² from step to step"
    return verdict("targets", finding)


def _paths(track: Track) -> EgoPoses | None:
    """Paths every 1.6 s, as samples hold them, where the poses allow: `[N, 16, 3]` and so on. None if no part does."""
    times = track.timestamps_us
    if len(times) < 4:
        return None
    first, last = int(times[0]) + (HISTORY_STEPS - 1) * STEP_US, int(times[-1]) - FUTURE_STEPS * STEP_US
    count = min(MOST_WINDOWS, (last - first) // WINDOW_US + 1) if last >= first else 0
    wanted = [sample_times_us(int(t0_us)) for t0_us in first + (last - first) * np.arange(count) // max(1, count - 1)]
    wanted = [instants for instants in wanted if _is_usable(track, instants)]
    if not wanted:
        return None
    xyz, rot = interpolate(track, np.concatenate(wanted))
    paths = zip(np.split(xyz, len(wanted)), np.split(rot, len(wanted)), strict=True)
    return EgoPoses(*(np.stack(part) for part in zip(*(ego_poses(*path) for path in paths), strict=True)))


def _is_usable(track: Track, times_us: NDArray[np.int64]) -> bool:
    """Tell whether a sample may be cut here; poses `MARGIN_US` away have a say, its spline still depends on them."""
    begin, end = np.searchsorted(track.timestamps_us, times_us[[0, -1]] + np.array([-MARGIN_US, MARGIN_US]))
    part = Track(
        timestamps_us=track.timestamps_us[begin:end],
        xyz=track.xyz[begin:end],
        quaternion_xyzw=track.quaternion_xyzw[begin:end],
    )
    try:
        check_usable(part, times_us, where="poses")
    except BadClipError:
        return False
    return True


def _grid(xyz: Floats) -> tuple[float, bool]:
    """Step of the coarser grid that x or y lie on, and whether it is float32's; 0 if neither lies on one."""
    finding = (0.0, False)
    for column in (xyz[:, 0], xyz[:, 1]):
        gaps = np.diff(np.unique(np.round(column, 6)))
        if len(gaps) < 8:
            continue
        step = float(gaps.min())
        near = gaps[gaps < 20 * step] / step
        moves = np.round(np.diff(column) / step)
        # a car that keeps its speed is on a grid by chance: its steps are all alike
        varied = len(moves) > 1 and (np.diff(moves) != 0).mean() > 0.1
        if np.abs(near - np.round(near)).max() < 0.05 and varied and step > finding[0]:
            ulp = float(np.spacing(np.float32(np.abs(column).max())))
            finding = (step, bool(0.4 < step / ulp < 1.1))
    return finding


def _late_share(track: Track) -> float:
    """Spread of pose intervals, if the speeds between poses are the higher the shorter the interval; else 0."""
    from scipy.ndimage import median_filter

    steps_s, moved_m = np.diff(track.timestamps_us) / 1e6, np.linalg.norm(np.diff(track.xyz, axis=0), axis=1)
    speed = moved_m / steps_s
    sound = (speed > MOVING_MPS) & (steps_s < 1.0)
    if sound.sum() < 30:
        return 0.0
    interval, pace = (np.log(values / median_filter(values, 9))[sound] for values in (steps_s, np.maximum(speed, 1e-3)))
    spread = float(interval.std())
    if spread < LATE_SHARE or pace.std() < 1e-6:
        return 0.0
    likeness = float(np.corrcoef(interval, pace)[0, 1])
    return spread if likeness < -0.8 else 0.0
