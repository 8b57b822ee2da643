"""Provenance of a prepared dataset: a record for programs, and the same as a card for people.

Both follow from the rows and the settings alone (no dates, hosts or paths), so that a resumed run writes the same files
as an undisturbed one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from alpacache import __version__
from alpacache.driving.sample import FUTURE_S
from alpacache.driving.splits import parse_split, side_of
from alpacache.driving.strata import STRATA, Strata, classify
from alpacache.masking import masked
from alpacache.sources.prepared_rows import POSES, poses_of
from alpacache.sources.video import ffmpeg_versions

PROVENANCE = "provenance.json"
CURVATURE_EDGES_PER_M = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Bounds of the histogram's bands of mean curvature: radii of 1000, 333, 100, 33 and 10 m."""
_LIBRARIES = ("av", "datasets", "numpy", "pillow", "torch")
LEAST_DRIVEN_M = 5.0
"""A path that is shorter than this in 6.4 s counts as standing: its curvature means nothing."""
_BAR = 40


def mean_curvature(strata: Strata) -> float | None:
    """Heading change over driven length of the 6.4 s from t0 on (1/m, left positive); None if it stands."""
    driven_m = strata.mean_speed_mps * FUTURE_S
    return strata.heading_change_rad / driven_m if driven_m >= LEAST_DRIVEN_M else None


def histogram(curvatures_per_m: Sequence[float | None]) -> dict[str, Any]:
    """Count samples in each band of |mean curvature|, by side; there is one more band than `edges_per_m`."""
    known = np.array([value for value in curvatures_per_m if value is not None], dtype=np.float64)
    bands, count = np.digitize(np.abs(known), CURVATURE_EDGES_PER_M), len(CURVATURE_EDGES_PER_M) + 1
    return {
        "edges_per_m": list(CURVATURE_EDGES_PER_M),
        "left": np.bincount(bands[known > 0], minlength=count).tolist(),
        "right": np.bincount(bands[known <= 0], minlength=count).tolist(),
        "standing": len(curvatures_per_m) - len(known),
    }


def provenance(
    rows: Any, *, source: str, settings: Mapping[str, Any], rejected: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    """Make the record of a dataset from its rows (a `datasets.Dataset`), without looking at pictures."""
    strata = [classify(*poses_of(row)) for row in rows.select_columns(list(POSES))]
    labels = Counter(label for one in strata for label in one.labels)
    clips = Counter(rows["clip_id"])
    by = parse_split(settings.get("split_by", "clip"))
    sides = [
        (clip_id, side_of(by, clip_id, t0_us)) for clip_id, t0_us in zip(rows["clip_id"], rows["t0_us"], strict=True)
    ]
    splits = {split: Counter(clip_id for clip_id, side in sides if side == split) for split in ("train", "val")}
    largest, mean = np.array(list(rows["pixel_deviation"])).T
    return {
        "source": masked(source),
        "settings": dict(settings),
        "samples": len(rows),
        "clips": len(clips),
        "splits": {split: {"clips": len(counts), "samples": counts.total()} for split, counts in splits.items()},
        "left_out": dict(Counter(kind for _, kind, _ in rejected)),
        "strata": {name: labels[name] for name in STRATA},
        "curvature": histogram([mean_curvature(one) for one in strata]),
        "recorded_sizes": [list(size) for size in sorted(set(map(tuple, rows["recorded_size"])))],
        "pixel_deviation": {"max": float(largest.max()), "mean": float(mean.mean())},
        "libraries": {"alpacache": __version__} | {name: version(name) for name in _LIBRARIES} | ffmpeg_versions(),
    }


def render_card(record: Mapping[str, Any]) -> str:
    """Render the record as Markdown, in the form that the hub shows."""
    settings, splits, off = record["settings"], record["splits"], record["pixel_deviation"]
    sizes = ", ".join(f"{width} x {height}" for height, width in record["recorded_sizes"])
    stored = "as they were recorded"
    if settings.get("fit") is not None:
        stored = "as 8-bit pictures at the size of the model's image processor"
    lines = [
        "---",
        f"pretty_name: {record['samples']} driving samples for Alpamayo models",
        "tags: [autonomous-driving, alpacache]",
        "---",
        "",
        f"# {record['samples']} driving samples from {record['source']}",
        "",
        "One row a sample: pictures (PNG), ego history and future (metres, ego frame at t0). Read it with",
        "`datasets.load_from_disk(DIR)`, or give the directory to `alpacache extract`. Rights are those of the source.",
        "",
        "| | samples | clips |",
        "| --- | --- | --- |",
        f"| all | {record['samples']} | {record['clips']} |",
        *(f"| {name} | {part['samples']} | {part['clips']} |" for name, part in splits.items()),
        "",
        "## Pictures",
        "",
        f"Recorded at {sizes} pixels (width x height). Stored {stored}. Pixels that the VLM sees differ from",
        f"those of the recording by at most {off['max']:.4f}, {off['mean']:.5f} on average, on their scale of -1 to 1.",
        "",
        "## Paths",
        "",
        "| stratum | samples |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in record["strata"].items()),
        "",
        "Mean curvature of the 6.4 s from t0 on: heading change over driven length.",
        "",
        "```text",
        *_histogram_lines(record["curvature"]),
        "```",
        "",
        "## How it was made",
        "",
        *(f"- {key}: `{value}`" for key, value in settings.items() if value is not None),
        *(f"- left out, {kind}: {count}" for kind, count in record["left_out"].items()),
        *(f"- {name} {number}" for name, number in record["libraries"].items()),
    ]
    return "\n".join(lines) + "\n"


def _histogram_lines(curvature: Mapping[str, Any]) -> list[str]:
    edges = curvature["edges_per_m"]
    names = [f"under {edges[0]:g} 1/m"] + [f"from {edge:g} 1/m (radius {1 / edge:.0f} m)" for edge in edges]
    most = max(1, *curvature["left"], *curvature["right"])
    lines = []
    for name, left, right in zip(names, curvature["left"], curvature["right"], strict=True):
        bar = "#" * round(_BAR * (left + right) / (2 * most))
        lines.append(f"{name:28} left {left:6} right {right:6}  {bar}".rstrip())
    return [*lines, f"{f'driven under {LEAST_DRIVEN_M:g} m':28} {curvature['standing']:11}"]
