"""One picture of a source: front frames with the driven path in them, and the same paths from above.

A person sees at once what no rule finds, such as a path that leaves the road in every picture.
"""

import io
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from alpacache.checks.source import SHOWN
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Sample
from alpacache.driving.strata import classify
from alpacache.pictures.canvas import (
    DPI,
    EGO_M,
    HISTORY_COLOUR,
    INK,
    MIN_LENGTH_M,
    TRUTH_COLOUR,
    literal,
    png_bytes,
    style_axes,
)
from alpacache.pictures.front_view import draw_paths

COLUMNS = 3
FRONT_PX = 480
"""Width of a front frame."""
_MIN_WIDTH_M = 16.0
_EPOCH_US = 10**15
"""Least time that is taken as one since 1970 (this is in 2001); a clip's own clock would have run for 31 years."""


def contact_sheet_png(samples: Sequence[Sample], *, title: str) -> bytes:
    """1 to `SHOWN` samples, each as its front frame (or its first camera's) and its path from above."""
    if not samples:
        raise ValueError("a contact sheet needs at least one sample.")
    shown = samples[:SHOWN]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(6.2 * columns, 2.9 * rows + 0.4), dpi=DPI, layout="constrained")
    figure.suptitle(literal(title), x=0.01, ha="left", fontsize=11, color=INK)
    panels = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(4.0, 1.9) * columns).reshape(-1, 2)
    for sample, (front, above) in zip(shown, panels, strict=False):
        _draw_front(front, sample)
        _draw_above(above, sample)
    for unused in panels[len(shown) :].flat:
        unused.set_axis_off()
    return png_bytes(figure, palette=False)


def _draw_front(axes: Axes, sample: Sample) -> None:
    strata = classify(sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot)
    picture, note = _front_picture(sample)
    axes.imshow(picture)
    axes.set_axis_off()
    title = f"{sample.ref.clip_id}, t0 {_moment(sample.ref.t0_us)}"
    about = f"{strata.turn} {strata.direction}".removesuffix(" none") + f", {strata.mean_speed_mps:.1f} m/s; {note}"
    axes.set_title(literal(f"{_short(title)}\n{about}"), loc="left", fontsize=8, color=INK)


def _front_picture(sample: Sample) -> tuple[NDArray[np.uint8], str]:
    """The frame at t0, small, with the path if the calibration allows; and a note on what is drawn."""
    camera = FRONT_CAMERA if FRONT_CAMERA in sample.cameras else sample.cameras[0]
    frame = sample.frames[sample.cameras.index(camera), -1].transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(frame))
    image = image.resize((FRONT_PX, max(1, round(FRONT_PX * image.height / image.width))), Image.Resampling.BICUBIC)
    lens = (sample.calibration or {}).get(camera)
    if lens is None:
        return np.asarray(image), "no calibration"
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=92)
    try:
        drawn = draw_paths(jpeg.getvalue(), lens, sample.future_xyz, {})
    except ValueError as error:
        return np.asarray(image), _short(str(error))
    with Image.open(io.BytesIO(drawn)) as with_path:
        return np.asarray(with_path.convert("RGB")), "path drawn"


def _draw_above(axes: Axes, sample: Sample) -> None:
    """Forward up, left to the left; a dot a second; the arrow is where the vehicle's x axis points at the end."""
    past, future = sample.history_xyz.astype(np.float64), sample.future_xyz.astype(np.float64)
    driven = np.concatenate([past[-1:], future])
    axes.add_patch(Rectangle((-EGO_M[1] / 2, -EGO_M[0] / 2), EGO_M[1], EGO_M[0], facecolor="#d9d9d9", edgecolor="none"))
    axes.plot(past[:, 1], past[:, 0], color=HISTORY_COLOUR, lw=2)
    axes.plot(driven[:, 1], driven[:, 0], color=TRUTH_COLOUR, lw=2)
    axes.plot(driven[10::10, 1], driven[10::10, 0], marker="o", ms=3, mfc="white", mec=TRUTH_COLOUR, lw=0)
    length = 0.06 * max(MIN_LENGTH_M, float(np.linalg.norm(driven[-1])))
    nose = driven[-1, :2] + length * sample.future_rot[-1, :2, 0].astype(np.float64)
    points = np.concatenate([past[:, :2], future[:, :2], nose[None]])
    low, high = points.min(axis=0), points.max(axis=0)
    middle, half = (low + high) / 2, max(MIN_LENGTH_M / 2, 0.55 * float((high - low)[0]))
    half_width = max(_MIN_WIDTH_M / 2, 0.6 * float((high - low)[1]), 0.3 * half)
    axes.annotate(
        "",
        xy=(nose[1], nose[0]),
        xytext=(driven[-1, 1], driven[-1, 0]),
        arrowprops={"arrowstyle": "-|>", "color": "#d55e00", "lw": 1.2, "shrinkA": 0, "shrinkB": 0},
    )
    axes.set(
        xlim=(middle[1] + half_width, middle[1] - half_width), ylim=(middle[0] - half, middle[0] + half), aspect="equal"
    )
    style_axes(axes)
    axes.tick_params(labelsize=6)


def _moment(t0_us: int) -> str:
    """A t0 for people: seconds of a clip that counts its own, date and time of one that counts those since 1970."""
    if t0_us < _EPOCH_US:
        return f"{t0_us / 1e6:.1f} s"
    return f"{datetime.fromtimestamp(t0_us // 10**6, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _short(text: str, most: int = 56) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
