"""One evaluation in numbers: every metric by model and stratum, the bias, and what changed between two models.

Models are compared sample by sample on the same strata, and clips, not samples, are resampled for the intervals. Each
number carries its count, and strata too small to conclude from are named rather than left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import Floats
from alpacache.driving.strata import LATE_CURVE, STRATA, Strata
from alpacache.metrics.baselines import BASELINES
from alpacache.metrics.bias import (
    HORIZONS_S,
    MIN_CLIPS,
    MIN_SPREAD,
    QUANTITIES,
    Departure,
    Quantity,
    Slope,
    bias_slope,
    departure,
    departures_at,
    fit_slope,
    mean_departure,
)
from alpacache.metrics.bootstrap import Interval, mean_difference, slope_difference
from alpacache.metrics.corridor import (
    CorridorSummary,
    Leaving,
    leaving,
    recall_difference,
    summarise_corridor,
)
from alpacache.metrics.paths import EXTRA_KEYS, PUBLIC_KEYS, corner_distance, extra_metrics, min_ade
from alpacache.strict_json import plain

METRIC_KEYS = (*PUBLIC_KEYS, *EXTRA_KEYS)
ENOUGH_SAMPLES = 30
"""A stratum with fewer is named in the warnings: its means and slopes may be chance."""

BySlope = Mapping[Quantity, Mapping[float, Slope | None]]
ByInterval = Mapping[Quantity, Mapping[float, Interval | None]]
_BY_MODEL = ("metrics", "differences", "bias", "bias_differences", "corridor", "recall_differences")
"""Fields of `StratumSummary` that are mappings by model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResult:
    """What one model predicted for one sample, and how far off it was."""

    pred_xyz: Floats
    """`[K, 64, 3]` metres, ego frame at t0."""
    pred_rot: Floats
    """`[K, 64, 3, 3]`."""
    metrics: Mapping[str, float]
    """`METRIC_KEYS` -> metres (`miss_rate`: 0 or 1)."""
    leaving: Leaving
    """Whether the paths leave the straight corridor where the driven one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """One evaluated sample. Poses are in the ego frame at t0, metres."""

    sample_id: str
    clip_id: str
    truth_xyz: Floats
    """`[64, 3]` the driven path."""
    truth_rot: Floats
    """`[64, 3, 3]`."""
    history_xyz: Floats
    """`[16, 3]`, the last one at t0."""
    history_rot: Floats
    """`[16, 3, 3]`."""
    front_jpeg: bytes | None
    """The front camera's frame at t0."""
    strata: Strata
    models: Mapping[str, ModelResult]
    """Label -> result. The first label that is no baseline is what the others are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumSummary:
    """All numbers of one stratum; mappings are by model label."""

    samples: int
    clips: int
    metrics: Mapping[str, Mapping[str, float]]
    """Means over samples."""
    differences: Mapping[str, Mapping[str, Interval | None]]
    """Mean less the reference's mean, per model that is neither reference nor baseline; negative is better."""
    bias: Mapping[str, BySlope]
    """Slope by quantity and horizon; None where there is none to fit."""
    bias_differences: Mapping[str, ByInterval]
    """Slope less the reference's slope."""
    corridor: Mapping[str, CorridorSummary]
    """Lateral recall and spread."""
    recall_differences: Mapping[str, Interval | None]
    """Recall less the reference's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary:
    """What `summarise` found."""

    models: tuple[str, ...]
    """Labels in the order given, baselines excluded."""
    baselines: tuple[str, ...]
    reference: str
    """The model that differences are taken against."""
    paths: int
    """K, sampled paths a model and sample."""
    samples: int
    clips: int
    strata: Mapping[str, StratumSummary]
    """Every name of `STRATA`, also those without a sample."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers, strings and None; horizons become keys such as "6.4"."""
        document: dict[str, Any] = plain(self)
        return document


def judge(pred_xyz: ArrayLike, pred_rot: ArrayLike, truth_xyz: ArrayLike, truth_rot: ArrayLike) -> ModelResult:
    """All metrics of K paths `[K, 64, 3]`, `[K, 64, 3, 3]` against `[64, 3]`, `[64, 3, 3]`; errors as in `min_ade`."""
    metrics = min_ade(pred_xyz, truth_xyz)
    metrics |= corner_distance(pred_xyz, pred_rot, truth_xyz, truth_rot) | extra_metrics(pred_xyz, truth_xyz)
    return ModelResult(
        pred_xyz=np.asarray(pred_xyz, dtype=np.float64),
        pred_rot=np.asarray(pred_rot, dtype=np.float64),
        metrics={key: metrics[key] for key in METRIC_KEYS},
        leaving=leaving(pred_xyz, truth_xyz),
    )


def judge_baselines(
    history_xyz: ArrayLike, history_rot: ArrayLike, truth_xyz: ArrayLike, truth_rot: ArrayLike
) -> dict[str, ModelResult]:
    """The baselines as models with one path each, to be merged into `SampleResult.models`."""
    results = {}
    for label, baseline in BASELINES.items():
        xyz, rot = baseline(history_xyz, history_rot)
        results[label] = judge(xyz[None], rot[None], truth_xyz, truth_rot)
    return results


