"""The page of a closed loop: its numbers, and some drives from above and in the camera, played by a slider.

One file that asks for nothing else: pictures are in it, and its policy forbids a browser to fetch any. The same part is
put into a report of `eval` for the demo.
"""

import base64
import io
import re
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

REPORT_PLACE = "<!-- closed loop -->"
HEADS = (
    *("model", "in its lane throughout", "gain", "driven to the end", "gain"),
    *("metres in the lane", "lateral error m", "jerk m/s³"),
)
_ROAD_STEP_M = 2.0
AHEAD_M = 25.0
"""Length of the road that is shown beyond the furthest car."""


Beside = Mapping[str, Mapping[str, str]]
"""Label -> heading -> text: what else is known of the models, such as how they do in open loop."""


def loop_table(summaries: Mapping[str, LoopSummary], *, beside: Beside | None = None) -> list[list[str]]:
    """Headings and the numbers of each model as texts, with intervals of 95 %; the columns of `beside` come last."""
    more = beside or {}
    others = list(dict.fromkeys(head for texts in more.values() for head in texts))
    rows = [[*HEADS, *others]]
    for label, summary in summaries.items():
        ends = [_counted(summary.kept, summary.roads), _text(summary.more_kept, ".2f")]
        ends += [_counted(summary.finished, summary.roads), _text(summary.more_finished, ".2f")]
        measures = _text(summary.distance_m, ".0f"), _text(summary.lateral_error_m, ".2f"), _text(summary.jerk_mps3)
        known = [more.get(label, {}).get(head, "-") for head in others]
        rows.append([label, *ends, *measures, *known])
    return rows


def write_loop_page(
    path: Path,
    drives: Mapping[str, Sequence[RoadDrive]],
    summaries: Mapping[str, LoopSummary],
    *,
    about: str,
    beside: Beside | None = None,
) -> None:
    """Write the page; roads whose pictures were kept are played, each as every model drove it.

    `drives`: label -> drives of the same roads in the same order. `about`: what was driven, for people. `beside`:
    further columns of the table.
    """
    path.write_text(_filled(drives, loop_table(summaries, beside=beside), about), encoding="utf-8")


def add_to_report(report: Path, loop_page: Path) -> None:
    """Put what `write_loop_page` wrote into a page that `eval` wrote."""
    _, player, _ = re.split("<!-- /?player -->", loop_page.read_text(encoding="utf-8"))
    page = report.read_text(encoding="utf-8")
    if page.count(REPORT_PLACE) != 1:
        raise ValueError(f"{report} has no place for a closed loop; it is no report of `eval` of this version.")
    report.write_text(page.replace(REPORT_PLACE, player), encoding="utf-8")


def _filled(drives: Mapping[str, Sequence[RoadDrive]], table: list[list[str]], about: str) -> str:
    """The page's text."""
    labels = list(drives)
    colours = dict(zip(labels, MODEL_COLOURS, strict=False))
    roads: list[dict[str, Any]] = []
    for same in zip(*drives.values(), strict=True):
        if not all(drive.pictures for drive in same):
            continue
        reach = max(drive.arc_m[-1] for drive in same) + AHEAD_M
        cars = [_car(label, colours[label], drive) for label, drive in zip(labels, same, strict=True)]
        number = sum(road["shape"] == same[0].road.shape for road in roads) + 1
        name = f"{same[0].road.shape.replace('_', ' ')} {number}"
        roads.append({"name": name, "shape": same[0].road.shape, "cars": cars, **road_lines(same[0], reach)})
    data = {"about": about, "heads": table[0], "rows": table[1:], "roads": roads, "kept": KEPT_M}
    template = files("alpacache.driver").joinpath("loop_page.html").read_text()
    return template.replace("__DATA__", strict_json.dumps(data).replace("<", "\\u003c"))


def _car(label: str, colour: str, drive: RoadDrive) -> dict[str, Any]:
    return {
        "label": label,
        "colour": colour,
        "xy": [[round(float(at[0]), 2), round(float(at[1]), 2)] for at in drive.xyz],
        "yaw": [round(yaw, 3) for yaw in drive.yaw],
        "offset": [round(offset, 2) for offset in drive.offset_m],
        "pictures": [[step, _jpeg(picture)] for step, picture in drive.pictures.items()],
    }


def road_lines(drive: RoadDrive, reach_m: float) -> dict[str, Any]:
    """Outer edges of the road (`left`, `right`) and both markings of the `lane`, `[n, 2]` metres in the world each."""
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


def _counted(share: Interval | None, roads: int) -> str:
    """`12 of 40, 0.30 [0.17, 0.46]`."""
    return "-" if share is None else f"{share.estimate * roads:.0f} of {roads}, {_text(share, '.2f')}"


def _text(interval: Interval | None, form: str = ".1f") -> str:
    if interval is None:
        return "-"
    return f"{interval.estimate:{form}} {range_text(interval.low, interval.high, form)}".rstrip()
