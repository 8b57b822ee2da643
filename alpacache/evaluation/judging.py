"""One sample judged: the paths that each model and baseline predicted, and their errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.route import COMMANDS, Command, command_of
from alpacache.driving.sample import Floats
from alpacache.driving.strata import STRATA, Strata
from alpacache.metrics.baselines import BASELINES
from alpacache.metrics.bias import HORIZONS_S, Departure, mean_departure
from alpacache.metrics.corridor import SIDE_KEY, Leaving, leaving, side_chosen
from alpacache.metrics.path_frame import ONSET_KEY, TRACK_KEYS, error_after_onset, track_errors
from alpacache.metrics.paths import EXTRA_KEYS, PUBLIC_KEYS, corner_distance, extra_metrics, min_ade
from alpacache.metrics.steering import (
    ACTION_KEYS,
    COMMIT_KEY,
    STEERING_KEYS,
    action_errors,
    commit_time,
    lateral_errors,
)

METRIC_KEYS = (*PUBLIC_KEYS, *EXTRA_KEYS, *TRACK_KEYS, ONSET_KEY, SIDE_KEY, *STEERING_KEYS)
VARIANT_KEYS = ("min_ade", "ade", "min_fde")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Numbers of one model's paths for one sample in a control run, from the same noise."""

    metrics: Mapping[str, float]
    """`VARIANT_KEYS` -> metres."""
    departure: Departure
    loss: float | None = None
    """Flow loss, where it was computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResult:
    """The paths that one model predicted for one sample, and their errors."""

    pred_xyz: Floats
    """`[K, 64, 3]` metres, ego frame at t0."""
    pred_rot: Floats
    """`[K, 64, 3, 3]`."""
    metrics: Mapping[str, float]
    """`METRIC_KEYS` -> metres (`miss_rate`: 0 or 1, `side_chosen`: a share, `accel_mae`: m/s^2, `curvature_mae`: 1/m,
    `commit_s`: s). NaN: `after_onset` and `side_chosen` where the driven path does not turn, `commit_s` where no path
    does, those of actions where only paths are known."""
    leaving: Leaving
    swapped_xyz: Floats | None = None
    """`[K, 64, 3]` from the same noise with left for right in the route, where that was asked for."""
    loss: float | None = None
    """Flow loss on the draws that never change, where controls were asked for."""
    controls: Mapping[str, Variant] = field(default_factory=dict)
    """Control, `shuffled` or `none` -> the same with another clip's prefix, or with none."""
    by_steps: Mapping[int, Variant] = field(default_factory=dict)
    """Number of flow steps -> the same with so many, where more than one number was asked for."""

    def honest(self, history_rot: ArrayLike) -> Variant:
        """Numbers of the paths as predicted, to compare with those of `controls`; the history is `[16, 3, 3]`."""
        departure = mean_departure(self.pred_xyz, self.pred_rot, np.asarray(history_rot)[-1])
        metrics = {key: self.metrics[key] for key in VARIANT_KEYS}
        return Variant(metrics=metrics, departure=departure, loss=self.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """One evaluated sample. Poses are in the ego frame at t0, metres."""

    sample_id: str
    clip_id: str
    truth_xyz: Floats
    """The driven path, `[64, 3]`."""
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
    route: str | None = None
    """The route in the prompt."""
    routed: bool = False
    """True if samples of this evaluation may have a route."""
    weight: float = 1.0
    """Weight of the sample in means, slopes and intervals, above 0."""
    shuffled_with: str | None = None
    """Sample whose prefix the control `shuffled` took."""

    @property
    def command(self) -> Command | None:
        """The route's command; None where no sample has a route."""
        return command_of(self.route) if self.routed else None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the strata that this sample counts in, with that of its command."""
        return self.strata.labels if self.command is None else (*self.strata.labels, command_stratum(self.command))

    @property
    def true_departure(self) -> Departure:
        """Departure of the driven path from the straight line."""
        return mean_departure(self.truth_xyz[None], self.truth_rot[None], self.history_rot[-1])

    def mean_departure(self, label: str) -> Departure:
        """Mean departure of a model's paths from the straight line; a baseline's one path has no noise."""
        model = self.models[label]
        departure = mean_departure(model.pred_xyz, model.pred_rot, self.history_rot[-1])
        if label not in BASELINES:
            return departure
        none = (0.0,) * len(HORIZONS_S)
        return replace(departure, heading_noise=none, lateral_noise=none)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample that is left out, as it cannot be read; the id is empty where nothing tells it."""

    sample_id: str
    reason: str


def command_stratum(command: Command) -> str:
    """Name of the stratum of a command."""
    return f"command_{command}"


def strata_names(*, routed: bool) -> tuple[str, ...]:
    """Every stratum of an evaluation, in the order of tables; those of commands where samples may have routes."""
    return (*STRATA, *map(command_stratum, COMMANDS if routed else ()))


def judge(
    pred_xyz: ArrayLike,
    pred_rot: ArrayLike,
    truth_xyz: ArrayLike,
    truth_rot: ArrayLike,
    *,
    of_actions: Mapping[str, float] | None = None,
) -> ModelResult:
    """Judge K paths `[K, 64, 3]`, `[K, 64, 3, 3]` by the driven `[64, 3]`, `[64, 3, 3]`; raises as `min_ade` does.

    `of_actions`: what `action_errors` finds of the actions that the paths come from; without it those metrics are NaN.
    """
    metrics = min_ade(pred_xyz, truth_xyz) | track_errors(pred_xyz, truth_xyz, truth_rot)
    metrics[ONSET_KEY] = error_after_onset(pred_xyz, truth_xyz, truth_rot)
    metrics[SIDE_KEY] = side_chosen(pred_xyz, truth_xyz)
    metrics |= corner_distance(pred_xyz, pred_rot, truth_xyz, truth_rot) | extra_metrics(pred_xyz, truth_xyz)
    metrics |= lateral_errors(pred_xyz, truth_xyz, truth_rot) | {COMMIT_KEY: commit_time(pred_xyz)}
    metrics |= of_actions or dict.fromkeys(ACTION_KEYS, math.nan)
    return ModelResult(
        pred_xyz=np.asarray(pred_xyz, dtype=np.float64),
        pred_rot=np.asarray(pred_rot, dtype=np.float64),
        metrics={key: metrics[key] for key in METRIC_KEYS},
        leaving=leaving(pred_xyz, truth_xyz),
    )


def judge_variant(
    pred_xyz: ArrayLike,
    pred_rot: ArrayLike,
    truth_xyz: ArrayLike,
    history_rot: ArrayLike,
    *,
    loss: float | None = None,
) -> Variant:
    """Judge paths of which nothing but `Variant` is kept; shapes are those of `judge`, of the history `[16, 3, 3]`."""
    metrics = min_ade(pred_xyz, truth_xyz) | extra_metrics(pred_xyz, truth_xyz)
    departure = mean_departure(pred_xyz, pred_rot, np.asarray(history_rot)[-1])
    return Variant(metrics={key: metrics[key] for key in VARIANT_KEYS}, departure=departure, loss=loss)


def judge_baselines(
    history_xyz: ArrayLike,
    history_rot: ArrayLike,
    truth_xyz: ArrayLike,
    truth_rot: ArrayLike,
    *,
    true_action: tuple[UnicycleActionSpace, Tensor] | None = None,
) -> dict[str, ModelResult]:
    """Judge each baseline as a model of one path; the results go into `SampleResult.models`.

    `true_action`: an action space and the driven path's action `[64, 2]` in it, by which those are judged that the
    baselines' paths are turned into.
    """
    paths = {label: baseline(history_xyz, history_rot) for label, baseline in BASELINES.items()}
    of_actions: dict[str, dict[str, float]] = {}
    if true_action is not None:
        space, true = true_action
        xyz0, rot0 = (torch.as_tensor(np.array(part), dtype=torch.float32) for part in (history_xyz, history_rot))
        futures = [torch.as_tensor(np.stack(parts), dtype=torch.float32) for parts in zip(*paths.values(), strict=True)]
        actions = space.to_action(xyz0.expand(len(paths), -1, -1), rot0.expand(len(paths), -1, -1, -1), *futures)
        for label, action in zip(paths, actions, strict=True):
            of_actions[label] = action_errors(space, action[None], true, xyz0, rot0, truth_xyz)
    return {
        label: judge(xyz[None], rot[None], truth_xyz, truth_rot, of_actions=of_actions.get(label))
        for label, (xyz, rot) in paths.items()
    }
