"""The page of a closed loop: its numbers, and some drives from above and in the camera, played by a slider.

One file that asks for nothing else: pictures are in it, and its policy forbids a browser to fetch any.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alpacache import strict_json
from alpacache.driver.closed_loop import KEPT_M, LoopSummary, RoadDrive
from alpacache.metrics.bootstrap import Interval, range_text
from alpacache.pictures.canvas import MODEL_COLOURS
from alpacache.sources.scene import LANE_M

HEADS = ("model", "roads kept", "more than the first", "metres in the lane", "lateral error m", "jerk m/s³")
_ROAD_STEP_M = 2.0
_AHEAD_M = 25.0


def loop_rows(summaries: Mapping[str, LoopSummary]) -> list[list[str]]:
    """The numbers of each model as texts, by `HEADS`, with intervals of 95 %."""
    rows = []
    for label, summary in summaries.items():
        kept = "-" if summary.kept is None else f"{summary.kept.estimate * summary.roads:.0f} of {summary.roads}"
        share = _text(summary.kept, ".2f")
        measures = _text(summary.distance_m, ".0f"), _text(summary.lateral_error_m, ".2f"), _text(summary.jerk_mps3)
        rows.append([label, f"{kept}, {share}", _text(summary.more_kept, ".2f"), *measures])
    return rows


def write_loop_page(
    path: Path,
    drives: Mapping[str, Sequence[RoadDrive]],
    summaries: Mapping[str, LoopSummary],
    *,
    about: str,
) -> None:
    """Write the page; roads whose pictures were kept are played, each as every model drove it.

    `drives`: label -> drives of the same roads in the same order. `about`: what was driven, for people.
    """
    labels = list(drives)
    colours = dict(zip(labels, MODEL_COLOURS, strict=False))
    roads: list[dict[str, Any]] = []
    for same in zip(*drives.values(), strict=True):
        if not all(drive.pictures for drive in same):
            continue
        reach = max(drive.arc_m[-1] for drive in same) + _AHEAD_M
        cars = [_car(label, colours[label], drive) for label, drive in zip(labels, same, strict=True)]
        number = sum(road["shape"] == same[0].road.shape for road in roads) + 1
        name = f"{same[0].road.shape.replace('_', ' ')} {number}"
        roads.append({"name": name, "shape": same[0].road.shape, "cars": cars, **_edges(same[0], reach)})
    rows = loop_rows(summaries)
    data = {"about": about, "heads": HEADS, "rows": rows, "roads": roads, "kept": KEPT_M}
    template = files("alpacache.driver").joinpath("loop_page.html").read_text()
    path.write_text(template.replace("__DATA__", strict_json.dumps(data).replace("<", "\\u003c")))


def _car(label: str, colour: str, drive: RoadDrive) -> dict[str, Any]:
    return {
        "label": label,
        "colour": colour,
        "xy": [[round(float(at[0]), 2), round(float(at[1]), 2)] for at in drive.xyz],
        "yaw": [round(yaw, 3) for yaw in drive.yaw],
        "offset": [round(offset, 2) for offset in drive.offset_m],
        "pictures": [[step, _jpeg(picture)] for step, picture in drive.pictures.items()],
    }


def _edges(drive: RoadDrive, reach_m: float) -> dict[str, Any]:
    """Outer edges of the road and the markings of the lane, from its begin as far as it was driven."""
    source, clip_id = drive.road.source, drive.road.clip_id
    road = source.drive(clip_id).road
    every = max(1, round(_ROAD_STEP_M / road.spacing_m))
    along = road.points[:, 6] + road.start_m
    points = road.points[(along > -5.0) & (along < reach_m)][::every].astype(np.float64)
    left, right = source.half_lanes_m(clip_id)

    def beside(offset_m: float) -> list[list[float]]:
        shifted = points[:, :2] + offset_m * np.stack([-points[:, 3], points[:, 2]], axis=1)
        found: list[list[float]] = shifted.round(2).tolist()
        return found

    lane = [beside(LANE_M / 2), beside(-LANE_M / 2)]
    return {"left": beside(left), "right": beside(-right), "lane": lane}


def _jpeg(picture: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(buffer, "JPEG", quality=70)
    return base64.b64encode(buffer.getvalue()).decode()


def _text(interval: Interval | None, form: str = ".1f") -> str:
    if interval is None:
        return "-"
    return f"{interval.estimate:{form}} {range_text(interval.low, interval.high, form)}".rstrip()
