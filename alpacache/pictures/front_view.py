"""Paths drawn into the front camera's picture, where the sample's calibration is known.

Camera models are those of the PhysicalAI-AV devkit (f-theta) and of the folder layout (pinhole); see
docs/reference/sources.md. Paths lie at the height of the vehicle's origin at t0.
"""

import io
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from alpacache.driving.sample import Floats

_NEAREST_M = 0.5
"""Least distance from the camera: points nearer than this swing wildly with a pixel of error."""
_WIDEST_RAD = np.deg2rad(85.0)
"""Largest angle to the optical axis: beyond it the f-theta polynomial means nothing."""
_FAR_OUT_PX = 1e5
SMOOTH = 2
"""Factor by which lines are drawn larger and then shrunk, against jagged edges."""


def project(points_m: ArrayLike, lens: Mapping[str, Any]) -> Floats:
    """Project points `[N, 3]` of the vehicle's frame to pixels `[N, 2]` (x right, y down, full picture); NaN: unseen.

    Args:
        lens: one camera of a sample's calibration, `model` pinhole or ftheta.

    Raises:
        ValueError: another model, or a value that is missing or of the wrong shape.
    """
    try:
        rotation, position = _numbers(lens, "rotation").reshape(3, 3), _numbers(lens, "position_m").reshape(3)
        rays = (np.asarray(points_m, dtype=np.float64) - position) @ rotation
        beside = np.linalg.norm(rays[:, :2], axis=1)
        angle = np.arctan2(beside, rays[:, 2])
        if lens["model"] == "pinhole":
            scale = _numbers(lens, "fx", "fy") / np.maximum(rays[:, 2:], 1e-9)
        elif lens["model"] == "ftheta":
            radius = np.polynomial.Polynomial(_numbers(lens, "fw_poly"))(angle)
            scale = (radius / np.maximum(beside, 1e-9))[:, None]
        else:
            raise ValueError(f"camera model {lens['model']!r} is unknown; known are pinhole and ftheta.")
        pixels: Floats = _numbers(lens, "cx", "cy") + scale * rays[:, :2]
    except (KeyError, TypeError) as error:
        raise ValueError(f"calibration lacks or misstates {error}; expected docs/reference/sources.md.") from error
    pixels[(rays[:, 2] < _NEAREST_M) | (angle > _WIDEST_RAD)] = np.nan
    return pixels


def draw_paths(
    front_jpeg: bytes, lens: Mapping[str, Any], truth_xyz: ArrayLike, paths: Mapping[str, tuple[str, ArrayLike]]
) -> bytes:
    """Draw the driven path (black on white) and predicted ones into the picture; returns JPEG bytes.

    Args:
        front_jpeg: the front frame at any size; the calibration is of `width` x `height`.
        truth_xyz: `[64, 3]` metres, ego frame at t0.
        paths: label -> colour such as `#d55e00`, and `[K, 64, 3]`.

    Raises:
        ValueError: a calibration that cannot be used.
    """
    with Image.open(io.BytesIO(front_jpeg)) as image:
        picture = image.convert("RGB")
    size = picture.size
    try:
        stretch = np.array([SMOOTH * size[0] / lens["width"], SMOOTH * size[1] / lens["height"]])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"calibration lacks a width or height ({error}).") from error
    large = picture.resize((SMOOTH * size[0], SMOOTH * size[1]), Image.Resampling.BILINEAR)
    pen, width = ImageDraw.Draw(large), max(2, round(SMOOTH * size[1] / 150))
    for colour, sampled in paths.values():
        for path in np.asarray(sampled, dtype=np.float64):
            _line(pen, project(path, lens) * stretch, colour, width)
    driven = project(truth_xyz, lens) * stretch
    _line(pen, driven, "#ffffff", 2 * width)
    _line(pen, driven, "#1a1a1a", width)
    buffer = io.BytesIO()
    large.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _numbers(lens: Mapping[str, Any], *names: str) -> Floats:
    """One array of the calibration, or several of its numbers. Raises `ValueError` for what is not finite."""
    values: Floats = np.asarray(lens[names[0]] if len(names) == 1 else [lens[name] for name in names], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"calibration has {', '.join(names)} {values.tolist()}; expected finite numbers.")
    return values


def seen_runs(pixels: Floats) -> Iterator[list[tuple[float, float]]]:
    """The parts of a line `[N, 2]` of which every stretch has both ends seen, and not far out of the picture."""
    run: list[tuple[float, float]] = []
    for start, end in pairwise(pixels):
        both = np.concatenate([start, end])
        if np.isfinite(both).all() and np.abs(both).max() < _FAR_OUT_PX:
            run = [*(run or [(float(start[0]), float(start[1]))]), (float(end[0]), float(end[1]))]
        elif run:
            yield run
            run = []
    if run:
        yield run


def _line(pen: ImageDraw.ImageDraw, pixels: Floats, colour: str, width: int) -> None:
    for run in seen_runs(pixels):
        pen.line(run, fill=colour, width=width)
