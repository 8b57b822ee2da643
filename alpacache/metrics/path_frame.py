"""Errors in the frame of the driven path: too far or too short along it, and beside it; and after a turn's onset.

A distance in xy does not tell whether a path is at the wrong place of the right road or beside it. Measured along the
driven path, a wrong speed on the right line is all along-track, a wrong line at the right speed all cross-track.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import DT_S, FUTURE_S, Floats
from alpacache.driving.strata import STRAIGHT_HEADING_RAD, driven_heading, heading
from alpacache.metrics.paths import checked_paths, displacement

TRACK_HORIZONS_S = (2.0, 4.0, FUTURE_S)
TRACK_KEYS = tuple(f"{kind}_track@{horizon_s}" for kind in ("along", "cross") for horizon_s in TRACK_HORIZONS_S)
ONSET_KEY = "after_onset"
_BEYOND_M = 1e4
"""The driven path goes on straight for so long before its start and after its end."""
_STANDING_M = 0.05
"""Waypoints nearer to the last than this are no part of the driven line: standing, they only jitter."""


def track_errors(pred: ArrayLike, truth: ArrayLike, truth_rot: ArrayLike) -> dict[str, float]:
    """Along-track and cross-track error at 2, 4 and 6.4 s, each a mean of absolute values over the K paths.

    A predicted waypoint is projected onto the driven line, which begins at t0 and is extended straight at both ends:
    along-track is the length of line from the driven waypoint of that time, cross-track the distance from the line.

    Args:
        pred: `[K, 64, 3]` predicted paths, metres, ego frame at t0.
        truth: `[64, 3]` the driven path.
        truth_rot: `[64, 3, 3]` its rotations.

    Returns:
        `along_track@2.0` ... `cross_track@6.4` in metres.

    Raises:
        ValueError: shapes that do not fit, paths that are too short, or values that are not finite.
    """
    paths, driven = checked_paths(pred, truth)
    steps = [round(horizon_s / DT_S) - 1 for horizon_s in TRACK_HORIZONS_S]
    if len(driven) <= steps[-1]:
        raise ValueError(f"a path of {len(driven)} waypoints (10 Hz) ends before {TRACK_HORIZONS_S[-1]} s.")
    line, lengths = _driven_line(driven[:, :2], float(heading(truth_rot)[-1]))
    along, cross = [], []
    for step in steps:
        reached, _ = _project(driven[step : step + 1, :2], line, lengths)
        there, beside = _project(paths[:, step, :2], line, lengths)
        along.append(float(np.abs(there - reached).mean()))
        cross.append(float(beside.mean()))
    return dict(zip(TRACK_KEYS, (*along, *cross), strict=True))


def beside_driven(pred: ArrayLike, truth: ArrayLike, truth_rot: ArrayLike) -> Floats:
    """Distance (m) of each waypoint from the driven line `[K, T]`; takes and raises what `track_errors` does."""
    paths, driven = checked_paths(pred, truth)
    line, lengths = _driven_line(driven[:, :2], float(heading(truth_rot)[-1]))
    return _project(paths[..., :2].reshape(-1, 2), line, lengths)[1].reshape(paths.shape[:2])


def error_after_onset(pred: ArrayLike, truth: ArrayLike, truth_rot: ArrayLike) -> float:
    """Mean distance in xy (m) of the K paths from the waypoint on at which the driven path has turned by 5 degrees.

    NaN where it never has: there is no turn. Takes and raises what `track_errors` does.
    """
    error = displacement(pred, truth)
    rotations = np.concatenate([np.eye(3)[None], np.asarray(truth_rot, dtype=np.float64)])
    turned = driven_heading(np.concatenate([np.zeros((1, 3)), np.asarray(truth, dtype=np.float64)]), rotations)[1:]
    onset = np.flatnonzero(np.abs(turned) >= STRAIGHT_HEADING_RAD)
    return float(error[:, onset[0] :].mean()) if onset.size else math.nan


def _driven_line(points: Floats, last_heading: float) -> tuple[Floats, Floats]:
    """Vertices `[N, 2]` of the driven line from t0 on, extended at both ends, and the lengths `[N]` to them."""
    vertices = [np.zeros(2)]
    for point in points:
        if np.linalg.norm(point - vertices[-1]) > _STANDING_M:
            vertices.append(point)
    first = vertices[1] - vertices[0] if len(vertices) > 1 else np.array([1.0, 0.0])
    last = vertices[-1] - vertices[-2] if len(vertices) > 1 else np.array([np.cos(last_heading), np.sin(last_heading)])
    before = vertices[0] - _BEYOND_M * first / np.linalg.norm(first)
    line = np.stack([before, *vertices, vertices[-1] + _BEYOND_M * last / np.linalg.norm(last)])
    return line, np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=-1))])


def _project(points: Floats, line: Floats, lengths: Floats) -> tuple[Floats, Floats]:
    """Length along a line at which each of `[K, 2]` points is nearest to it, and the distance there; both `[K]`."""
    starts, spans = line[:-1], np.diff(line, axis=0)
    squares = (spans**2).sum(axis=-1)
    share = np.clip(((points[:, None] - starts) * spans).sum(axis=-1) / squares, 0.0, 1.0)
    distance = np.linalg.norm(points[:, None] - starts - share[..., None] * spans, axis=-1)
    nearest = distance.argmin(axis=1)
    rows = np.arange(len(points))
    along: Floats = lengths[nearest] + share[rows, nearest] * np.sqrt(squares[nearest])
    return along, distance[rows, nearest]
