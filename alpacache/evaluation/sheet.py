"""One sheet of named samples: a row each, a column a model, and the bias over all samples beside them.

Columns of a row show the same stretch of road, so that paths can be compared by eye.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from alpacache.driving.sample import FUTURE_S
from alpacache.evaluation.judging import SampleResult
from alpacache.evaluation.plots import draw_bias
from alpacache.evaluation.summary import EvalSummary
from alpacache.metrics.bias import departures_at
from alpacache.pictures.birds_eye import draw_road
from alpacache.pictures.canvas import DPI, INK, MODEL_COLOURS, literal, png_bytes

MOST_ROWS = 64
"""Rows of a sheet; of more, a picture would be too tall for most viewers."""
_FRONT_INCHES, _ROAD_INCHES, _BIAS_INCHES, _ROW_INCHES = 4.4, 2.5, 3.9, 2.9


def sheet_png(summary: EvalSummary, shown: Sequence[SampleResult], everything: Sequence[SampleResult]) -> bytes:
    """Draw samples, at least one, as PNG bytes: front picture, paths of each model, driven path and minADE.

    The summary is of `everything`, which the scatter of predicted against driven heading change shows, those of
    `shown` ringed.
    """
    models = summary.models
    height = max(len(shown) * _ROW_INCHES, len(models) * 0.8 * _BIAS_INCHES)
    widths = _FRONT_INCHES + len(models) * _ROAD_INCHES, _BIAS_INCHES
    figure = Figure(figsize=(sum(widths), height + 0.3), dpi=DPI, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=widths, squeeze=False)[0]
    ratios = [_FRONT_INCHES, *[_ROAD_INCHES] * len(models)]
    cells = left.subplots(len(shown), 1 + len(models), squeeze=False, width_ratios=ratios)
    for row, result in zip(cells, shown, strict=True):
        _draw_front(row[0], result)
        paths = {label: result.models[label].pred_xyz for label in models}
        frame = np.concatenate([result.truth_xyz, result.history_xyz, *(xyz.reshape(-1, 3) for xyz in paths.values())])
        for number, (axes, label) in enumerate(zip(row[1:], models, strict=True)):
            colour = MODEL_COLOURS[number % len(MODEL_COLOURS)]
            draw_road(axes, result.truth_xyz, result.history_xyz, {label: (colour, paths[label])}, frame=frame)
            error = f"minADE {result.models[label].metrics['min_ade']:.2f} m"
            axes.set_title(f"{literal(label)}\n{error}", loc="left", fontsize=9, color=colour, fontweight="bold")
    _draw_biases(right.subplots(len(models), 1, squeeze=False)[:, 0], summary, shown, everything)
    return png_bytes(figure, palette=False)


def _draw_front(axes: Axes, result: SampleResult) -> None:
    axes.set_axis_off()
    axes.set_title(literal(result.sample_id), loc="left", fontsize=9, color=INK)
    try:
        with Image.open(io.BytesIO(result.front_jpeg or b"")) as image:
            axes.imshow(np.asarray(image.convert("RGB")))
    except (OSError, Image.DecompressionBombError):
        why = "no front picture" if result.front_jpeg is None else "the front picture cannot be read"
        axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=9, color=INK, transform=axes.transAxes)


def _draw_biases(
    panels: Sequence[Axes], summary: EvalSummary, shown: Sequence[SampleResult], everything: Sequence[SampleResult]
) -> None:
    names = {result.sample_id for result in shown}
    ring = np.array([result.sample_id in names for result in everything])
    x = np.rad2deg(departures_at([result.true_departure for result in everything], "heading", FUTURE_S))
    ys: Mapping[str, np.ndarray] = {
        label: np.rad2deg(departures_at([one.mean_departure(label) for one in everything], "heading", FUTURE_S))
        for label in summary.models
    }
    reach = 1.08 * max(1.0, *(float(np.abs(values).max()) for values in (x, *ys.values())))
    for number, (axes, (label, y)) in enumerate(zip(panels, ys.items(), strict=True)):
        colour = MODEL_COLOURS[number % len(MODEL_COLOURS)]
        line = summary.strata["all"].bias[label]["heading"][FUTURE_S]
        draw_bias(axes, x, y, line, colour=colour, reach=reach, ring=ring, ringed="on this sheet", title=label)
        axes.set_ylabel("predicted heading change (°)", fontsize=8, color=INK)
