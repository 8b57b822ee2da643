"""One sample from above: metres on equal axes, forward up and left to the left, as from behind the wheel.

Drawn without pyplot, so nothing is global and threads may draw at once.
"""

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from PIL import Image

from alpacache.driving.sample import Floats
from alpacache.pictures.canvas import (
    BASELINE_STYLES,
    DPI,
    EGO_M,
    HISTORY_COLOUR,
    INK,
    MIN_LENGTH_M,
    MODEL_COLOURS,
    TRUTH_COLOUR,
    literal,
    png_bytes,
    style_axes,
)

VIEW_RATIO = 0.8
"""Width over length of the road shown."""


def birds_eye_png(
    *,
    truth_xyz: ArrayLike,
    history_xyz: ArrayLike,
    paths: Mapping[str, ArrayLike],
    baselines: Mapping[str, ArrayLike] | None = None,
    front_jpeg: bytes | None = None,
    title: str = "",
) -> bytes:
    """Draw one sample from above, beside its front frame where there is one, as PNG bytes.

    Args:
        truth_xyz: `[64, 3]` driven path, metres, ego frame at t0.
        history_xyz: `[16, 3]` driven poses up to t0.
        paths: label -> `[K, 64, 3]` sampled paths; colours go by order.
        baselines: label -> `[64, 3]`.
        front_jpeg: the front camera's frame at t0.
        title: one line above the picture.

    Raises:
        ValueError: front_jpeg is no image.
    """
    figure = Figure(figsize=(4.4, 5.6) if front_jpeg is None else (11.2, 5.6), dpi=DPI, layout="constrained")
    if front_jpeg is None:
        axes = first = figure.add_subplot()
    else:
        first, axes = figure.subplots(1, 2, width_ratios=(6.8, 4.4))
        try:
            with Image.open(io.BytesIO(front_jpeg)) as image:
                first.imshow(np.asarray(image.convert("RGB")))
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"the front frame of {len(front_jpeg)} bytes is no image that can be read: {error}"
            ) from error
        first.set_axis_off()
    first.set_title(literal(title), loc="left", fontsize=10, color=INK)
    truth, history = np.asarray(truth_xyz, dtype=np.float64), np.asarray(history_xyz, dtype=np.float64)
    sampled = {label: np.asarray(path, dtype=np.float64) for label, path in paths.items()}
    straight_on = {label: np.asarray(path, dtype=np.float64) for label, path in (baselines or {}).items()}
    coloured = {label: (MODEL_COLOURS[i % len(MODEL_COLOURS)], path) for i, (label, path) in enumerate(sampled.items())}
    shown = [truth, history, *(path.reshape(-1, path.shape[-1]) for path in sampled.values())]
    draw_road(axes, truth, history, coloured, baselines=straight_on, frame=np.concatenate(shown))
    axes.legend(loc="best", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
    style_axes(axes, x="left  ←  y (m)  →  right", y="x, forward (m)")
    return png_bytes(figure, palette=front_jpeg is None)


def draw_road(
    axes: Axes,
    truth: Floats,
    history: Floats,
    paths: Mapping[str, tuple[str, Floats]],
    *,
    baselines: Mapping[str, Floats] | None = None,
    frame: Floats,
) -> None:
    """Draw every path from its start at t0, so that no gap opens before the first waypoint.

    Args:
        axes: takes the drawing.
        truth: `[64, 3]` driven path, metres, ego frame at t0.
        history: `[16, 3]`.
        paths: label -> colour, and `[K, 64, 3]` sampled paths.
        baselines: label -> `[64, 3]`.
        frame: `[N, 3]` points that the axes are to hold.
    """
    start = history[-1:]
    axes.add_patch(
        Rectangle((-EGO_M[1] / 2, -EGO_M[0] / 2), EGO_M[1], EGO_M[0], facecolor="#d9d9d9", edgecolor="#8a8a8a", lw=0.8)
    )
    axes.plot(history[:, 1], history[:, 0], color=HISTORY_COLOUR, lw=2.5, label="history", solid_capstyle="round")
    for index, (label, path) in enumerate((baselines or {}).items()):
        colour, style = BASELINE_STYLES[index % len(BASELINE_STYLES)]
        line = np.concatenate([start, path])
        axes.plot(line[:, 1], line[:, 0], color=colour, ls=style, lw=1.5, label=literal(label))
    for label, (colour, sampled) in paths.items():
        for number, path in enumerate(sampled):
            line = np.concatenate([start, path])
            name = f"{literal(label)} ({len(sampled)} paths)" if number == 0 else None
            axes.plot(line[:, 1], line[:, 0], color=colour, lw=1.6, alpha=0.75, label=name)
            axes.plot(path[-1, 1], path[-1, 0], marker="o", ms=3.2, color=colour, alpha=0.9, lw=0)
    driven = np.concatenate([start, truth])
    axes.plot(driven[:, 1], driven[:, 0], color=TRUTH_COLOUR, lw=2.4, label="driven", zorder=4)
    seconds = truth[9::10]
    axes.plot(seconds[:, 1], seconds[:, 0], marker="o", ms=4, mfc="white", mec=TRUTH_COLOUR, lw=0, zorder=5)
    _frame_road(axes, frame)


def _frame_road(axes: Axes, points: Floats) -> None:
    """Set equal axes that hold all points `[N, 3]`, of one shape (width / height) whatever the path."""
    low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    centre = (low + high) / 2
    centre[1] = float(np.clip(0.0, high[1] - (high[1] - low[1]) * 0.9, low[1] + (high[1] - low[1]) * 0.9))
    half_width = 1.12 * max(float(high[1] - centre[1]), float(centre[1] - low[1]))
    half_length = max(0.54 * float(high[0] - low[0]), MIN_LENGTH_M / 2, half_width / VIEW_RATIO)
    axes.set_ylim(centre[0] - half_length, centre[0] + half_length)
    axes.set_xlim(centre[1] + half_length * VIEW_RATIO, centre[1] - half_length * VIEW_RATIO)
    axes.set_aspect("equal")
    style_axes(axes)
