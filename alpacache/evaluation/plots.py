"""Plots of the report and of probes, as PNG bytes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from alpacache.driving.sample import DT_S, FUTURE_S, FUTURE_STEPS, Floats
from alpacache.driving.strata import LATE_CURVE, stratum_name
from alpacache.evaluation.judging import SampleResult
from alpacache.evaluation.summary import EvalSummary
from alpacache.metrics.bias import Slope
from alpacache.metrics.bootstrap import Interval, range_text
from alpacache.pictures.birds_eye import birds_eye_png
from alpacache.pictures.canvas import BASELINE_STYLES, DPI, GRID, INK, MODEL_COLOURS, literal, png_bytes, style_axes


def sample_png(
    summary: EvalSummary, result: SampleResult, *, front_jpeg: bytes | None = None, title: str = ""
) -> bytes:
    """One sample from above with the paths of every model and baseline, beside its front frame where one is given."""
    return birds_eye_png(
        truth_xyz=result.truth_xyz,
        history_xyz=result.history_xyz,
        paths={label: result.models[label].pred_xyz for label in summary.models},
        baselines={label: result.models[label].pred_xyz[0] for label in summary.baselines},
        front_jpeg=front_jpeg,
        title=title,
    )


def bias_scatter_png(
    truth: ArrayLike,
    predicted: Mapping[str, ArrayLike],
    slopes: Mapping[str, Slope | None],
    *,
    marked: ArrayLike | None = None,
) -> bytes:
    """Predicted against true heading change at 6.4 s in degrees, one panel a model with common axes.

    Args:
        truth: `[N]` radians.
        predicted: label -> `[N]`.
        slopes: label -> fitted line, drawn where there is one.
        marked: `[N]` samples to ring: those of the stratum `LATE_CURVE`.
    """
    x = np.rad2deg(np.asarray(truth, dtype=np.float64))
    ys = {label: np.rad2deg(np.asarray(values, dtype=np.float64)) for label, values in predicted.items()}
    ring = np.zeros(x.shape, dtype=bool) if marked is None else np.asarray(marked, dtype=bool)
    figure = Figure(figsize=(4.3 * max(1, len(ys)), 4.5), dpi=DPI, layout="compressed")
    panels = figure.subplots(1, max(1, len(ys)), squeeze=False, sharex=True, sharey=True)[0]
    reach = 1.08 * max([1.0, *(float(np.abs(values).max()) for values in (x, *ys.values()) if values.size)])
    for index, (panel, (label, y)) in enumerate(zip(panels, ys.items(), strict=False)):
        colour = MODEL_COLOURS[index % len(MODEL_COLOURS)]
        ringed = stratum_name(LATE_CURVE)
        draw_bias(panel, x, y, slopes.get(label), colour=colour, reach=reach, ring=ring, ringed=ringed, title=label)
    panels[0].set_ylabel("predicted heading change (°), mean of paths", fontsize=9, color=INK)
    return png_bytes(figure, palette=True)


def draw_bias(
    panel: Axes,
    x: Floats,
    y: Floats,
    line: Slope | None,
    *,
    colour: str,
    reach: float,
    ring: NDArray[np.bool_],
    ringed: str,
    title: str,
) -> None:
    """Draw predicted `y [N]` against driven heading change `x [N]` in degrees, the fitted line, and rings.

    `reach`: end of both axes; `ringed` says what the samples in `ring [N]` are.
    """
    panel.plot([-reach, reach], [-reach, reach], color="#777777", lw=1.1, ls=(0, (5, 3)), label="as driven")
    panel.scatter(x, y, s=16, color=colour, alpha=0.5, lw=0)
    if ring.any():
        panel.scatter(x[ring], y[ring], s=34, facecolor="none", edgecolor=INK, lw=0.9, label=ringed)
    if line is not None:
        ends = np.array([-reach, reach])
        fitted = np.rad2deg(line.intercept) + line.slope * ends
        panel.plot(ends, fitted, color=colour, lw=2.2, label=_line_text(line))
    panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    panel.set_title(literal(title), fontsize=11, color=colour, loc="left", fontweight="bold")
    style_axes(panel, x=f"driven heading change at {FUTURE_S:g} s (°)")
    panel.legend(loc="upper left", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")


def _line_text(line: Slope) -> str:
    text = f"takes {line.slope:z.2f} {range_text(line.low, line.high)}".rstrip() + f" of the turn, n = {line.n}"
    if line.calibration is None or line.r2 is None:
        return text
    ends = range_text(line.calibration.low, line.calibration.high)
    return f"{text}\ncalibration {line.calibration.estimate:z.2f} {ends}".rstrip() + f", R² {line.r2:.2f}"


def error_over_time_png(
    panels: Mapping[str, Mapping[str, ArrayLike]],
    *,
    dashed: Mapping[str, Mapping[str, ArrayLike]] | None = None,
    weights: Mapping[str, ArrayLike] | None = None,
) -> bytes:
    """Error against time, mean over samples, with the middle half of samples shaded for the models.

    Args:
        panels: title, such as a stratum -> model label -> `[N, 64]` error in metres of each sample's reported path.
        dashed: title -> baseline label -> `[N, 64]`.
        weights: title -> `[N]` by which samples count in the means, alike without.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.7 * rows), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    times_s = DT_S * np.arange(1, FUTURE_STEPS + 1)
    for axes, (title, errors) in zip(all_axes, panels.items(), strict=False):
        tops, by = [1e-3], None if weights is None else np.asarray(weights[title], dtype=np.float64)
        for index, (label, values) in enumerate(errors.items()):
            error = np.asarray(values, dtype=np.float64)
            colour, mean = MODEL_COLOURS[index % len(MODEL_COLOURS)], np.average(error, axis=0, weights=by)
            low, high = np.quantile(error, [0.25, 0.75], axis=0)
            axes.fill_between(times_s, low, high, color=colour, alpha=0.13, lw=0)
            axes.plot(times_s, mean, color=colour, lw=2.2, label=literal(label))
            tops += [float(mean.max()), float(high.max())]
        for index, (label, values) in enumerate((dashed or {}).get(title, {}).items()):
            mean = np.average(np.asarray(values, dtype=np.float64), axis=0, weights=by)
            colour, style = BASELINE_STYLES[index % len(BASELINE_STYLES)]
            axes.plot(times_s, mean, color=colour, ls=style, lw=1.6, label=literal(label))
        axes.set(xlim=(0, FUTURE_S), ylim=(0, 1.6 * max(tops)))
        style_axes(axes, title=title, x="seconds after t0", y="distance to the driven path (m)")
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    all_axes[0].legend(loc="upper left", fontsize=8.5, frameon=False)
    return png_bytes(figure, palette=True)


