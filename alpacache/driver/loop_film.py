"""One road of a closed loop as a moving picture: models side by side, in the camera and from above.

For places that play no page, such as a README. WebP: camera pictures in a GIF take five times the bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alpacache.driver.closed_loop import KEPT_M, RoadDrive
from alpacache.driver.loop_page import AHEAD_M, road_lines
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import DT_S, Floats
from alpacache.pictures.canvas import EGO_M, INK, MODEL_COLOURS
from alpacache.pictures.front_view import SMOOTH

EVERY = 2
"""Steps of 0.1 s from one picture to the next."""
SHOWN_MS, HELD_MS = 100, 2500
"""Time that a picture is shown, twice as fast as driven, and that the last one stays."""
_QUALITIES = (70, 55, 40, 25, 10)
_WIDTH, _HEAD, _FRONT, _ABOVE, _GAP = 320, 28, 160, 220, 8
_REACH_M, _BEHIND_M = 45.0, 12.0
_GROUND, _ROAD, _LINE, _OUT = "#eef0e8", "#d4d4d4", "#ffffff", "#b00020"


def telling(drives: Mapping[str, Sequence[RoadDrive]]) -> int:
    """Choose the road that shows best what the last model has over the first.

    If possible a bend that only it drives to the end, else a road on which only it stays in its lane; of those where it
    stays nearest to its lane.
    """
    first, *_, last = drives.values()

    def shows(place: int) -> tuple[bool, bool, float]:
        before, after = first[place], last[place]
        ends = before.lost and not after.lost and after.road.shape != "straight"
        return ends, after.kept and not before.kept, -max(map(abs, after.offset_m))

    return max(range(len(last)), key=shows)


def write_loop_film(path: Path, drives: Mapping[str, RoadDrive], *, most_bytes: int = 2_000_000) -> None:
    """Write how models drove the same road, the first one left, as an animated WebP of at most so many bytes.

    Raises `ValueError` where even its poorest quality takes more.
    """
    steps = range(0, max(len(drive.xyz) for drive in drives.values()), EVERY)
    panels = [
        _Panel(label, colour, drive) for (label, drive), colour in zip(drives.items(), MODEL_COLOURS, strict=False)
    ]
    pictures = [_beside([panel.picture(step) for panel in panels]) for step in steps]
    shown = [SHOWN_MS] * (len(pictures) - 1) + [HELD_MS]
    for quality in _QUALITIES:
        pictures[0].save(
            path, "WEBP", save_all=True, append_images=pictures[1:], duration=shown, loop=0, quality=quality, method=4
        )
        if (size := path.stat().st_size) <= most_bytes:
            return
    raise ValueError(f"{path} takes {size:,} bytes at the poorest quality; expected at most {most_bytes:,}.")


class _Panel:
    """One model's half of each picture."""

    def __init__(self, label: str, colour: str, drive: RoadDrive) -> None:
        self._label, self._colour, self._drive = label, colour, drive
        lines = road_lines(drive, drive.arc_m[-1] + AHEAD_M + _REACH_M)
        self._edge = np.array([*lines["left"], *reversed(lines["right"])])
        self._lanes = [np.array(line) for line in lines["lane"]]
        self._trail = np.stack(drive.xyz)[:, :2]

    def picture(self, step: int) -> Image.Image:
        """The model's name and state, the camera's picture, and the drive from above."""
        now = min(step, len(self._trail) - 1)
        whole = Image.new("RGB", (_WIDTH, _HEAD + _FRONT + _ABOVE), "white")
        pen = ImageDraw.Draw(whole)
        pen.text((4, _HEAD / 2), self._label, fill=self._colour, font=ImageFont.load_default(17), anchor="lm")
        off = abs(self._drive.offset_m[now])
        text = "out of its lane" if off > KEPT_M else f"{off:.1f} m off the middle"
        said, ink = f"{text}   {now * DT_S:4.1f} s", _OUT if off > KEPT_M else INK
        pen.text((_WIDTH - 4, _HEAD / 2), said, fill=ink, font=ImageFont.load_default(14), anchor="rm")
        whole.paste(self._front(now), (0, _HEAD))
        whole.paste(self._above(now), (0, _HEAD + _FRONT))
        return whole

    def _front(self, step: int) -> Image.Image:
        seen = self._drive.seen(FRONT_CAMERA, step)
        return Image.fromarray(np.ascontiguousarray(seen.transpose(1, 2, 0))).resize((_WIDTH, _FRONT))

    def _above(self, step: int) -> Image.Image:
        """The road around the car, which heads upwards."""
        size, yaw = (SMOOTH * _WIDTH, SMOOTH * _ABOVE), self._drive.yaw[step]
        view, scale = Image.new("RGB", size, _GROUND), size[1] / (_REACH_M + _BEHIND_M)
        pen, here = ImageDraw.Draw(view), self._trail[step]
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])

        def pixels(xy: Floats) -> list[tuple[float, float]]:
            forward, left = ((xy - here) @ turn).T
            return [*zip(size[0] / 2 - scale * left, scale * (_REACH_M - forward), strict=True)]

        pen.polygon(pixels(self._edge), fill=_ROAD)
        for lane in self._lanes:
            for dash in range(0, len(lane) - 1, 2):
                pen.line(pixels(lane[dash : dash + 2]), fill=_LINE, width=2 * SMOOTH)
        if step:
            pen.line(pixels(self._trail[: step + 1]), fill=self._colour, width=3 * SMOOTH, joint="curve")
        half = np.array(EGO_M) / 2
        corners = here + half * np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) @ turn.T
        pen.polygon(pixels(corners), fill=self._colour)
        return view.resize((_WIDTH, _ABOVE), Image.Resampling.BOX)


def _beside(panels: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (len(panels) * (_WIDTH + _GAP) - _GAP, panels[0].height), "white")
    for place, panel in enumerate(panels):
        whole.paste(panel, (place * (_WIDTH + _GAP), 0))
    return whole
