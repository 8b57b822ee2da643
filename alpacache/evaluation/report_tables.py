"""Tables of the HTML report. Every text that comes from data is escaped here, labels and ids included."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

import numpy as np

from alpacache.driving.sample import FUTURE_S
from alpacache.driving.strata import LATE_CURVE, stratum_name
from alpacache.evaluation.judging import SampleResult
from alpacache.evaluation.summary import JUDGED, EvalSummary, StratumSummary
from alpacache.metrics.bias import HORIZONS_S, QUANTITIES, Slope
from alpacache.metrics.bootstrap import Interval, range_text
from alpacache.metrics.corridor import SIDE_KEY
from alpacache.metrics.path_frame import ONSET_KEY, TRACK_KEYS
from alpacache.metrics.steering import COMMIT_KEY
from alpacache.pictures.canvas import BASELINE_STYLES, MODEL_COLOURS

HEADLINE_METRICS = {
    "min_ade": "minADE",
    "min_ade/by_t=3.0": "minADE 3\u00a0s",
    "ade": "ADE",
    "min_fde": "minFDE",
    "miss_rate": "missed",
    "corner_distance": "corners",
}
STRATA_METRICS = {
    "min_ade": "minADE",
    "min_ade/by_t=0.5": "0.5 s",
    "min_ade/by_t=1.0": "1 s",
    "min_ade/by_t=3.0": "3 s",
    "min_ade/by_t=5.0": "5 s",
    "ade": "ADE",
    "ade/by_t=3.0": "ADE 3 s",
    "corner_distance": "corners",
    "min_fde": "minFDE",
    "fde": "FDE",
    "miss_rate": "missed",
}
TRACK_METRICS = {key: key.replace("_track@", " ") + " s" for key in TRACK_KEYS}
TRACK_METRICS |= {ONSET_KEY: "after onset", SIDE_KEY: "right side"}
STEERING_METRICS = {
    "lateral_only": "lateral only",
    "speed_only": "speed only",
    "lateral_error": "beside, mean",
    "lateral_error_max": "beside, largest",
    "accel_mae": "acceleration m/s²",
    "curvature_mae": "curvature 1/m",
    COMMIT_KEY: "commits after s",
}
_SHARES = ("miss_rate", SIDE_KEY)
SLOPE_COLUMNS = tuple((quantity, horizon_s) for quantity in QUANTITIES for horizon_s in HORIZONS_S)
_NOTHING = '<td data-value="">–</td>'


def model_colour(summary: EvalSummary, label: str) -> str:
    """The colour of a model or baseline, the same in tables and pictures."""
    if label in summary.baselines:
        return BASELINE_STYLES[summary.baselines.index(label) % len(BASELINE_STYLES)][0]
    return MODEL_COLOURS[summary.models.index(label) % len(MODEL_COLOURS)]


def headline_table(summary: EvalSummary) -> str:
    """Models, their change against the reference, and baselines, over all samples."""
    stratum, late = summary.strata["all"], summary.strata[LATE_CURVE]
    heads = ["", *HEADLINE_METRICS.values(), "turn taken, all", "calibration", "R²"]
    heads += [f"turn taken, {stratum_name(LATE_CURVE)}"]
    rows = []
    for label in (*summary.models, *summary.baselines):
        cells = [_number(key, stratum.metrics[label][key]) for key in HEADLINE_METRICS]
        everywhere = _heading_slope(stratum, label)
        cells += [_slope(everywhere), *_calibration(everywhere), _slope(_heading_slope(late, label))]
        rows.append(_model_row(summary, label, cells))
        if label in stratum.differences:
            cells = [f'<td class="name soft">change against {escape(summary.reference)}</td>']
            for key in HEADLINE_METRICS:
                change = stratum.differences[label][key]
                cells.append(_change(change, css=_verdict(change), points=key == "miss_rate"))
            slopes = [each.bias_differences.get(label) for each in (stratum, late)]
            taken = [_change(each["heading"][FUTURE_S] if each else None) for each in slopes]
            cells += [taken[0], _NOTHING, _NOTHING, taken[1]]
            rows.append(f'<tr class="difference">{"".join(cells)}</tr>')
    return _table(heads, rows, sortable=False)


def headline_sentences(summary: EvalSummary) -> str:
    """Say in words what is wrong with each model's turning, and what the hardest stratum shows."""
    told = [
        f"<p><strong>{escape(label)}</strong> on {_where(name, summary.strata[name])}: "
        f"<strong>{verdict.answer}</strong>. It {escape(verdict.sentence)}.</p>"
        for name in JUDGED
        for label, verdict in summary.strata[name].verdicts.items()
    ]
    told += [
        f"<p><strong>{escape(label)}</strong>: <strong>{control.answer}</strong>. Its loss {control.sentence}.</p>"
        for label, by_control in summary.controls.get("all", {}).items()
        for control in by_control.values()
    ]
    return "".join(told) + f"<p>{_late_sentence(summary)}</p>"


