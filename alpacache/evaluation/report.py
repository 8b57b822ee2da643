"""One self-contained HTML page of an evaluation: tables, bias, pictures, and every sample to look at.

The page fetches nothing (its own content security policy forbids it) and stays below 10 MB for a thousand samples:
paths travel as whole decimetres at every fourth waypoint and are drawn in the browser, front frames shrink, and where
that is not enough the best samples are left out, and the page says so.
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

from alpacache.driving.sample import Floats
from alpacache.driving.strata import LATE_CURVE
from alpacache.evaluation import report_tables as tables
from alpacache.evaluation.plots import bias_scatter_png, error_over_time_png, loss_curves_png
from alpacache.evaluation.summary import EvalSummary, SampleResult, departures_of
from alpacache.metrics.baselines import BASELINES
from alpacache.metrics.bias import Departure, departures_at
from alpacache.metrics.paths import best_sample, displacement
from alpacache.pictures.birds_eye import birds_eye_png

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
TEMPLATE = "report.html"


def write_report(
    summary: EvalSummary,
    results: Sequence[SampleResult],
    path: Path,
    *,
    title: str = "alpacache evaluation",
    losses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write the page.

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
    order = np.argsort([-one.models[judged].metrics["min_ade"] for one in results], kind="stable")
    ranked = [results[place] for place in order]
    truth, predicted = departures_of(ranked)
    listed, data = _embed(summary, ranked)
    page = _fill(
        (resources.files("alpacache") / TEMPLATE).read_text(encoding="utf-8"),
        {
            "title": html.escape(title),
            "subtitle": html.escape(_subtitle(summary)),
            "warnings": _warnings(summary),
            "headline": f'{tables.headline_sentence(summary)}<div class="card scroll">'
            f'{tables.headline_table(summary)}</div><p class="soft">{html.escape(_legend(summary))}</p>',
            "bias_picture": _bias_pictures(summary, ranked, truth, predicted),
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
            "samples_table": tables.samples_table(summary, listed, truth, predicted),
            "footer": html.escape(
                "Definitions: docs/reference/metrics.md. Intervals are 95 %. Changes resample clips, not samples; so "
                "do slopes where clips have several samples, else theirs is Student's t."
            ),
            "data": data,
        },
    )
    path.write_text(page, encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Each `{{name}}` once, in one pass, so that a value holding braces is not filled again."""
    used = set(re.findall(r"\{\{(\w+)\}\}", template))
    assert used == set(values), f"template and values differ in {used ^ set(values)}"
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _subtitle(summary: EvalSummary) -> str:
    models = " against ".join(reversed(summary.models)) if len(summary.models) == 2 else ", ".join(summary.models)
    return f"{models} · {summary.samples:,} samples of {summary.clips:,} clips · {summary.paths} paths a sample"


def _legend(summary: EvalSummary) -> str:
    text = f"Metres, means over all samples, {summary.paths} paths a sample; lower is better. "
    text += "Missed: no path ends within 2 m. Corners: distance of a 4 x 3 x 2 m box's corners."
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


def _bias_pictures(
    summary: EvalSummary,
    results: Sequence[SampleResult],
    truth: Sequence[Departure],
    predicted: Mapping[str, Sequence[Departure]],
) -> str:
    late = [result.strata.straight_history_late_curve for result in results]
    bias = summary.strata["all"].bias
    png = bias_scatter_png(
        departures_at(truth, "heading", 6.4),
        {label: departures_at(predicted[label], "heading", 6.4) for label in summary.models},
        {label: bias[label]["heading"][6.4] for label in summary.models},
        marked=np.array(late),
        marked_label=tables.stratum_name(LATE_CURVE),
    )
    return _picture(png, "predicted against driven heading change, one panel a model")


def _time_png(summary: EvalSummary, results: Sequence[SampleResult]) -> bytes:
    def errors(label: str, rows: Sequence[SampleResult]) -> Floats:
        each = [displacement(one.models[label].pred_xyz, one.truth_xyz) for one in rows]
        return np.stack([error[best_sample(error)] for error in each])

    panels, dashed = {}, {}
    for name in TIME_STRATA:
        rows = [one for one in results if name in one.strata.labels]
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
    """Cards of best, median and worst; a sample appears once, however few there are. Standing ones have no path."""
    moving = [result for result in ranked if result.strata.speed != "stopped"] or ranked
    count = len(moving)
    middle = max(0, count // 2 - GALLERY_EACH // 2)
    places = {
        "best": range(count - 1, max(-1, count - 1 - GALLERY_EACH), -1),
        "median": range(middle, min(count, middle + GALLERY_EACH)),
        "worst": range(min(count, GALLERY_EACH)),
    }
    seen: set[int] = set()
    cards = []
    for tag, wanted in places.items():
        for place in wanted:
            if place not in seen:
                seen.add(place)
                cards.append(_card(summary, moving[place], tag, judged))
    return "".join(cards)


def _card(summary: EvalSummary, result: SampleResult, tag: str, judged: str) -> str:
    view = birds_eye_png(
        truth_xyz=result.truth_xyz,
        history_xyz=result.history_xyz,
        paths={label: result.models[label].pred_xyz for label in summary.models},
        baselines={label: result.models[label].pred_xyz[0] for label in summary.baselines},
    )
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
    """The samples that fit into the budgets, worst first, and the page's data as JSON safe inside a script element."""
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
    """x and y of `[N, 3]`, one after the other."""
    flat: list[int] = np.rint(10 * np.asarray(xyz, dtype=np.float64)[:, :2]).astype(np.int64).reshape(-1).tolist()
    return flat


def _shrunk(jpeg: bytes, width_px: int) -> bytes | None:
    """The frame at most `width_px` wide, or None where it cannot be read; the page then says so."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            small = image.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((width_px, width_px))
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=70)
    return out.getvalue()
