"""Did it help? The base model and trained ones predict paths for the same cached samples from the same noise."""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import layer_map_of
from alpacache.alpamayo.new_expert import begun_with
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import POSE_FIELDS, SWAPPED, CachedSample, stored_strata
from alpacache.cached_samples.sample_choice import SampleChoice
from alpacache.driving.cameras import camera_words
from alpacache.driving.route import command_of
from alpacache.driving.sample import SampleRef
from alpacache.driving.splits import count_overlapping
from alpacache.errors import InterruptedRunError, NonFiniteError, UsageError
from alpacache.evaluation.config import BASE, TRAINED, EvalConfig
from alpacache.evaluation.judging import LeftOut, SampleResult, judge, judge_baselines
from alpacache.evaluation.known_clips import trained_samples
from alpacache.evaluation.output import check_evaluation_out, write_results
from alpacache.evaluation.summary import EvalSummary, summarise
from alpacache.gpu.device import enter, resolve_device
from alpacache.inference.prediction import Paths, predict_actions, predict_ahead, predict_on_twins, to_paths
from alpacache.interrupt import InterruptGuard
from alpacache.layer_choice import layers_text
from alpacache.metrics.bootstrap import BLOCK_S
from alpacache.pictures.canvas import MODEL_COLOURS
from alpacache.pictures.front_view import draw_paths
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.training.data_order import check_overlap
from alpacache.training.run_directory import recorded_metrics
from alpacache.training.trained_expert import find_trained, load_trained
from cache_store import SampleReadError

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

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
    """How the samples were chosen; None for all."""


def evaluate(config: EvalConfig, *, on_progress: OnProgress = ignore) -> EvalReport:
    """Sample paths for every cached sample and model, judge them, and write JSON, pictures and a report to `out`.

    Raises `SampleReadError` where a sample cannot be read and is not to be left out, or half of all cannot.
    """
    started = time.monotonic()
    base = Checkpoint(config.model)
    samples = SampleChoice(only=config.only, exclude=config.exclude, split=config.split_by, side="val")
    data, stores = CachedDataset(config.store, base, samples=samples), ", ".join(config.store)
    for warning in check_overlap(data, config.store, None, val_store=None, allowed=config.on_overlap == "allow"):
        _log.warning("%s.", warning)
    unread = _Unread(data, skips=config.on_damage == "skip")
    indices = [index for index in data.plain if index not in unread.errors][: config.samples]
    on_rollouts = config.reasoning == "auto" and data.rollouts > 0
    if on_rollouts and config.paths > data.rollouts:
        raise UsageError(
            f"{stores} has {data.rollouts} reasoning rollouts per sample, {config.paths} paths need one each; "
            f"pass --paths {data.rollouts}, or --reasoning none for paths without reasoning."
        )
    if config.swap_route:
        _check_swap(data, stores, on_rollouts=on_rollouts)
    trained = {} if config.checkpoint is None else {TRAINED: config.checkpoint}
    runs = {
        label: find_trained(run, base, vlm=data.vlm, what="the store that it is to be judged on", average=config.ema)
        for label, run in (trained | dict(config.compare)).items()
    }
    first = base if TRAINED not in runs else begun_with(base, runs[TRAINED][1])
    if first is not base and not set(layer_map_of(base)) <= set(data.held_layers):
        _log.warning(
            "%s has keys and values of layers %s alone, too few for the expert of %s: 'base' is the new expert of %s "
            "as it began, random weights.",
            *(stores, layers_text(data.held_layers), config.model, config.checkpoint),
        )
    else:
        first = base
    for one in (first, *(begun_with(base, state) for _, state in runs.values())):
        data.of_layers(sorted(set(layer_map_of(one))))  # what a store lacks is refused now
    _warn_of_known_clips(runs, data, indices, store=stores)
    _warn_of_other_pictures(runs, data, store=stores)
    device = resolve_device(config.device)
    check_evaluation_out(Path(config.out))

    enter(device)
    poses = cache(data.poses)  # read while the device computes
    sampling = {"paths": config.paths, "flow_steps": config.flow_steps, "seed": config.seed}

    def batches_of(expert: "ActionExpert", todo: Sequence[int]) -> Generator[tuple[Sequence[int], Tensor]]:
        if on_rollouts:
            load = partial(data.of_layers(expert.prefix_layers).load, tails=config.paths)
            return _predict_loaded(predict_actions, expert, load, todo, batch_size=config.batch_size, **sampling)
        return predict_ahead(expert, data, todo, batch_size=config.batch_size, capture=config.capture, **sampling)

    def swapped_batches_of(expert: "ActionExpert", todo: Sequence[int]) -> Generator[tuple[Sequence[int], Tensor]]:
        load = partial(data.of_layers(expert.prefix_layers).load, twin=SWAPPED)
        return _predict_loaded(predict_on_twins, expert, load, todo, batch_size=config.batch_size, **sampling)

    swappable = [index for index in indices if config.swap_route and data.has_twin(index, SWAPPED)]
    predicted: dict[str, dict[int, Paths]] = {label: {} for label in (BASE, *runs)}
    swapped: dict[str, dict[int, Paths]] = {label: {} for label in predicted}
    with InterruptGuard() as guard:
        for label in predicted:
            run = runs[label][0] if label in runs else None
            expert = load_trained(first if run is None else base, run, device, average=config.ema)
            parts = (predicted[label], batches_of, indices), (swapped[label], swapped_batches_of, swappable)
            for into, predict, todo in parts:
                for batch in _paths_of(expert, predict, todo, poses, unread, guard):
                    _check_finite(batch, data, model=f"{label!r} ({run or config.model})")
                    into |= batch
                    done = sum(map(len, (*predicted.values(), *swapped.values())))
                    total = len(predicted) * (len(indices) + len(swappable))
                    rate = done / (time.monotonic() - started)
                    on_progress(Progress(done=done, total=total, unit="samples", rate=rate, notes={"model": label}))
            del expert  # before the next one is loaded

    judged: dict[int, SampleResult] = {}
    for index in indices:
        while index not in judged and index not in unread.errors:
            with unread.caught():
                paths = {label: by_index[index] for label, by_index in predicted.items()}
                others = {label: by_index[index][0] for label, by_index in swapped.items() if index in by_index}
                judged[index] = _judge_sample(data, index, poses(index), paths, others)
    results = list(judged.values())
    block_s = BLOCK_S if config.split is None else min(BLOCK_S, config.split.block_us / 1e6)
    summary = summarise(results, seed=config.seed, block_s=block_s)
    settings: dict[str, Any] = {**sampling, "reasoning": "rollout" if on_rollouts else "none", "view": 0}
    if first is not base:
        settings["base"] = f"the new expert of {config.checkpoint} as it began, random weights"
    if data.chosen is not None:
        settings["choice"] = data.chosen.record
    if data.routed:
        settings |= {"routes": True, "swap_route": config.swap_route}
    losses = {label: recorded_metrics(path, state) for label, (path, state) in runs.items()}
    left_out = unread.left_out()
    write_results(Path(config.out), summary, results, left_out=left_out, settings=settings, losses=losses)
    seconds = time.monotonic() - started
    return EvalReport(
        summary=summary,
        results=results,
        left_out=left_out,
        out=config.out,
        seconds=seconds,
        choice=settings.get("choice"),
    )