def _where(name: str, stratum: StratumSummary) -> str:
    count = f"{stratum.samples:,} sample{'s' * (stratum.samples != 1)}"
    return f"all {count}" if name == "all" else f"the {count} whose history is straight, where only the image knows"


def _late_sentence(summary: EvalSummary) -> str:
    late = summary.strata[LATE_CURVE]
    slopes = [
        f"{escape(label)} {slope.slope:z.2f} {range_text(slope.low, slope.high)}".rstrip()
        for label in (*summary.models, *summary.baselines)
        if (slope := _heading_slope(late, label)) is not None
    ]
    if not slopes:
        return (
            f"Too few samples are straight in history and curve after t0 ({late.samples}) to say whether the image "
            "is used on curves."
        )
    return (
        f"Of the turn in the {late.samples} samples that are straight throughout their history and curve after t0, the "
        f"predicted paths take: {'; '.join(slopes)}. 0 always drives straight."
    )


def strata_table(summary: EvalSummary) -> str:
    """Errors by stratum and model, with counts and paired changes."""
    return _metrics_table(summary, STRATA_METRICS)


def tracks_table(summary: EvalSummary) -> str:
    """Errors along the driven path, beside it and after the onset of its turn, as `strata_table`."""
    return _metrics_table(summary, TRACK_METRICS)


def steering_table(summary: EvalSummary) -> str:
    """Errors of steering apart from those of speed, as `strata_table`."""
    return _metrics_table(summary, STEERING_METRICS)


def controls_table(summary: EvalSummary) -> str:
    """Loss, error and turn taken with another clip's prefix or with none, beside the honest ones."""
    rows = []
    for name, by_model in summary.controls.items():
        for label, by_control in by_model.items():
            for control, told in by_control.items():
                cells = [_text(control), _count(told.samples), _value(told.honest_loss, "{:.3f}")]
                cells += [_value(told.loss, "{:.3f}"), _rise(told.rise)]
                cells += [_value(told.honest_min_ade, "{:.2f}"), _value(told.min_ade, "{:.2f}")]
                cells += [_slope(told.honest_slope), _slope(told.slope), _text(told.answer)]
                rows.append(_model_row(summary, label, cells, stratum=name))
    heads = ["stratum", "model", "prefix", "samples", "loss", "with it", "rise", "minADE", "with it", "turn taken"]
    return _table([*heads, "with it", "does it look?"], rows)


def flow_table(summary: EvalSummary) -> str:
    """Errors by number of flow steps, over all samples."""
    rows = []
    for label, by_steps in summary.flow_steps.items():
        for number, (steps, told) in enumerate(by_steps.items()):
            cells = [_count(steps), *(_value(value, "{:.3f}") for value in told.metrics.values())]
            cells += [_change(told.change if number else None, gap=" "), _slope(told.slope)]
            rows.append(_model_row(summary, label, cells))
    heads = ["model", "flow steps", "minADE", "ADE", "minFDE", "change of minADE", "turn taken"]
    return _table(heads, rows, sortable=False)


def _rise(rise: Interval | None) -> str:
    if rise is None:
        return _NOTHING
    span = range_text(100 * rise.low, 100 * rise.high, "z.0f")
    return f'<td data-value="{rise.estimate:.6g}">{100 * rise.estimate:z.0f} % <span class="range">{span}</span></td>'


def _metrics_table(summary: EvalSummary, names: Mapping[str, str]) -> str:
    def cells(stratum: StratumSummary, label: str) -> list[str]:
        errors, changes = stratum.metrics[label], stratum.differences.get(label, {})
        numbers = [_number(key, errors[key], changes.get(key)) for key in names]
        return [_count(stratum.samples), _count(stratum.clips), *numbers]

    return _stratum_table(summary, ["samples", "clips", *names.values()], cells)


