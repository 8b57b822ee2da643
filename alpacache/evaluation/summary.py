"""One evaluation in numbers: every metric by model and stratum, the bias, and what changed between two models.

Models are compared sample by sample on the same strata, and clips, not samples, are split for the intervals. Each
number carries its count, and strata too small to conclude from are named rather than left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from alpacache.driving.route import COMMANDS
from alpacache.driving.sample import FUTURE_S, Floats, SampleRef
from alpacache.driving.strata import LATE_CURVE, STRAIGHT_HISTORY, TURN_STRATA, stratum_name
from alpacache.evaluation.bias_verdict import BiasVerdict, judge_bias, too_few
from alpacache.evaluation.judging import METRIC_KEYS, SampleResult, strata_names
from alpacache.evaluation.variants import ControlSummary, FlowSummary, Judged, summarise_control, summarise_flow
from alpacache.metrics.baselines import BASELINES
from alpacache.metrics.bias import (
    HORIZONS_S,
    QUANTITIES,
    Departure,
    Quantity,
    Slope,
    bias_difference,
    bias_slope,
)
from alpacache.metrics.bootstrap import BLOCK_S, MIN_CLIPS, Interval, mean_difference, splitting_units
from alpacache.metrics.commands import CommandSummary, SwapSummary, summarise_command, summarise_swap
from alpacache.metrics.corridor import CorridorSummary, recall_difference, summarise_corridor
from alpacache.strict_json import plain

ENOUGH_SAMPLES = 30
"""A stratum with fewer is named in the warnings: its means and slopes may be chance."""
JUDGED = ("all", STRAIGHT_HISTORY)
"""Strata with a verdict on the bias: every road, and what only the image knows."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumSummary:
    """All numbers of one stratum; mappings are by model label, and empty without a sample."""

    samples: int
    clips: int
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Means over the samples that the metric has a value for; NaN where it has none."""
    differences: Mapping[str, Mapping[str, Interval | None]] = field(default_factory=dict)
    """Mean less the reference's mean, per model that is neither reference nor baseline; negative is better."""
    bias: Mapping[str, Mapping[Quantity, Mapping[float, Slope | None]]] = field(default_factory=dict)
    """Slope by quantity and horizon; None where there is none to fit. Strata of `TURN_STRATA` have no calibration."""
    bias_differences: Mapping[str, Mapping[Quantity, Mapping[float, Interval | None]]] = field(default_factory=dict)
    """Slope less the reference's slope."""
    corridor: Mapping[str, CorridorSummary] = field(default_factory=dict)
    recall_differences: Mapping[str, Interval | None] = field(default_factory=dict)
    """Recall less the reference's."""
    verdicts: Mapping[str, BiasVerdict] = field(default_factory=dict)
    """Verdicts on the heading change at 6.4 s, for models that are no baselines; in the strata of `JUDGED` only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary:
    """All numbers of an evaluation."""

    models: tuple[str, ...]
    """Labels in the order given, baselines excluded."""
    baselines: tuple[str, ...]
    reference: str
    """The model that differences are taken against."""
    paths: int
    """Sampled paths a model and sample, K."""
    samples: int
    clips: int
    split_by: str
    """Units that are resampled for the intervals: `clips`, or blocks of time where there are few."""
    strata: Mapping[str, StratumSummary]
    """Numbers of every name of `STRATA`, also of those without a sample, and of commands where there are routes."""
    warnings: tuple[str, ...]
    commands: Mapping[str, CommandSummary] = field(default_factory=dict)
    """Commands that samples have, and how they are obeyed."""
    swaps: Mapping[str, SwapSummary] = field(default_factory=dict)
    """Model -> the control with left for right in the routes; empty where it was not asked for."""
    controls: Mapping[str, Mapping[str, Mapping[str, ControlSummary]]] = field(default_factory=dict)
    """Stratum of `JUDGED` -> model -> control -> does it look?; empty where it was not asked for."""
    flow_steps: Mapping[str, Mapping[int, FlowSummary]] = field(default_factory=dict)
    """Model -> number of flow steps -> errors; empty unless several numbers were asked for."""
    weighted: bool = False
    """True if samples count by weights."""

    def to_json(self) -> dict[str, Any]:
        """Return dictionaries, lists, numbers, strings and None; horizons become keys such as "6.4"."""
        document: dict[str, Any] = plain(self)
        return document


def summarise(results: Sequence[SampleResult], *, seed: int = 0, block_s: float = BLOCK_S) -> EvalSummary:
    """Aggregate samples, at least one, into tables; `seed` is that of the splits for the intervals.

    `block_s`: length of the blocks of time that are split where clips are few, such as those that were held out.
    All have the same models, at least one beside the baselines.
    """
    labels = tuple(results[0].models)
    models = tuple(label for label in labels if label not in BASELINES)
    truth = [result.true_departure for result in results]
    predicted = {label: [result.mean_departure(label) for result in results] for label in labels}
    clips = [result.clip_id for result in results]
    is_few = len(set(clips)) < MIN_CLIPS
    times_s = [SampleRef.parse(result.sample_id).t0_us / 1e6 if is_few else 0.0 for result in results]
    units = splitting_units(clips, times_s, block_s=block_s)
    split_by = f"blocks of {block_s:g} s" if is_few else "clips"
    weights = np.array([result.weight for result in results], dtype=np.float64)
    everything = Judged(truth=truth, units=units, weights=weights / weights.mean(), split_by=split_by, seed=seed)
    strata = {}
    routed = any(result.routed for result in results)
    for name in strata_names(routed=routed):
        rows = [row for row, result in enumerate(results) if name in result.labels]
        strata[name] = _summarise_stratum(
            [results[row] for row in rows],
            [truth[row] for row in rows],
            {label: [predicted[label][row] for row in rows] for label in labels},
            [units[row] for row in rows],
            everything.at(rows).weights,
            name=name,
            models=models,
            split_by=split_by,
            seed=seed,
        )
    return EvalSummary(
        models=models,
        baselines=tuple(label for label in labels if label in BASELINES),
        reference=models[0],
        paths=max(len(results[0].models[label].pred_xyz) for label in models),
        samples=len(results),
        clips=strata["all"].clips,
        split_by=split_by,
        strata=strata,
        warnings=_warnings(strata, split_by),
        commands=_summarise_commands(results, units, weights, models, seed=seed) if routed else {},
        swaps=_summarise_swaps(results, units, weights, models, seed=seed),
        controls=_summarise_controls(results, everything, models),
        flow_steps=_summarise_flow(results, everything, models),
        weighted=bool((weights != weights[0]).any()),
    )


def _summarise_controls(
    results: Sequence[SampleResult], everything: Judged, models: Sequence[str]
) -> dict[str, dict[str, dict[str, ControlSummary]]]:
    """Summarise whether models look, on the strata that were not chosen by the turn."""
    found: dict[str, dict[str, dict[str, ControlSummary]]] = {}
    for name in JUDGED:
        for label in models:
            for control in dict.fromkeys(control for result in results for control in result.models[label].controls):
                rows = [
                    row
                    for row, result in enumerate(results)
                    if name in result.labels and control in result.models[label].controls
                ]
                if rows:
                    honest = [results[row].models[label].honest(results[row].history_rot) for row in rows]
                    other = [results[row].models[label].controls[control] for row in rows]
                    summary = summarise_control(control, honest, other, everything.at(rows))
                    found.setdefault(name, {}).setdefault(label, {})[control] = summary
    return found


def _summarise_flow(
    results: Sequence[SampleResult], everything: Judged, models: Sequence[str]
) -> dict[str, dict[int, FlowSummary]]:
    return {
        label: summarise_flow(
            {steps: [result.models[label].by_steps[steps] for result in results] for steps in numbers}, everything
        )
        for label in models
        if (numbers := tuple(results[0].models[label].by_steps))
    }


def _summarise_commands(
    results: Sequence[SampleResult], units: Sequence[str], weights: Floats, models: Sequence[str], *, seed: int
) -> dict[str, CommandSummary]:
    """Summarise how the commands that samples have are obeyed, as far as they can be."""
    found: dict[str, CommandSummary] = {}
    for command in COMMANDS:
        rows = [row for row, result in enumerate(results) if result.command == command]
        if rows and command != "none":
            paths = {label: [results[row].models[label].pred_xyz for row in rows] for label in models}
            truth, of_rows = [results[row].truth_xyz for row in rows], [units[row] for row in rows]
            found[command] = summarise_command(command, truth, paths, of_rows, weights=weights[rows], seed=seed)
    return found


def _summarise_swaps(
    results: Sequence[SampleResult], units: Sequence[str], weights: Floats, models: Sequence[str], *, seed: int
) -> dict[str, SwapSummary]:
    found = {}
    for label in models:
        rows = [row for row, result in enumerate(results) if result.models[label].swapped_xyz is not None]
        if rows:
            commands = [command for row in rows if (command := results[row].command) is not None]
            pairs = [(results[row].models[label].pred_xyz, results[row].models[label].swapped_xyz) for row in rows]
            given, swapped = ([pair[part] for pair in pairs] for part in (0, 1))
            of_rows, by = [units[row] for row in rows], weights[rows]
            found[label] = summarise_swap(commands, given, swapped, of_rows, weights=by, seed=seed)  # type: ignore[arg-type]
    return found


def _summarise_stratum(
    results: Sequence[SampleResult],
    truth: Sequence[Departure],
    predicted: Mapping[str, Sequence[Departure]],
    units: Sequence[str],
    weights: Floats,
    *,
    name: str,
    models: Sequence[str],
    split_by: str,
    seed: int,
) -> StratumSummary:
    """Numbers of one stratum; departures are in the order of `results`, by label where predicted, as are the units.

    `weights` are of mean 1.
    """
    if not results:
        return StratumSummary(samples=0, clips=0)
    values = {
        label: {key: np.array([result.models[label].metrics[key] for result in results]) for key in METRIC_KEYS}
        for label in predicted
    }
    leavings = {label: [result.models[label].leaving for result in results] for label in predicted}
    reference, *others = models
    by: dict[str, Any] = {"weights": weights, "seed": seed}
    corridor = {label: summarise_corridor(each, units, **by) for label, each in leavings.items()}
    measure = partial(bias_slope, calibrate=name not in TURN_STRATA)
    bias = {label: _by_horizon(measure, truth, pred, units, **by) for label, pred in predicted.items()}
    return StratumSummary(
        samples=len(results),
        clips=len({result.clip_id for result in results}),
        metrics={
            label: {key: _mean(errors, weights) for key, errors in by_key.items()} for label, by_key in values.items()
        },
        differences={
            label: {key: _difference(values[reference][key], values[label][key], units, **by) for key in METRIC_KEYS}
            for label in others
        },
        bias=bias,
        bias_differences={
            label: _by_horizon(bias_difference, truth, predicted[reference], predicted[label], units, **by)
            for label in others
        },
        corridor=corridor,
        recall_differences={
            label: recall_difference(leavings[reference], leavings[label], units, **by) for label in others
        },
        verdicts={
            label: judge_bias(bias[label]["heading"][FUTURE_S], corridor[label], split_by=split_by)
            for label in (models if name in JUDGED else ())
        },
    )


def _mean(values: Floats, weights: Floats) -> float:
    """Mean of the values that a metric has; NaN without any."""
    known = np.isfinite(values)
    return float(np.average(values[known], weights=weights[known])) if known.any() else math.nan


def _difference(before: Floats, after: Floats, units: Sequence[str], *, weights: Floats, seed: int) -> Interval | None:
    """Paired difference of means over the samples that a metric has a value for, of both models."""
    known = np.isfinite(before) & np.isfinite(after)
    names = [unit for unit, is_known in zip(units, known, strict=True) if is_known]
    return mean_difference(before[known], after[known], names, weights=weights[known], seed=seed)


def _by_horizon(
    measure: Callable[..., T], *data: Sequence[Any], weights: Floats, seed: int
) -> dict[Quantity, dict[float, T]]:
    """Take a measure of departures at each quantity and horizon."""
    by: dict[str, Any] = {"weights": weights, "seed": seed}
    return {
        quantity: {horizon_s: measure(*data, quantity=quantity, horizon_s=horizon_s, **by) for horizon_s in HORIZONS_S}
        for quantity in QUANTITIES
    }


def _warnings(strata: Mapping[str, StratumSummary], split_by: str) -> tuple[str, ...]:
    warnings = []
    for name, stratum in strata.items():
        samples, clips = stratum.samples, stratum.clips
        count = f"{stratum_name(name)}: {samples} sample{'s' * (samples > 1)} of {clips} clip{'s' * (clips > 1)}"
        if 0 < samples < ENOUGH_SAMPLES:
            warnings.append(f"{count}, too few to conclude from ({ENOUGH_SAMPLES} samples or more would do).")
        elif (slope := _unbounded(stratum)) is not None:
            warnings.append(f"{count}; {too_few(slope, split_by)}.")
    if not strata[LATE_CURVE].samples:
        warnings.append(
            f"{stratum_name(LATE_CURVE)}: no sample; from these clips it cannot be told whether the image is used."
        )
    return tuple(warnings)


def _unbounded(stratum: StratumSummary) -> Slope | None:
    """A slope of the heading change that has no interval; None where they have one, or there is no slope."""
    slopes = [by_quantity["heading"][FUTURE_S] for by_quantity in stratum.bias.values()]
    return next((slope for slope in slopes if slope is not None and math.isinf(slope.low)), None)