def _check_swap(data: CachedDataset, store: str, *, on_rollouts: bool) -> None:
    """Raise `UsageError` where there is nothing to swap."""
    if not data.routed:
        raise UsageError(f"{store} was extracted without routes, so none can be swapped; `extract --route` gives them.")
    if on_rollouts:
        raise UsageError("swap_route compares paths on direct prefixes; pass --reasoning none with it.")


def _paths_of(
    expert: "ActionExpert",
    batches_of: "Callable[[ActionExpert, Sequence[int]], Generator[tuple[Sequence[int], Tensor]]]",
    indices: Sequence[int],
    poses: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]],
    unread: "_Unread",
    guard: InterruptGuard,
) -> Iterator[dict[int, Paths]]:
    """Sample paths batch by batch, by index, of all samples that can be read; goes on behind one that cannot."""
    done: set[int] = set()
    while todo := [index for index in indices if index not in done and index not in unread.errors]:
        with unread.caught(), closing(batches_of(expert, todo)) as batches:
            for rows, actions in batches:
                if guard.requested:
                    raise InterruptedRunError("stopped on request; an evaluation keeps nothing, run it again.")
                drawn = zip(rows, actions, strict=True)
                paths = {index: to_paths(expert.action_space, draws, *poses(index)[:2]) for index, draws in drawn}
                done |= paths.keys()
                yield paths


def _check_finite(paths: Mapping[int, Paths], data: CachedDataset, *, model: str) -> None:
    """Raise `NonFiniteError` for a path that is not finite."""
    for index, parts in paths.items():
        if not all(np.isfinite(part).all() for part in parts):
            raise NonFiniteError(
                f"the model {model} predicts paths for {data.sample_id(index)} that are not finite: its weights or the "
                "sample's prefix are broken. Take an earlier checkpoint, or extract the sample again."
            )


