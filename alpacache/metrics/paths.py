"""Errors of sampled paths against the driven one, in metres, under the keys of the public evaluation.

The public code picks the best sample once, over the whole 6.4 s, and reports that same sample at the shorter horizons:
another sample may be nearer at 0.5 s, so `min_ade/by_t=0.5` is not a minimum. Sums are float64, so the result does not
depend on the dtype that a model ran in.

Source: the metrics of the public Alpamayo evaluation; `extra_metrics` follows the Argoverse and Waymo forecasting
benchmarks.
"""

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import DT_S, Floats

MIN_ADE_HORIZONS_S = (0.5, 1.0, 3.0, 5.0)
ADE_HORIZONS_S = (3.0,)
BOX_M = (4.0, 3.0, 2.0)
"""Length, width and height of the vehicle box of `corner_distance`, centred on the pose."""
MISS_RADIUS_M = 2.0
PUBLIC_KEYS = (
    "min_ade",
    *(f"min_ade/by_t={horizon_s}" for horizon_s in MIN_ADE_HORIZONS_S),
    "ade",
    *(f"ade/by_t={horizon_s}" for horizon_s in ADE_HORIZONS_S),
    "corner_distance",
)
EXTRA_KEYS = ("fde", "min_fde", "miss_rate")


def min_ade(pred: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """Displacement errors in xy of K sampled paths.

    Args:
        pred: `[K, 64, 3]` predicted paths, metres, ego frame at t0. Torch tensors on the CPU will do.
        truth: `[64, 3]` the driven path in the same frame.

    Returns:
        `min_ade` and `min_ade/by_t=...`: mean error of the sample that is best over the full horizon.
        `ade` and `ade/by_t=3.0`: mean error of sample 0. All in metres.

    Raises:
        ValueError: shapes that do not fit, paths shorter than 5 s, or values that are not finite.
    """
    error = displacement(pred, truth)
    best = error[error.mean(axis=1).argmin()]
    by_horizon = {f"min_ade/by_t={horizon_s}": _mean_until(best, horizon_s) for horizon_s in MIN_ADE_HORIZONS_S}
    by_horizon |= {f"ade/by_t={horizon_s}": _mean_until(error[0], horizon_s) for horizon_s in ADE_HORIZONS_S}
    return {"min_ade": float(best.mean()), "ade": float(error[0].mean()), **by_horizon}


def corner_distance(pred: ArrayLike, pred_rot: ArrayLike, truth: ArrayLike, truth_rot: ArrayLike) -> dict[str, float]:
    """Mean distance in 3-D between the corners of a 4 x 3 x 2 m box along the predicted and the driven path.

    The minimum over samples is taken at each time and corner on its own, then the mean. The samples are judged as a
    set, so the result may lie below the error of every single one.

    Args:
        pred: `[K, T, 3]` predicted paths, metres, ego frame at t0.
        pred_rot: `[K, T, 3, 3]` vehicle-to-ego-frame rotations.
        truth: `[T, 3]` the driven path.
        truth_rot: `[T, 3, 3]`.

    Returns:
        `corner_distance` in metres.

    Raises:
        ValueError: shapes that do not fit or values that are not finite.
    """
    pred_xyz, truth_xyz = checked_paths(pred, truth)
    pred_corners = _corners(pred_xyz, _rotations(pred_rot, pred_xyz, "pred_rot"))
    truth_corners = _corners(truth_xyz, _rotations(truth_rot, truth_xyz, "truth_rot"))
    distance = np.linalg.norm(pred_corners - truth_corners, axis=-1)
    return {"corner_distance": float(distance.min(axis=0).mean())}


def extra_metrics(pred: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """Errors in xy of the last waypoint, not part of the public evaluation.

    Args:
        pred: `[K, T, 3]` predicted paths, metres, ego frame at t0.
        truth: `[T, 3]` the driven path.

    Returns:
        `fde`: final error of sample 0; `min_fde`: the smallest of the K final errors (each sample on its own, not the
        one `min_ade` picks); `miss_rate`: 1.0 where `min_fde` exceeds 2 m, else 0.0, a rate once averaged.

    Raises:
        ValueError: shapes that do not fit or values that are not finite.
    """
    final = displacement(pred, truth)[:, -1]
    smallest = float(final.min())
    return {"fde": float(final[0]), "min_fde": smallest, "miss_rate": float(smallest > MISS_RADIUS_M)}


def displacement(pred: ArrayLike, truth: ArrayLike) -> Floats:
    """Distances in xy `[K, T]` (m) of paths `[K, T, 3]` and the driven `[T, 3]`; raises as `extra_metrics` does."""
    pred_xyz, truth_xyz = checked_paths(pred, truth)
    distance: Floats = np.linalg.norm(pred_xyz[..., :2] - truth_xyz[..., :2], axis=-1)
    return distance


def _mean_until(error: Floats, horizon_s: float) -> float:
    steps = round(horizon_s / DT_S)  # waypoint i is at t0 + (i + 1) / 10 s
    if error.size < steps:
        raise ValueError(f"a path of {error.size} waypoints (10 Hz) has no error at {horizon_s} s; it needs {steps}.")
    return float(error[:steps].mean())


def _corners(xyz: Floats, rot: Floats) -> Floats:
    """Box corners `[..., 8, 3]` of poses `[..., 3]`, `[..., 3, 3]`."""
    signs = np.stack(np.meshgrid([-0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5], indexing="ij"), axis=-1).reshape(8, 3)
    turned: Floats = np.einsum("...ij,cj->...ci", rot, signs * np.asarray(BOX_M))
    return turned + xyz[..., None, :]


def checked_paths(pred: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    """Paths `[K, T, 3]` and the driven `[T, 3]` as float64; raises as `extra_metrics` does."""
    pred_xyz, truth_xyz = np.asarray(pred, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if truth_xyz.ndim != 2 or truth_xyz.shape[1] != 3 or not truth_xyz.size:
        raise ValueError(f"truth has shape {truth_xyz.shape}, expected [T, 3].")
    if pred_xyz.ndim != 3 or not pred_xyz.shape[0] or pred_xyz.shape[1:] != truth_xyz.shape:
        raise ValueError(f"pred has shape {pred_xyz.shape}, expected [K, {truth_xyz.shape[0]}, 3] to go with truth.")
    for name, values in (("pred", pred_xyz), ("truth", truth_xyz)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds values that are not finite; a path with NaN has no error.")
    return pred_xyz, truth_xyz


def _rotations(rot: ArrayLike, xyz: Floats, name: str) -> Floats:
    matrices = np.asarray(rot, dtype=np.float64)
    if matrices.shape != (*xyz.shape, 3):
        raise ValueError(f"{name} has shape {matrices.shape}, expected {(*xyz.shape, 3)} to go with its path.")
    if not np.isfinite(matrices).all():
        raise ValueError(f"{name} holds values that are not finite.")
    return matrices
