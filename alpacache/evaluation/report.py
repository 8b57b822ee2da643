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

from alpacache.cached_samples.sample_choice import words_of
from alpacache.driving.sample import FUTURE_S, Floats
from alpacache.driving.strata import LATE_CURVE, stratum_name
from alpacache.evaluation import report_tables as tables
from alpacache.evaluation.judging import LeftOut, SampleResult
from alpacache.evaluation.plots import bias_scatter_png, error_over_time_png, loss_curves_png, sample_png
from alpacache.evaluation.summary import EvalSummary
from alpacache.metrics.bias import departures_at
from alpacache.metrics.bootstrap import LEVEL, MIN_CLIPS
from alpacache.metrics.paths import BOX_M, MISS_RADIUS_M, displacement

LISTED_SAMPLES = 2000
PATHS_BUDGET_BYTES = 5_000_000
FRONTS_BUDGET_BYTES = 2_000_000
TIME_STRATA = ("all", "straight", "gentle", "sharp", LATE_CURVE)
"""Panels of the error over time."""
GALLERY_EACH = 3
"""Samples in each of best, median and worst."""
GALLERY_FRONT_PX = 420
DETAIL_FRONT_PX = 300
SHEET_PX = 1800
WAYPOINT_STRIDE = 4
_NO_FRONT = '<p class="soft">The stored front frame cannot be read.</p>'
_NO_LOSSES = '<p class="soft">No run beside the checkpoints, so no curves.</p>'