class _Unread:
    """The samples of a dataset that cannot be read, and are left out if that is asked for."""

    def __init__(self, data: CachedDataset, *, skips: bool) -> None:
        """Take those whose commit record cannot be read; without `skips` raises the first one's error."""
        if not skips:
            data.refuse_unreadable()
        self._data, self._skips = data, skips
        self.errors = dict(data.unreadable)
        """By index."""
        self._again: set[int] = set()
        """Samples that failed once and could be read at once."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Leave the sample of an error out. Raises the error where that is not wanted, or half of all are gone."""
        try:
            yield
        except SampleReadError as error:
            same_id = [
                index
                for index in range(len(self._data))
                if self._data.sample_id(index) == error.sample_id and index not in self.errors
            ]
            damaged = [index for index in same_id if self._data.error_of(index) is not None]
            if same_id and not damaged and same_id[0] not in self._again:
                self._again.add(same_id[0])  # it can be read now
                return
            if not self._skips or not same_id or (len(self.errors) + 1) * 2 > len(self._data):
                raise
            self.errors[(damaged or same_id)[0]] = error

    def left_out(self) -> list[LeftOut]:
        """The samples, in order, and those whose id nothing tells."""
        known = [LeftOut(self._data.sample_id(index), str(error)) for index, error in sorted(self.errors.items())]
        return [*known, *(LeftOut("", str(error)) for error in self._data.nameless)]


def _warn_of_known_clips(
    runs: Mapping[str, tuple[Path, Mapping[str, Any]]], data: CachedDataset, indices: Sequence[int], *, store: str
) -> None:
    """Warn of each run that was trained on clips that it is to be judged on."""
    judged = [SampleRef.parse(data.sample_id(index)) for index in indices]
    clips = {ref.clip_id for ref in judged}
    for label, (checkpoint, state) in runs.items():
        trained = trained_samples(checkpoint, state["settings"], data.all_ids)
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


def _warn_of_other_pictures(
    runs: Mapping[str, tuple[Path, Mapping[str, Any]]], data: CachedDataset, *, store: str
) -> None:
    """Warn of each run that was trained on other cameras, or other black pictures, than it is to be judged on."""
    for label, (_, state) in runs.items():
        trained = {camera_words(record["identity"]) for record in state["settings"]["stores"]} - {""}
        if trained and (others := sorted(data.pictures - trained)):
            saw, shows = "; ".join(sorted(trained)), "; ".join(others)
            _log.warning("%r was trained on %s, and --store %s shows %s.", label, saw, store, shows)


def _predict_loaded(
    predict: Callable[..., Tensor],
    expert: "ActionExpert",
    load: Callable[[int], CachedSample],
    indices: Sequence[int],
    *,
    batch_size: int,
    **sampling: int,
) -> Generator[tuple[Sequence[int], Tensor]]:
    """Batch by batch, the indices and the actions `[B, paths, 64, 2]` of samples that are loaded one by one."""
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        yield rows, predict(expert, [load(index) for index in rows], **sampling)


def _judge_sample(
    data: CachedDataset,
    index: int,
    poses: tuple[Tensor, Tensor, Tensor, Tensor],
    paths: Mapping[str, Paths],
    swapped: Mapping[str, NDArray[np.float32]],
) -> SampleResult:
    history_xyz, history_rot, truth_xyz, truth_rot = drive = tuple(tensor.double().numpy() for tensor in poses)
    sample_id, (jpeg, lens) = data.sample_id(index), data.front_picture(index)
    strata = stored_strata(sample_id, dict(zip(POSE_FIELDS, drive, strict=True)))
    if jpeg is not None and lens is not None:
        colours = dict(zip(paths, cycle(MODEL_COLOURS), strict=False))
        with suppress(ValueError, OSError):  # a picture without lines is better than none
            jpeg = draw_paths(
                jpeg, lens, truth_xyz, {label: (colours[label], xyz) for label, (xyz, _) in paths.items()}
            )
    judged = {label: judge(xyz, rot, truth_xyz, truth_rot) for label, (xyz, rot) in paths.items()}
    route = data.route(index)
    if command_of(route) in ("left", "right"):  # stores outlive the rule by which they were given their twins
        judged |= {label: replace(judged[label], swapped_xyz=xyz.astype(np.float64)) for label, xyz in swapped.items()}
    return SampleResult(
        sample_id=sample_id,
        clip_id=SampleRef.parse(sample_id).clip_id,
        truth_xyz=truth_xyz,
        truth_rot=truth_rot,
        history_xyz=history_xyz,
        history_rot=history_rot,
        front_jpeg=jpeg,
        strata=strata,
        models=judged | judge_baselines(*drive),
        route=route,
        routed=data.routed,
    )
