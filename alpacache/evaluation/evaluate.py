"""Did it help? The base model and trained ones predict paths for the same cached samples from the same noise."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import POSE_FIELDS, stored_strata
from alpacache.cached_samples.other_clips import partners_of
from alpacache.cached_samples.sample_choice import SampleChoice, find_samples
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.cameras import camera_words
from alpacache.driving.route import command_of
from alpacache.driving.sample import SampleRef
from alpacache.driving.splits import count_overlapping
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.judged_models import JudgedModel, find_models
from alpacache.evaluation.judging import LeftOut, SampleResult, judge, judge_baselines
from alpacache.evaluation.known_clips import trained_samples
from alpacache.evaluation.output import check_evaluation_out, write_results
from alpacache.evaluation.predicting import Poses, Predicted, Predictor
from alpacache.evaluation.sheet import MOST_ROWS
from alpacache.evaluation.summary import EvalSummary, summarise
from alpacache.evaluation.unread import Unread
from alpacache.gpu.device import enter, resolve_device
from alpacache.inference import BASE, TRAINED
from alpacache.interrupt import InterruptGuard
from alpacache.masking import masked_values
from alpacache.metrics.bootstrap import BLOCK_S
from alpacache.metrics.steering import action_errors
from alpacache.pictures.canvas import MODEL_COLOURS
from alpacache.pictures.front_view import draw_paths
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.training.data_order import check_overlap
from alpacache.training.run_directory import recorded_metrics
from alpacache.training.trained_expert import load_trained

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """The numbers of an evaluation, and the directory that they were written to."""

    summary: EvalSummary
    results: Sequence[SampleResult]
    left_out: Sequence[LeftOut]
    """Samples that could not be read; no model is judged on them."""
    out: str
    seconds: float
    choice: Mapping[str, Any] | None = None
    """Record of how the samples were chosen; None for all."""


def evaluate(config: EvalConfig, *, on_progress: OnProgress = ignore) -> EvalReport:
    """Sample paths for every cached sample and model, judge them, and write JSON, pictures and a report to `out`.

    Raises `SampleReadError` where a sample cannot be read and is not to be left out, or half of all cannot.
    """
    started = time.monotonic()
    base = Checkpoint(config.model)
    samples = SampleChoice(
        only=config.only, exclude=config.exclude, weights=config.sample_weights, split=config.split_by, side="val"
    )
    data, stores = CachedDataset(config.store, base, samples=samples), ", ".join(config.store)
    for warning in check_overlap(data, config.store, None, val_store=None, allowed=config.on_overlap == "allow"):
        _log.warning("%s.", warning)
    unread = Unread(data, skips=config.on_damage == "skip")
    indices = [index for index in data.plain if index not in unread.errors][: config.samples]
    on_rollouts = config.reasoning == "auto" and data.rollouts > 0
    if on_rollouts:
        _check_rollouts(data, stores, paths=config.paths, controlled=bool(config.control))
    if config.swap_route:
        _check_swap(data, stores, on_rollouts=on_rollouts)
    on_sheet = _on_sheet(config.sheet, data, indices)
    if config.guidance is not None:
        _check_guidance(data, stores, on_rollouts=on_rollouts, compared=config.swap_route or bool(config.control))
    poses = cache(data.poses)  # read while the device computes
    models = find_models(
        base,
        ({} if config.checkpoint is None else {TRAINED: config.checkpoint}) | dict(config.compare),
        data,
        indices,
        poses,
        store=stores,
        other_stores=config.compare_store,
        average=config.ema,
        paths_on_rollouts=config.paths if on_rollouts else 0,
    )
    _warn_of_known_clips(models, data, indices, store=stores)
    _warn_of_other_pictures(models, config.compare_store, store=stores)
    partners = partners_of(data, indices, seed=config.seed) if "shuffled" in config.control else {}
    device = resolve_device(config.device)
    check_evaluation_out(Path(config.out))

    enter(device)
    space = _action_space(models[BASE].checkpoint)
    target_of = cache(lambda index: space.to_action(*poses(index)))
    predicted: dict[str, Predicted] = {}
    teller = _Teller(on_progress, started)
    with InterruptGuard() as guard:
        predictor = Predictor(
            indices=indices,
            sample_id=data.sample_id,
            poses=poses,
            target_of=target_of,
            unread=unread,
            guard=guard,
            paths=config.paths,
            flow_steps=config.all_flow_steps,
            seed=config.seed,
            batch_size=config.batch_size,
            capture=config.capture,
            on_rollouts=on_rollouts,
            guidance=config.guidance,
            swaps_route=config.swap_route,
            controls=config.control,
            partners=partners,
            on_batch=teller.add,
        )
        teller.total = sum(predictor.passes(model.stored) for model in models.values())
        for label, model in models.items():
            teller.label = label
            expert = load_trained(model.checkpoint, model.run, device, average=config.ema)
            named = f"{label!r} ({model.run or config.model})"
            predicted[label] = predictor.predict(expert, model.stored, model=named)
            del expert  # before the next one is loaded

    judged = _judge_all(data, indices, poses, space, target_of, predicted, partners, unread)
    results = list(judged.values())
    block_s = BLOCK_S if config.split is None else min(BLOCK_S, config.split.block_us / 1e6)
    summary = summarise(results, seed=config.seed, block_s=block_s)
    settings = _settings(config, data, on_rollouts=on_rollouts, new_base=models[BASE].checkpoint is not base)
    losses = {
        label: recorded_metrics(model.run, model.state) for label, model in models.items() if model.run is not None
    }
    left_out = unread.left_out()
    sheet = [judged[index] for index in on_sheet if index in judged]
    write_results(Path(config.out), summary, results, left_out=left_out, settings=settings, losses=losses, sheet=sheet)
    seconds = time.monotonic() - started
    return EvalReport(
        summary=summary,
        results=results,
        left_out=left_out,
        out=config.out,
        seconds=seconds,
        choice=settings.get("choice"),
    )


@dataclass(slots=True)
class _Teller:
    """Tells of the samples that are predicted, over all models."""

    on_progress: OnProgress
    started: float
    total: int = 0
    label: str = ""
    """Model that is predicting."""
    done: int = 0

    def add(self, samples: int) -> None:
        """Count samples and tell of them."""
        self.done += samples
        rate = self.done / (time.monotonic() - self.started)
        notes = {"model": self.label}
        self.on_progress(Progress(done=self.done, total=self.total, unit="samples", rate=rate, notes=notes))


def _judge_all(
    data: CachedDataset,
    indices: Sequence[int],
    poses: Callable[[int], Poses],
    space: UnicycleActionSpace,
    target_of: Callable[[int], Tensor],
    predicted: Mapping[str, Predicted],
    partners: Mapping[int, int],
    unread: Unread,
) -> dict[int, SampleResult]:
    """Judge each sample that can be read, by its index."""
    weights = None if data.chosen is None else data.chosen.weights
    judged: dict[int, SampleResult] = {}
    for index in indices:
        while index not in judged and index not in unread.errors:
            with unread.caught():
                judged[index] = _judge_sample(
                    data,
                    index,
                    poses(index),
                    (space, target_of(index)),
                    predicted,
                    weight=1.0 if weights is None else float(weights[index]),
                    shuffled_with=data.sample_id(partners[index]) if partners else None,
                )
    return judged


def _settings(config: EvalConfig, data: CachedDataset, *, on_rollouts: bool, new_base: bool) -> dict[str, Any]:
    """Record of what the paths depend on; options that were not asked for are left out."""
    flow_steps = config.all_flow_steps
    settings: dict[str, Any] = {"paths": config.paths, "flow_steps": flow_steps[0], "seed": config.seed}
    settings |= {"reasoning": "rollout" if on_rollouts else "none", "view": 0}
    if data.chosen is not None:
        settings["choice"] = data.chosen.record
    if new_base:
        settings["base"] = f"the new expert of {config.checkpoint} as it began, random weights"
    if config.compare_store:
        settings["compare_store"] = masked_values(dict(config.compare_store))
    if config.control:
        settings["control"] = list(config.control)
    if len(flow_steps) > 1:
        settings["all_flow_steps"] = list(flow_steps)
    if data.routed:
        settings |= {"routes": True, "swap_route": config.swap_route}
    if config.guidance is not None:
        settings["guidance"] = config.guidance
    return settings


def _check_rollouts(data: CachedDataset, store: str, *, paths: int, controlled: bool) -> None:
    """Raise `UsageError` where paths on reasoning rollouts lack rollouts, or would be compared with others."""
    if paths > data.rollouts:
        raise UsageError(
            f"{store} has {data.rollouts} reasoning rollouts per sample, {paths} paths need one each; "
            f"pass --paths {data.rollouts}, or --reasoning none for paths without reasoning."
        )
    if controlled:
        raise UsageError("control compares paths on direct prefixes; pass --reasoning none with it.")


def _check_guidance(data: CachedDataset, store: str, *, on_rollouts: bool, compared: bool) -> None:
    """Raise `UsageError` where samples do not have both prefixes, or guided paths would be `compared` with others."""
    if not data.routed:
        raise UsageError(
            f"{store} was extracted without routes, so none can guide; `extract --route` stores prefixes with and "
            "without one."
        )
    if on_rollouts:
        raise UsageError(
            "guidance takes the direct prefixes with and without the route; reasoning rollouts are stored with it "
            "alone. Pass --reasoning none with it."
        )
    if compared:
        raise UsageError("swap_route and control compare paths that nothing guides; leave --guidance or them out.")


def _check_swap(data: CachedDataset, store: str, *, on_rollouts: bool) -> None:
    """Raise `UsageError` where there is nothing to swap."""
    if not data.routed:
        raise UsageError(f"{store} was extracted without routes, so none can be swapped; `extract --route` gives them.")
    if on_rollouts:
        raise UsageError("swap_route compares paths on direct prefixes; pass --reasoning none with it.")


def _on_sheet(entries: Sequence[str], data: CachedDataset, indices: Sequence[int]) -> list[int]:
    """Judged samples that a sheet is to show. Raises `UsageError` for none, or too many."""
    if not entries:
        return []
    known = set(indices)
    shown = [index for index in find_samples(entries, data, option="--sheet") if index in known]
    if not 0 < len(shown) <= MOST_ROWS:
        raise UsageError(
            f"--sheet {' '.join(entries)[:200]}: {len(shown)} of the {len(indices)} samples that are judged fit it; "
            f"a sheet shows 1 to {MOST_ROWS}."
        )
    return shown


def _action_space(base: Checkpoint) -> UnicycleActionSpace:
    from alpacache.alpamayo.expert import action_space  # as below

    return action_space(base)


def _warn_of_known_clips(
    models: Mapping[str, JudgedModel], data: CachedDataset, indices: Sequence[int], *, store: str
) -> None:
    """Warn of each run that was trained on clips that it is to be judged on."""
    judged = [SampleRef.parse(data.sample_id(index)) for index in indices]
    clips = {ref.clip_id for ref in judged}
    for label, model in models.items():
        if model.run is None:
            continue
        trained = trained_samples(model.run, model.state["settings"], data.all_ids)
        if not (count := len({ref.clip_id for ref in trained} & clips)):
            continue
        known = f"{label!r} was trained on {count} of the {len(clips)} clips of --store {store} that it is judged on"
        moments, windows = count_overlapping(judged, trained), f"{len(judged)} windows of 8 s"
        if not moments:
            _log.warning("%s, at other times: none of %s overlaps. The numbers tell of these drives.", known, windows)
            continue
        _log.warning(
            "%s, and %d of %s overlap those that it was trained on: what it knows by heart counts as skill there. "
            "Judge it on others (`--split train` and `--split val` share no clip, with --split-by time:60 no window).",
            known,
            moments,
            windows,
        )


def _warn_of_other_pictures(models: Mapping[str, JudgedModel], others: Mapping[str, str], *, store: str) -> None:
    """Warn of each run that was trained on other cameras, or other black pictures, than it is to be judged on."""
    for label, model in models.items():
        if model.run is None:
            continue
        trained = {camera_words(record["identity"]) for record in model.state["settings"]["stores"]} - {""}
        if trained and (unseen := sorted(model.stored.data.pictures - trained)):
            saw, shows = "; ".join(sorted(trained)), "; ".join(unseen)
            where = f"--compare-store {label}={others[label]}" if label in others else f"--store {store}"
            _log.warning("%r was trained on %s, and %s shows %s.", label, saw, where, shows)


def _judge_sample(
    data: CachedDataset,
    index: int,
    poses: Poses,
    true_action: tuple[UnicycleActionSpace, Tensor],
    predicted: Mapping[str, Predicted],
    *,
    weight: float,
    shuffled_with: str | None,
) -> SampleResult:
    """Judge what each model predicts for one sample."""
    history_xyz, history_rot, truth_xyz, truth_rot = drive = tuple(tensor.double().numpy() for tensor in poses)
    sample_id, (jpeg, lens) = data.sample_id(index), data.front_picture(index)
    strata = stored_strata(sample_id, dict(zip(POSE_FIELDS, drive, strict=True)))
    if jpeg is not None and lens is not None:
        colours = dict(zip(predicted, cycle(MODEL_COLOURS), strict=False))
        with suppress(ValueError, OSError):  # a picture without lines is better than none
            drawn = {label: (colours[label], of_model.paths[index][0]) for label, of_model in predicted.items()}
            jpeg = draw_paths(jpeg, lens, truth_xyz, drawn)
    route, (space, true) = data.route(index), true_action
    swaps = command_of(route) in ("left", "right")  # stores outlive the rule by which they were given their twins
    judged = {}
    for label, of_model in predicted.items():
        of_actions = action_errors(space, of_model.actions[index], true, *poses[:2], truth_xyz)
        swapped = of_model.swapped.get(index) if swaps else None
        judged[label] = replace(
            judge(*of_model.paths[index], truth_xyz, truth_rot, of_actions=of_actions),
            swapped_xyz=None if swapped is None else swapped.astype(np.float64),
            loss=of_model.losses.get(index),
            controls={name: by_index[index] for name, by_index in of_model.controls.items() if index in by_index},
            by_steps={steps: by_index[index] for steps, by_index in of_model.by_steps.items()},
        )
    return SampleResult(
        sample_id=sample_id,
        clip_id=SampleRef.parse(sample_id).clip_id,
        truth_xyz=truth_xyz,
        truth_rot=truth_rot,
        history_xyz=history_xyz,
        history_rot=history_rot,
        front_jpeg=jpeg,
        strata=strata,
        models=judged | judge_baselines(*drive, true_action=true_action),
        route=route,
        routed=data.routed,
        weight=weight,
        shuffled_with=shuffled_with,
    )
