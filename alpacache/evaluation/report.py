"""One self-contained HTML page of an evaluation: tables, bias, pictures, and every sample to look at.

The page fetches nothing (its own content security policy forbids it) and stays below 10 MB for a thousand samples:
paths travel as whole decimetres at every fourth waypoint and are drawn in the browser, front frames shrink, and where
that is not enough the best samples are left out and the page says so.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alpacache.driving.sample import FUTURE_S, Floats
from alpacache.driving.strata import LATE_CURVE
from alpacache.evaluation import report_tables as tables
from alpacache.evaluation.judging import SampleResult
from alpacache.evaluation.plots import bias_scatter_png, error_over_time_png, loss_curves_png, sample_png
from alpacache.evaluation.summary import EvalSummary
from alpacache.metrics.baselines import BASELINES
from alpacache.metrics.bias import departures_at
from alpacache.metrics.bootstrap import LEVEL
from alpacache.metrics.paths import BOX_M, MISS_RADIUS_M, best_sample, displacement

LISTED_SAMPLES = 2000
PATHS_BUDGET_BYTES = 5_000_000
FRONTS_BUDGET_BYTES = 2_000_000
TIME_STRATA = ("all", "straight", "gentle", "sharp", LATE_CURVE)
"""Panels of the error over time."""
GALLERY_EACH = 3
"""Samples in each of best, median and worst."""
GALLERY_FRONT_PX = 420
DETAIL_FRONT_PX = 300
WAYPOINT_STRIDE = 4


def write_report(
    summary: EvalSummary,
    results: Sequence[SampleResult],
    path: Path,
    *,
    title: str = "alpacache evaluation",
    losses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write the page of an evaluation, samples ranked by the last model.

    Args:
        summary: of exactly these results, from `summarise`.
        results: the samples.
        path: the file to write; one that is there is replaced.
        title: heading of the page.
        losses: label of a trained model -> rows of its run's `metrics.jsonl`.

    Raises:
        ValueError: the summary is of other samples.
        OSError: the file cannot be written.
    """
    if summary.samples != len(results):
        raise ValueError(f"the summary is of {summary.samples} samples, but {len(results)} were given.")
    judged = summary.models[-1]
    ranked = sorted(results, key=lambda result: -result.models[judged].metrics["min_ade"])
    listed, data = _embed(summary, ranked)
    page = _fill(
        (resources.files("alpacache") / "report.html").read_text(encoding="utf-8"),
        {
            "title": html.escape(title),
            "subtitle": html.escape(_subtitle(summary)),
            "warnings": _warnings(summary),
            "headline": f'{tables.headline_sentence(summary)}<div class="card scroll">'
            f'{tables.headline_table(summary)}</div><p class="soft">{html.escape(_legend(summary))}</p>',
            "bias_picture": _bias_picture(summary, ranked),
            "filters": tables.filter_buttons(summary),
            "strata_table": tables.strata_table(summary),
            "slopes_table": tables.slopes_table(summary),
            "corridor_table": tables.corridor_table(summary),
            "time_picture": _picture(_time_png(summary, ranked), "error over time"),
            "loss_picture": _losses(losses or {}),
            "gallery_note": html.escape(
                f"Ranked by minADE of {judged} among samples that move; white dots on the driven path are seconds."
            ),
            "gallery": _gallery(summary, ranked, judged),
            "samples_note": html.escape(_samples_note(len(listed), len(ranked), judged)),
            "samples_table": tables.samples_table(summary, listed),
            "footer": html.escape(
                f"Definitions: docs/reference/metrics.md. Intervals are {100 * LEVEL:.0f} %. Changes resample clips, "
                "not samples; so do slopes where clips have several samples, else theirs is Student's t."
            ),
            "data": data,
        },
    )
    path.write_text(page, encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Fill each `{{name}}` in one pass, so that a value holding braces is not filled again."""
    used = set(re.findall(r"\{\{(\w+)\}\}", template))
    assert used == set(values), f"template and values differ in {used ^ set(values)}"
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _subtitle(summary: EvalSummary) -> str:
    models = " against ".join(reversed(summary.models)) if len(summary.models) == 2 else ", ".join(summary.models)
    return f"{models} · {summary.samples:,} samples of {summary.clips:,} clips · {summary.paths} paths a sample"


def _legend(summary: EvalSummary) -> str:
    text = f"Metres, means over all samples, {summary.paths} paths a sample; lower is better. "
    text += f"Missed: no path ends within {MISS_RADIUS_M:g} m. "
    text += f"Corners: distance of a {BOX_M[0]:g} x {BOX_M[1]:g} x {BOX_M[2]:g} m box's corners."
    if len(summary.models) > 1:
        text += f" Changes are paired, sample by sample, against {summary.reference}; coloured where the interval "
        text += "excludes zero."
    return text


def _samples_note(listed: int, every: int, judged: str) -> str:
    shown = "All samples" if listed == every else f"The worst {listed:,} of {every:,} samples"
    return f"{shown}, worst minADE of {judged} first. Click a row to see its paths."


def _warnings(summary: EvalSummary) -> str:
    if not summary.warnings:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in summary.warnings)
    head = f"Too little to conclude from: {len(summary.warnings)} of {len(summary.strata)} strata"
    return f'<details class="warnings"><summary>{head}</summary><ul>{items}</ul></details>'


def _picture(png: bytes, alt: str) -> str:
    return f'<div class="picture"><img alt="{html.escape(alt)}" src="{_png_uri(png)}"></div>'


def _png_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _bias_picture(summary: EvalSummary, results: Sequence[SampleResult]) -> str:
    bias = summary.strata["all"].bias
    predicted = {label: [result.mean_departure(label) for result in results] for label in summary.models}
    png = bias_scatter_png(
        departures_at([result.true_departure for result in results], "heading", FUTURE_S),
        {label: departures_at(departures, "heading", FUTURE_S) for label, departures in predicted.items()},
        {label: bias[label]["heading"][FUTURE_S] for label in summary.models},
        marked=np.array([result.strata.straight_history_late_curve for result in results]),
        marked_label=tables.stratum_name(LATE_CURVE),
    )
    return _picture(png, "predicted against driven heading change, one panel a model")


def _time_png(summary: EvalSummary, results: Sequence[SampleResult]) -> bytes:
    def errors(label: str, rows: Sequence[SampleResult]) -> Floats:
        each = [displacement(result.models[label].pred_xyz, result.truth_xyz) for result in rows]
        return np.stack([error[best_sample(error)] for error in each])

    panels, dashed = {}, {}
    for name in TIME_STRATA:
        rows = [result for result in results if name in result.strata.labels]
        if rows:
            title = f"{tables.stratum_name(name)} ({len(rows)})"
            panels[title] = {label: errors(label, rows) for label in summary.models}
            dashed[title] = {label: errors(label, rows) for label in summary.baselines}
    return error_over_time_png(panels, dashed=dashed)


def _losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not any(runs.values()):
        return '<p class="soft">No run beside the checkpoints, so no curves.</p>'
    return _picture(loss_curves_png({label: rows for label, rows in runs.items() if rows}), "loss over steps")


def _gallery(summary: EvalSummary, ranked: Sequence[SampleResult], judged: str) -> str:
    """Cards of best, median and worst samples that move; each appears once, however few there are."""
    moving = [result for result in ranked if result.strata.speed != "stopped"] or ranked
    count = len(moving)
    middle = max(0, count // 2 - GALLERY_EACH // 2)
    places = {
        "best": range(count - 1, max(-1, count - 1 - GALLERY_EACH), -1),
        "median": range(middle, min(count, middle + GALLERY_EACH)),
        "worst": range(min(count, GALLERY_EACH)),
    }
    tags: dict[int, str] = {}
    for tag, range_ in places.items():
        for place in range_:
            tags.setdefault(place, tag)
    return "".join(_card(summary, moving[place], tag, judged) for place, tag in tags.items())


def _card(summary: EvalSummary, result: SampleResult, tag: str, judged: str) -> str:
    view = sample_png(summary, result)
    front = ""
    if result.front_jpeg is not None:
        small = _shrunk(result.front_jpeg, GALLERY_FRONT_PX)
        front = '<p class="soft">The stored front frame cannot be read.</p>'
        if small is not None:
            front = f'<img alt="front camera at t0" src="data:image/jpeg;base64,{base64.b64encode(small).decode()}">'
    error = result.models[judged].metrics["min_ade"]
    return (
        f'<div class="card"><div class="tag">{tag} · minADE {error:.2f} m</div>'
        f"<h3>{html.escape(result.sample_id)}</h3>{front}"
        f'<div class="picture"><img alt="paths from above" src="{_png_uri(view)}"></div></div>'
    )


def _embed(summary: EvalSummary, ranked: Sequence[SampleResult]) -> tuple[list[SampleResult], str]:
    """Samples that fit into the budgets, worst first, and the page's data as JSON safe inside a script element."""
    labels = (*summary.models, *summary.baselines)
    samples: list[dict[str, Any]] = []
    paths_left, fronts_left = PATHS_BUDGET_BYTES, FRONTS_BUDGET_BYTES
    for result in ranked[:LISTED_SAMPLES]:
        sample = _sample_data(result, labels)
        paths_left -= len(json.dumps(sample, separators=(",", ":")))
        if paths_left < 0 and samples:
            break
        if result.front_jpeg is not None and fronts_left > 0:
            small = _shrunk(result.front_jpeg, DETAIL_FRONT_PX)
            if small is not None:
                sample["front"] = base64.b64encode(small).decode()
                fronts_left -= len(sample["front"])
        samples.append(sample)
    models = [
        {"label": label, "colour": tables.model_colour(summary, label), "baseline": label in BASELINES}
        for label in labels
    ]
    text = json.dumps({"models": models, "samples": samples}, separators=(",", ":"), allow_nan=False)
    # A "</script>" or "<!--" in an id would end the element: no "<" survives.
    return list(ranked[: len(samples)]), text.replace("<", "\\u003c")


def _sample_data(result: SampleResult, labels: Sequence[str]) -> dict[str, Any]:
    strata = result.strata
    return {
        "id": result.sample_id,
        "truth": _decimetres(result.truth_xyz[WAYPOINT_STRIDE - 1 :: WAYPOINT_STRIDE]),
        "history": _decimetres(result.history_xyz[::3]),
        "paths": [
            [_decimetres(path[WAYPOINT_STRIDE - 1 :: WAYPOINT_STRIDE]) for path in result.models[label].pred_xyz]
            for label in labels
        ],
        "errors": [round(result.models[label].metrics["min_ade"], 3) for label in labels],
        "note": f"Driven: heading change {np.rad2deg(strata.heading_change_rad):.1f}°, lateral offset "
        f"{strata.lateral_offset_m:.1f} m, {strata.mean_speed_mps:.1f} m/s. "
        f"Strata: {', '.join(tables.stratum_name(name) for name in strata.labels)}.",
    }


def _decimetres(xyz: Floats) -> list[int]:
    """Flatten x and y of `[N, 3]`: x0, y0, x1, ..."""
    flat: list[int] = np.rint(10 * np.asarray(xyz, dtype=np.float64)[:, :2]).astype(np.int64).reshape(-1).tolist()
    return flat


def _shrunk(jpeg: bytes, width_px: int) -> bytes | None:
    """Scale the frame to at most `width_px`; None where it cannot be read, which the page then says."""
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            small = image.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((width_px, width_px))
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=70)
    return out.getvalue()