def slopes_table(summary: EvalSummary) -> str:
    """Share of the turn that is taken by stratum, model, quantity and horizon; what is known of the last heading."""

    def cells(stratum: StratumSummary, label: str) -> list[str]:
        slopes = [stratum.bias[label][quantity][horizon_s] for quantity, horizon_s in SLOPE_COLUMNS]
        return [_count(stratum.samples), *map(_slope, slopes), *_calibration(_heading_slope(stratum, label))]

    heads = [f"{name} {horizon_s:g} s" for name, horizon_s in SLOPE_COLUMNS]
    return _stratum_table(summary, ["samples", *heads, "calibration", "R²"], cells)


def corridor_table(summary: EvalSummary) -> str:
    """Lateral recall and spread by stratum and model, with counts, intervals and paired changes."""

    def cells(stratum: StratumSummary, label: str) -> list[str]:
        corridor, change = stratum.corridor[label], stratum.recall_differences.get(label)
        return [
            _count(corridor.leaving),
            _share(corridor.recall, corridor.recall_interval),
            _change(change, css=_verdict(change, more_is_better=True), gap=" "),
            _count(corridor.staying),
            _share(corridor.false_leaving, None),
            _share(corridor.contained_leaving, corridor.contained_interval),
            _value(corridor.spread_m, "{:.2f}"),
            _share(None if corridor.split is None else corridor.split.estimate, corridor.split),
        ]

    heads = ["leave", "recall", "change", "stay", "false", "among the paths", "spread m", "two bundles"]
    return _stratum_table(summary, heads, cells)


def commands_table(summary: EvalSummary) -> str:
    """Shares of the paths of each model that obey each command, with counts."""
    rows = []
    for command, told in summary.commands.items():
        for label, model in told.models.items():
            cells = [_count(told.samples), _count(told.driven), _share(model.recall, model.recall_interval)]
            cells.append(_share(model.obeyed, None))
            rows.append(_model_row(summary, label, cells, stratum=f"command_{command}"))
    return _table(["command", "model", "samples", "driven so", "recall", "of all"], rows, sortable=False)


def swaps_table(summary: EvalSummary) -> str:
    """The control with left for right in the routes."""
    rows = []
    for label, swap in summary.swaps.items():
        cells = [_count(swap.samples), _share(swap.given, None), _share(swap.swapped, None)]
        cells += [_share(swap.follows, swap.follows_interval), _value(swap.shift_m, "{:.2f}")]
        rows.append(_model_row(summary, label, cells))
    heads = ["model", "samples", "obey as given", "obey the opposite", "sides follow", "shift m"]
    return _table(heads, rows, sortable=False)


def samples_table(summary: EvalSummary, results: Sequence[SampleResult]) -> str:
    """One row a sample; the row's index is the sample's place in `results`."""
    heads = ["sample", "turn", "m/s", "driven turn °"]
    heads += [f"{label} °" for label in summary.models] + [f"{label} minADE" for label in summary.models]
    rows = []
    for index, result in enumerate(results):
        turn = stratum_name(LATE_CURVE) if result.strata.straight_history_late_curve else result.strata.turn
        cells = [_text(result.sample_id), _text(turn), _value(result.strata.mean_speed_mps, "{:.1f}")]
        departures = [result.true_departure, *map(result.mean_departure, summary.models)]
        cells += [_value(np.rad2deg(departure.heading[-1]), "{:.1f}") for departure in departures]
        cells += [_value(result.models[label].metrics["min_ade"], "{:.2f}") for label in summary.models]
        strata = escape(" ".join(result.labels))
        rows.append(f'<tr tabindex="0" data-index="{index}" data-strata="{strata}">{"".join(cells)}</tr>')
    return _table(heads, rows)


def filter_buttons(summary: EvalSummary) -> str:
    """One button a stratum with its count; those without samples cannot be pressed."""
    return "".join(
        f'<button type="button" data-stratum="{escape(name)}" aria-pressed="false"'
        f"{'' if stratum.samples else ' disabled'}>{escape(stratum_name(name))} ({stratum.samples})</button>"
        for name, stratum in summary.strata.items()
    )