def write_report(
    summary: EvalSummary,
    results: Sequence[SampleResult],
    path: Path,
    *,
    left_out: Sequence[LeftOut] = (),
    choice: Mapping[str, Any] | None = None,
    stores: Mapping[str, str] | None = None,
    losses: Mapping[str, Sequence[Mapping[str, Any]]],
    sheet: bytes | None = None,
) -> None:
    """Write the page of an evaluation, samples ranked by the last model; `choice` says how they were chosen.

    `stores` maps labels of models that were judged on another store to it; `sheet` is the picture of named samples.
    The summary is of exactly these results; `losses` maps the label of a trained model to the rows of its run's
    `metrics.jsonl`.
    """
    judged = summary.models[-1]
    ranked = sorted(results, key=lambda result: -result.models[judged].metrics["min_ade"])
    listed, data = _embed(summary, ranked)
    shown = "All samples" if len(listed) == len(ranked) else f"The worst {len(listed):,} of {len(ranked):,} samples"
    runs = {label: rows for label, rows in losses.items() if rows}
    page = _fill(
        (resources.files("alpacache") / "report.html").read_text(encoding="utf-8"),
        {
            "subtitle": html.escape(_subtitle(summary, choice, stores or {})),
            "warnings": _left_out(left_out) + _warnings(summary),
            "headline_sentences": tables.headline_sentences(summary),
            "headline_table": tables.headline_table(summary),
            "paths": str(summary.paths),
            "miss_radius": f"{MISS_RADIUS_M:g}",
            "box": " x ".join(f"{side_m:g}" for side_m in BOX_M),
            "reference": html.escape(summary.reference),
            "one_model": "hidden" if len(summary.models) == 1 else "",
            "bias_picture": _picture(_bias_png(summary, ranked), "predicted against driven heading change by model"),
            "filters": tables.filter_buttons(summary),
            "strata_table": tables.strata_table(summary),
            "tracks_table": tables.tracks_table(summary),
            "steering_table": tables.steering_table(summary),
            "no_sheet": "" if sheet else "hidden",
            "sheet": "" if sheet is None else _sheet(sheet),
            "no_controls": "" if summary.controls else "hidden",
            "controls_table": tables.controls_table(summary),
            "no_flow": "" if summary.flow_steps else "hidden",
            "flow_table": tables.flow_table(summary),
            "slopes_table": tables.slopes_table(summary),
            "corridor_table": tables.corridor_table(summary),
            "no_routes": "" if summary.commands else "hidden",
            "commands_table": tables.commands_table(summary),
            "no_swaps": "" if summary.swaps else "hidden",
            "swaps_table": tables.swaps_table(summary),
            "time_picture": _picture(_time_png(summary, ranked), "error over time"),
            "loss_picture": _picture(loss_curves_png(runs), "loss over steps") if runs else _NO_LOSSES,
            "judged": html.escape(judged),
            "gallery": _gallery(summary, ranked, judged),
            "shown": shown,
            "samples_table": tables.samples_table(summary, listed),
            "level": f"{100 * LEVEL:.0f}",
            "split_by": summary.split_by[0].upper() + summary.split_by[1:],
            "min_clips": str(MIN_CLIPS),
            "data": data,
        },
    )
    path.write_text(page, encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Fill each `{{name}}` in one pass, so that a value holding braces is not filled again."""
    used = set(re.findall(r"\{\{(\w+)\}\}", template))
    assert used == set(values), f"template and values differ in {used ^ set(values)}"
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _subtitle(summary: EvalSummary, choice: Mapping[str, Any] | None, stores: Mapping[str, str]) -> str:
    models = " against ".join(reversed(summary.models)) if len(summary.models) == 2 else ", ".join(summary.models)
    text = f"{models} · {summary.samples:,} samples of {summary.clips:,} clips · {summary.paths} paths a sample"
    text += "".join(f" · {label} on {store}" for label, store in stores.items())
    if choice is None:
        return text
    words = words_of(choice).items()
    named = ", ".join(f"{key} {'; '.join(value) if isinstance(value, list) else value}" for key, value in words)
    return f"{text} · chosen: {choice['samples']:,} of {choice['of']:,} samples of the store by {named}"


def _left_out(samples: Sequence[LeftOut]) -> str:
    if not samples:
        return ""
    items = "".join(f"<li>{html.escape(f'{sample.sample_id}: {sample.reason}')}</li>" for sample in samples)
    head = f"Left out, as they cannot be read: {len(samples)} samples"
    return f'<details class="warnings"><summary>{head}</summary><ul>{items}</ul></details>'


def _warnings(summary: EvalSummary) -> str:
    if not summary.warnings:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in summary.warnings)
    head = f"Too little to conclude from: {len(summary.warnings)} of {len(summary.strata)} strata"
    return f'<details class="warnings"><summary>{head}</summary><ul>{items}</ul></details>'


def _picture(png: bytes, alt: str) -> str:
    return f'<div class="picture">{_image(png, alt, "png")}</div>'


def _sheet(png: bytes) -> str:
    """The sheet as a JPEG of at most `SHEET_PX`; `sheet.png` beside the page has all of its pixels."""
    small = _shrunk(png, SHEET_PX, tallest_px=100 * SHEET_PX, quality=82)
    return f'<div class="picture">{_image(small or png, "named samples", "jpeg" if small else "png")}</div>'


def _image(encoded: bytes, alt: str, kind: str) -> str:
    return f'<img alt="{alt}" src="data:image/{kind};base64,{base64.b64encode(encoded).decode()}">'


def _bias_png(summary: EvalSummary, results: Sequence[SampleResult]) -> bytes:
    bias = summary.strata["all"].bias
    predicted = {label: [result.mean_departure(label) for result in results] for label in summary.models}
    return bias_scatter_png(
        departures_at([result.true_departure for result in results], "heading", FUTURE_S),
        {label: departures_at(departures, "heading", FUTURE_S) for label, departures in predicted.items()},
        {label: bias[label]["heading"][FUTURE_S] for label in summary.models},
        marked=np.array([result.strata.straight_history_late_curve for result in results]),
    )


def _time_png(summary: EvalSummary, results: Sequence[SampleResult]) -> bytes:
    def errors(label: str, rows: Sequence[SampleResult]) -> Floats:
        each = [displacement(result.models[label].pred_xyz, result.truth_xyz) for result in rows]
        return np.stack([error[error.mean(axis=1).argmin()] for error in each])

    panels, dashed, weights = {}, {}, {}
    for name in TIME_STRATA:
        rows = [result for result in results if name in result.strata.labels]
        if rows:
            title = f"{stratum_name(name)} ({len(rows)})"
            panels[title] = {label: errors(label, rows) for label in summary.models}
            dashed[title] = {label: errors(label, rows) for label in summary.baselines}
            weights[title] = [result.weight for result in rows]
    return error_over_time_png(panels, dashed=dashed, weights=weights)


def _gallery(summary: EvalSummary, ranked: Sequence[SampleResult], judged: str) -> str:
    """Cards of best, median and worst samples that move; each appears once, however few there are."""
    moving = [result for result in ranked if result.strata.speed != "stopped"] or ranked
    middle = max(0, len(moving) // 2 - GALLERY_EACH // 2)
    cards: dict[str, str] = {}
    for tag, results in (("best", moving[::-1]), ("median", moving[middle:]), ("worst", moving)):
        for result in results[:GALLERY_EACH]:
            if result.sample_id not in cards:
                cards[result.sample_id] = _card(summary, result, tag, judged)
    return "".join(cards.values())


def _card(summary: EvalSummary, result: SampleResult, tag: str, judged: str) -> str:
    front = ""
    if result.front_jpeg is not None:
        small = _shrunk(result.front_jpeg, GALLERY_FRONT_PX)
        front = _image(small, "front camera at t0", "jpeg") if small else _NO_FRONT
    above = _picture(sample_png(summary, result), "paths from above")
    error = result.models[judged].metrics["min_ade"]
    return (
        f'<div class="card"><div class="tag">{tag} · minADE {error:.2f} m</div>'
        f"<h3>{html.escape(result.sample_id)}</h3>{front}{above}</div>"
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
        jpeg = result.front_jpeg if fronts_left > 0 else None
        if jpeg is not None and (small := _shrunk(jpeg, DETAIL_FRONT_PX)):
            sample["front"] = base64.b64encode(small).decode()
            fronts_left -= len(sample["front"])
        samples.append(sample)
    models = [
        {"label": label, "colour": tables.model_colour(summary, label), "baseline": label in summary.baselines}
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
        f"Strata: {', '.join(stratum_name(name) for name in result.labels)}."
        + (f" Route: {result.route}." if result.route is not None else ""),
    }


def _decimetres(xyz: Floats) -> list[int]:
    """Flatten x and y of `[N, 3]`: x0, y0, x1, ..."""
    return [round(10 * float(value)) for value in np.asarray(xyz)[:, :2].ravel()]


def _shrunk(picture: bytes, width_px: int, *, tallest_px: int | None = None, quality: int = 70) -> bytes | None:
    """Scale a picture to at most `width_px`, and as tall, as a JPEG; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            small = image.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((width_px, tallest_px or width_px))
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=quality)
    return out.getvalue()