def loss_curves_png(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Training and validation loss against steps; by turn stratum where a run tells them apart.

    A panel for each run: label -> rows of its `metrics.jsonl`.
    """
    figure = Figure(figsize=(5.6 * max(1, len(runs)), 3.7), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, max(1, len(runs)), squeeze=False)[0]
    for axes, (label, rows) in zip(panels, runs.items(), strict=False):
        known = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
        if known:
            steps, losses = np.array(known, dtype=np.float64).T
            axes.plot(steps, losses, color=GRID, lw=1.0)
            axes.plot(steps, _smoothed(losses), color=INK, lw=1.8, label="training")
        names = dict.fromkeys(name for row in rows for name in row if name.startswith("val_loss"))
        for index, name in enumerate(names):
            points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=np.float64)  # null: NaN
            colour = MODEL_COLOURS[(index + 1) % len(MODEL_COLOURS)]
            stratum = name.partition("/")[2]
            axes.plot(
                *points.T, color=colour, lw=1.2 if stratum else 2.0, ls=(0, (4, 2)) if stratum else "-",
                marker="o", ms=3, label=f"validation {stratum}".strip(),
            )  # fmt: skip
        style_axes(axes, title=label, x="step", y="loss")
        if known or names:
            axes.legend(loc="upper right", fontsize=8, frameon=False)
    return png_bytes(figure, palette=True)


def _smoothed(values: Floats) -> Floats:
    """Mean over a fiftieth of the run around each value."""
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def explained_png(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval | None]]],
    layers: Mapping[str, Mapping[str, Interval | None]],
    *,
    columns: int,
) -> bytes:
    """R^2 as bars with their intervals, and below them by layer; values below -0.3 are cut off.

    Args:
        panels: title -> inputs of a probe -> kind of probe -> R^2; a row of panels has `columns`.
        layers: title -> layer -> R^2; empty, or as many as columns.
        columns: number of panels side by side.
    """
    rows = -(-len(panels) // columns) + bool(layers)
    figure = Figure(figsize=(4.3 * columns, 3.1 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, bars in zip(axes, panels.values(), strict=False):
        kinds = list(dict.fromkeys(kind for group in bars.values() for kind in group))
        width = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            places = np.arange(len(bars)) + (number - (len(kinds) - 1) / 2) * width
            intervals = [group.get(kind) for group in bars.values()]
            heights = [0.0 if interval is None else interval.estimate for interval in intervals]
            panel.bar(places, heights, 0.9 * width, color=MODEL_COLOURS[number % len(MODEL_COLOURS)], label=kind)
            _draw_whiskers(panel, places, intervals)
        panel.set_xticks(range(len(bars)), [literal(label) for label in bars])
    for panel, sets in zip(axes[len(panels) :], layers.values(), strict=False):
        places = np.arange(len(sets), dtype=np.float64)
        heights = [np.nan if interval is None else interval.estimate for interval in sets.values()]
        panel.plot(places, heights, marker="o", ms=4, color=MODEL_COLOURS[1])
        _draw_whiskers(panel, places, sets.values())
        every = -(-len(sets) // 8)
        panel.set_xticks(places[::every], [literal(label).replace(" ", "\n") for label in sets][::every])
    for panel, title in zip(axes, (*panels, *layers), strict=False):
        panel.set_ylim(-0.3, 1.05)
        panel.axhline(0, color=INK, lw=0.8)
        style_axes(panel, title=title)
    for panel in axes[::columns]:
        panel.set_ylabel("R², clips not seen", fontsize=9, color=INK)
    axes[0].legend(loc="upper left", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
    return png_bytes(figure, palette=True)


def _draw_whiskers(axes: Axes, places: Iterable[float], intervals: Iterable[Interval | None]) -> None:
    for place, interval in zip(places, intervals, strict=True):
        if interval is not None and np.isfinite([interval.low, interval.high]).all():
            axes.plot([place, place], [interval.low, interval.high], color=INK, lw=1.3)