def _heading_slope(stratum: StratumSummary, label: str) -> Slope | None:
    return stratum.bias[label]["heading"][FUTURE_S] if label in stratum.bias else None


def _stratum_table(
    summary: EvalSummary, heads: Sequence[str], cells: Callable[[StratumSummary, str], Sequence[str]]
) -> str:
    """A row for each stratum and model, which the buttons filter; `cells` are those behind the two names."""
    rows = [
        _model_row(summary, label, cells(stratum, label), stratum=name)
        for name, stratum in summary.strata.items()
        for label in stratum.metrics
    ]
    return _table(["stratum", "model", *heads], rows)


def _table(heads: Sequence[str], rows: Sequence[str], *, sortable: bool = True) -> str:
    cells = [f"<button type='button'>{escape(head)}</button>" if sortable else escape(head) for head in heads]
    head = "".join(f'<th scope="col"{" class=name" if i < 2 else ""}>{cell}</th>' for i, cell in enumerate(cells))
    css = ' class="sortable"' if sortable else ""
    return f"<table{css}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _model_row(summary: EvalSummary, label: str, cells: Iterable[str], *, stratum: str | None = None) -> str:
    """A row that begins with the model's name: pale for a baseline, underlined for the last of a stratum."""
    last = label == (*summary.models, *summary.baselines)[-1]
    css = " ".join(["baseline"] * (label in summary.baselines) + ["last"] * last)
    marks = (f' class="{css}"' if css else "") + (f' data-stratum="{escape(stratum)}"' if stratum else "")
    dot = f'<span class="dot" style="background:{model_colour(summary, label)}"></span>'
    names = (_text(stratum_name(stratum)) if stratum else "") + f'<td class="name">{dot}{escape(label)}</td>'
    return f"<tr{marks}>{names}{''.join(cells)}</tr>"


def _text(text: str) -> str:
    return f'<td class="name">{escape(text)}</td>'


def _count(number: int) -> str:
    return f'<td data-value="{number}">{number:,}</td>'


def _value(value: float, form: str) -> str:
    return f'<td data-value="{value:.6g}">{form.format(value)}</td>'


def _number(key: str, value: float, change: Interval | None = None) -> str:
    if math.isnan(value):
        return _NOTHING
    text = f"{100 * value:.1f} %" if key in _SHARES else f"{value:.{4 if key == 'curvature_mae' else 2}f}"
    title, verdict = "", _verdict(change, more_is_better=key == SIDE_KEY)
    if change is not None:
        title = f' title="change {change.estimate:+.3f} {range_text(change.low, change.high, "+.3f")}"'
    return f'<td{verdict}{title} data-value="{value:.6g}">{text}</td>'


def _change(change: Interval | None, *, css: str = "", points: bool = False, gap: str = "<br>") -> str:
    if change is None:
        return _NOTHING
    scale, unit, form = (100, " points", "+.1f") if points else (1, "", "+.2f")
    middle, ends = format(scale * change.estimate, form), range_text(scale * change.low, scale * change.high, form)
    span = f'<span class="range">{ends or "no interval"}</span>'
    return f'<td{css} data-value="{change.estimate:.6g}">{middle}{unit}{gap}{span}</td>'


def _share(value: float | None, interval: Interval | Slope | None) -> str:
    if value is None:
        return _NOTHING
    text = "" if interval is None else f' <span class="range">{range_text(interval.low, interval.high)}</span>'
    return f'<td data-value="{value:.6g}">{value:z.2f}{text}</td>'


def _slope(slope: Slope | None) -> str:
    return _share(None if slope is None else slope.slope, slope)


def _calibration(slope: Slope | None) -> list[str]:
    """Cells of a slope's calibration and R^2."""
    found = None if slope is None else slope.calibration
    value = None if found is None or not math.isfinite(found.estimate) else found.estimate
    return [_share(value, found), _share(None if slope is None else slope.r2, None)]


def _verdict(change: Interval | None, *, more_is_better: bool = False) -> str:
    """CSS class of a change: coloured only where the whole interval is on one side of zero."""
    if change is None or change.low <= 0 <= change.high:
        return ""
    return ' class="better"' if (change.low > 0) == more_is_better else ' class="worse"'
