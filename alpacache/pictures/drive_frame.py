"""One picture of a film of a drive: paths in a camera's picture, the same from above beside it, and what is shown.

Drawn with Pillow: a film has hundreds of pictures, and a plot takes a fifth of a second.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from alpacache.driving.sample import Floats
from alpacache.pictures.canvas import EGO_M, GRID, HISTORY_COLOUR, INK, TRUTH_COLOUR
from alpacache.pictures.front_view import SMOOTH, project, seen_runs

SIZE = (1280, 480)
"""Width and height of a picture; both even, as encoders want."""
_FRONT = (848, 480)
_AHEAD_M, _BEHIND_M = 70.0, 14.0
_GRID_M = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Contents of one picture; metres in the ego frame of its moment."""

    picture: NDArray[np.uint8]
    """`[3, H, W]` RGB of the camera."""
    lens: Mapping[str, Any] | None
    """The camera's calibration; without it paths are drawn from above alone."""
    history_xyz: Floats
    """`[n, 3]` driven poses up to now."""
    driven_xyz: Floats
    """`[m, 3]` where the car went from here; m is 0 at the end of a recording."""
    paths: Mapping[str, tuple[str, Floats]]
    """Label -> colour such as `#d55e00`, and predicted paths `[K, 64, 3]`."""
    caption: str
    """A line for people: recording and time."""


def drive_frame(shown: Shown) -> NDArray[np.uint8]:
    """The picture `[480, 1280, 3]` RGB."""
    canvas = Image.new("RGB", SIZE, "white")
    canvas.paste(_front(shown), (0, 0))
    canvas.paste(_above(shown), (_FRONT[0], 0))
    pen = ImageDraw.Draw(canvas, "RGBA")
    entries = [(label, colour) for label, (colour, _) in shown.paths.items()]
    entries += [("driven", TRUTH_COLOUR)] if len(shown.driven_xyz) else []
    pen.rectangle((0, SIZE[1] - 34, _FRONT[0], SIZE[1]), fill=(255, 255, 255, 215))
    left = 12
    for label, colour in entries:
        pen.line((left, SIZE[1] - 17, left + 22, SIZE[1] - 17), fill=colour, width=5)
        pen.text((left + 28, SIZE[1] - 17), label, fill=INK, font=_font(18), anchor="lm")
        left += 44 + round(pen.textlength(label, font=_font(18)))
    room = _FRONT[0] - left - 12
    caption = shown.caption
    while len(caption) > 1 and pen.textlength(caption, font=_font(16)) > room:
        caption = f"…{caption[2:]}"
    pen.text((_FRONT[0] - 12, SIZE[1] - 17), caption, fill=INK, font=_font(16), anchor="rm")
    return np.asarray(canvas)


def _front(shown: Shown) -> Image.Image:
    """The camera's picture with the paths in it, cut to the place's shape."""
    picture = Image.fromarray(np.ascontiguousarray(shown.picture.transpose(1, 2, 0)))
    width, height = picture.size
    scale = max(_FRONT[0] / width, _FRONT[1] / height)
    large = picture.resize((round(SMOOTH * scale * width), round(SMOOTH * scale * height)), Image.Resampling.BILINEAR)
    if shown.lens is not None:
        stretch = np.array([large.size[0] / shown.lens["width"], large.size[1] / shown.lens["height"]])
        pen = ImageDraw.Draw(large, "RGBA")
        for colour, sampled in shown.paths.values():
            for path in sampled:
                _line(pen, project(path, shown.lens) * stretch, _transparent(colour, 190), 4 * SMOOTH)
        driven = project(shown.driven_xyz.reshape(-1, 3), shown.lens) * stretch
        _line(pen, driven, "#ffffff", 6 * SMOOTH)
        _line(pen, driven, TRUTH_COLOUR, 3 * SMOOTH)
    left, top = (large.size[0] - SMOOTH * _FRONT[0]) // 2, (large.size[1] - SMOOTH * _FRONT[1]) // 2
    cut = large.crop((left, top, left + SMOOTH * _FRONT[0], top + SMOOTH * _FRONT[1]))
    return cut.resize(_FRONT, Image.Resampling.BOX)


def _above(shown: Shown) -> Image.Image:
    """History, driven and predicted paths from above, forward up, in metres on a grid of 10 m."""
    size = SMOOTH * (SIZE[0] - _FRONT[0]), SMOOTH * SIZE[1]
    view = Image.new("RGB", size, "white")
    pen, scale = ImageDraw.Draw(view, "RGBA"), size[1] / (_AHEAD_M + _BEHIND_M)

    def pixels(xyz: Floats) -> Floats:
        return np.stack([size[0] / 2 - scale * xyz[:, 1], scale * (_AHEAD_M - xyz[:, 0])], axis=1)

    half = size[0] / 2 / scale
    for forward in np.arange(0.0, _AHEAD_M, _GRID_M):
        _line(pen, pixels(np.array([[forward, -half, 0], [forward, half, 0]])), GRID, SMOOTH)
        pen.text(tuple(pixels(np.array([[forward, half, 0]]))[0] + [8, -4]), f"{forward:.0f} m", fill="#8a8a8a",
                 font=_font(12 * SMOOTH), anchor="lb")  # fmt: skip
    for side in np.arange(-_GRID_M * (half // _GRID_M), half, _GRID_M):
        _line(pen, pixels(np.array([[-_BEHIND_M, side, 0], [_AHEAD_M, side, 0]])), GRID, SMOOTH)
    front, back, beside = EGO_M[0] / 2, -EGO_M[0] / 2, EGO_M[1] / 2
    corners = pixels(np.array([[front, beside, 0], [front, -beside, 0], [back, -beside, 0], [back, beside, 0]]))
    pen.polygon([tuple(corner) for corner in corners], fill="#d9d9d9", outline="#8a8a8a")
    _line(pen, pixels(shown.history_xyz), HISTORY_COLOUR, 5 * SMOOTH)
    here = np.zeros((1, 3))
    for colour, sampled in shown.paths.values():
        for path in sampled:
            _line(pen, pixels(np.concatenate([here, path])), _transparent(colour, 190), 3 * SMOOTH)
    if len(shown.driven_xyz):
        _line(pen, pixels(np.concatenate([here, shown.driven_xyz])), TRUTH_COLOUR, 2 * SMOOTH)
    return view.resize((size[0] // SMOOTH, size[1] // SMOOTH), Image.Resampling.BOX)


def _transparent(colour: str, opacity: int) -> str:
    return f"{colour}{opacity:02x}"


def _line(pen: ImageDraw.ImageDraw, pixels: Floats, colour: str, width: int) -> None:
    """Draw what is seen of a line; stretches are joined where they meet."""
    for run in seen_runs(pixels):
        pen.line(run, fill=colour, width=width, joint="curve")


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