def summarise(results: Sequence[SampleResult], *, seed: int = 0) -> EvalSummary:
    """Aggregate samples into tables.

    Args:
        results: one a sample, all with the same models and metrics.
        seed: of the resampling for the intervals.

    Raises:
        ValueError: no samples, the same sample twice, models or metrics that differ between samples, or no model
            beside the baselines.
    """
    labels = _checked_labels(results)
    models = tuple(label for label in labels if label not in BASELINES)
    truth, predicted = departures_of(results)
    strata = {}
    for name in STRATA:
        rows = [index for index, result in enumerate(results) if name in result.strata.labels]
        strata[name] = _summarise_stratum(
            [results[row] for row in rows],
            [truth[row] for row in rows],
            {label: [predicted[label][row] for row in rows] for label in labels},
            models=models,
            seed=seed,
        )
    return EvalSummary(
        models=models,
        baselines=tuple(label for label in labels if label in BASELINES),
        reference=models[0],
        paths=max(len(results[0].models[label].pred_xyz) for label in models),
        samples=len(results),
        clips=strata["all"].clips,
        strata=strata,
        warnings=_warnings(strata),
    )


def departures_of(results: Sequence[SampleResult]) -> tuple[list[Departure], dict[str, list[Departure]]]:
    """Departure of each driven path, and per model the mean departure of its paths, in the order of results."""
    truth = [departure(one.truth_xyz, one.truth_rot, one.history_rot[-1]) for one in results]
    predicted: dict[str, list[Departure]] = {}
    for label in results[0].models:
        predicted[label] = [
            mean_departure(one.models[label].pred_xyz, one.models[label].pred_rot, one.history_rot[-1])
            for one in results
        ]
    return truth, predicted


def _summarise_stratum(
    results: Sequence[SampleResult],
    truth: Sequence[Departure],
    predicted: Mapping[str, Sequence[Departure]],
    *,
    models: Sequence[str],
    seed: int,
) -> StratumSummary:
    clips = [result.clip_id for result in results]
    if not results:
        empty: dict[str, Any] = {name: {} for name in _BY_MODEL}
        return StratumSummary(samples=0, clips=0, **empty)
    values = {
        label: {key: np.array([one.models[label].metrics[key] for one in results]) for key in METRIC_KEYS}
        for label in predicted
    }
    reference, *others = models
    left = {label: [one.models[label].leaving for one in results] for label in predicted}
    return StratumSummary(
        samples=len(results),
        clips=len(set(clips)),
        metrics={label: {key: float(of.mean()) for key, of in by_key.items()} for label, by_key in values.items()},
        differences={
            label: {
                key: mean_difference(values[reference][key], values[label][key], clips, seed=seed)
                for key in METRIC_KEYS
            }
            for label in others
        },
        bias={
            label: {
                quantity: {
                    horizon_s: bias_slope(truth, pred, clips, quantity=quantity, horizon_s=horizon_s, seed=seed)
                    for horizon_s in HORIZONS_S
                }
                for quantity in QUANTITIES
            }
            for label, pred in predicted.items()
        },
        bias_differences={
            label: _slope_differences(truth, predicted[reference], predicted[label], clips, seed=seed)
            for label in others
        },
        corridor={label: summarise_corridor(of, clips, seed=seed) for label, of in left.items()},
        recall_differences={
            label: recall_difference(left[reference], left[label], clips, seed=seed) for label in others
        },
    )


def _slope_differences(
    truth: Sequence[Departure],
    before: Sequence[Departure],
    after: Sequence[Departure],
    clips: Sequence[str],
    *,
    seed: int,
) -> dict[Quantity, dict[float, Interval | None]]:
    """None exactly where `bias_slope` has no slope, or with a single clip."""
    found: dict[Quantity, dict[float, Interval | None]] = {}
    for quantity in QUANTITIES:
        found[quantity] = {}
        for horizon_s in HORIZONS_S:
            x, y, z = (departures_at(each, quantity, horizon_s) for each in (truth, before, after))
            fits = fit_slope(x, z, min_spread=MIN_SPREAD[quantity]) is not None
            found[quantity][horizon_s] = slope_difference(x, y, z, clips, seed=seed) if fits else None
    return found


def _warnings(strata: Mapping[str, StratumSummary]) -> tuple[str, ...]:
    found = []
    for name, stratum in strata.items():
        of = f"{stratum.samples} sample{'s' * (stratum.samples > 1)} of {stratum.clips} clip{'s' * (stratum.clips > 1)}"
        if 0 < stratum.samples < ENOUGH_SAMPLES:
            found.append(f"{name}: {of}, too few to conclude from ({ENOUGH_SAMPLES} samples or more would do).")
        elif 0 < stratum.clips < MIN_CLIPS:
            found.append(
                f"{name}: {of}; slope intervals take samples for independent and are too narrow "
                f"({MIN_CLIPS} clips or more would do)."
            )
    if not strata[LATE_CURVE].samples:
        found.append(f"{LATE_CURVE}: no sample; whether the image is used on curves cannot be told from these clips.")
    return tuple(found)


def _checked_labels(results: Sequence[SampleResult]) -> tuple[str, ...]:
    if not results:
        raise ValueError("there is no sample to summarise.")
    labels = tuple(results[0].models)
    if not set(labels) - set(BASELINES):
        raise ValueError(
            f"{results[0].sample_id} has no model beside the baselines; got {', '.join(labels) or 'none'}."
        )
    seen = set()
    for result in results:
        if result.sample_id in seen:
            raise ValueError(f"sample {result.sample_id} is there twice.")
        seen.add(result.sample_id)
        if set(result.models) != set(labels):
            raise ValueError(
                f"sample {result.sample_id} has models {sorted(result.models)}, expected {sorted(labels)} as in the "
                f"first one."
            )
        for label, model in result.models.items():
            missing = [key for key in METRIC_KEYS if key not in model.metrics]
            if missing:
                raise ValueError(f"sample {result.sample_id}, model {label}: no metric {', '.join(missing)}.")
    return labels
