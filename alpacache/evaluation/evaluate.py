"""Did it help? Paths from cached prefixes, for the unmodified expert and for trained ones, judged on the same noise."""

import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.alpamayo import ActionExpert, Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import check_base, check_same_vlm
from alpacache.driving.sample import SampleRef
from alpacache.driving.strata import classify
from alpacache.errors import InterruptedRunError, UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.output import named_models, write_results
from alpacache.evaluation.summary import (
    EvalSummary,
    ModelResult,
    SampleResult,
    judge,
    judge_baselines,
    summarise,
)
from alpacache.gpu.device import enter, resolve_device
from alpacache.inference.prediction import (
    Paths,
    predict_actions,
    predict_ahead,
    to_paths,
)
from alpacache.interrupt import InterruptGuard
from alpacache.pictures.canvas import MODEL_COLOURS
from alpacache.pictures.front_view import draw_paths
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.training import trainable
from alpacache.training.run_directory import find_checkpoint, read_trained

Drive = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""History and future of one sample, xyz and rotations each: all that judging needs, without its prefix."""
Poses = tuple[Tensor, Tensor, Tensor, Tensor]
"""The same as it is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """What an evaluation found and where it lies."""

    summary: EvalSummary
    results: Sequence[SampleResult]
    out: str
    seconds: float


def evaluate(config: EvalConfig, *, on_progress: OnProgress = ignore) -> EvalReport:
    """Sample paths for every cached sample and model, judge them, and write JSON, pictures and a report to `out`."""
    started = time.monotonic()
    checkpoint = Checkpoint(config.model)
    data = CachedDataset([config.store], checkpoint)
    indices = list(data.plain[: config.samples])
    tails = _tails(config, data)
    runs = named_models(config)
    _make_out(Path(config.out))
    predicted: dict[str, list[Paths]] = {}
    steps: dict[str, int] = {}
    poses: dict[int, Poses] = {}
    with InterruptGuard() as guard:
        for label, run in runs.items():
            expert, steps[label] = _load(config, checkpoint, run, data)
            predicted[label] = []
            with closing(_actions(config, expert, data, indices, tails=tails)) as batches:
                for rows, actions in batches:
                    if guard.requested:
                        raise InterruptedRunError("stopped on request; an evaluation keeps nothing, run it again.")
                    poses |= {index: data.poses(index) for index in rows if index not in poses}
                    predicted[label] += [
                        to_paths(expert.action_space, draws, *poses[index][:2])
                        for index, draws in zip(rows, actions, strict=True)
                    ]
                    done = sum(map(len, predicted.values()))
                    rate, total = done / (time.monotonic() - started), len(runs) * len(indices)
                    on_progress(Progress(done=done, total=total, unit="samples", rate=rate, notes={"model": label}))
            del expert  # before the next one is loaded
    drives = {index: _drive(*poses[index]) for index in indices}
    results = [
        _result(
            data.sample_id(index),
            drives[index],
            _front(data, index, drives[index][2], {label: paths[place][0] for label, paths in predicted.items()}),
            {label: paths[place] for label, paths in predicted.items()},
        )
        for place, index in enumerate(indices)
    ]
    summary = summarise(results, seed=config.seed)
    write_results(Path(config.out), config, summary, results, steps=steps, reasoning="rollout" if tails else "none")
    return EvalReport(summary=summary, results=results, out=config.out, seconds=time.monotonic() - started)


def apply_checkpoint(
    expert: ActionExpert, run: str, checkpoint: Checkpoint, *, average: bool = False, data: CachedDataset | None = None
) -> int:
    """Put a run's trained tensors, or their average, into the expert and return the run's step.

    Refuses a run on another base model, and one on features of another VLM than those of `data`.
    """
    path = find_checkpoint(run)
    content = read_trained(path, average=average)
    check_base(checkpoint, content.state["base"], run=path)
    if data is not None:
        check_same_vlm(content.state.get("vlm"), data.vlm, run=path, what="the store that it is to be judged on")
    trainable.apply_checkpoint(expert, content.model, where=str(path))
    return int(content.state["step"])


def _tails(config: EvalConfig, data: CachedDataset) -> int:
    """Rollouts to read of each sample: one a path where the store has any and they are not declined, else none."""
    if config.reasoning == "none" or not data.rollouts:
        return 0
    if config.paths > data.rollouts:
        raise UsageError(
            f"{config.store} has {data.rollouts} reasoning rollouts a sample, {config.paths} paths need one each; pass "
            f"--paths {data.rollouts}, or --reasoning none for paths without reasoning."
        )
    return config.paths


def _make_out(out: Path) -> None:
    """Before anything is computed for it. Raises `UsageError` if nothing can be written there."""
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"--out {out}: nothing can be written there ({error}); name another directory.") from error


def _load(config: EvalConfig, checkpoint: Checkpoint, run: str | None, data: CachedDataset) -> tuple[ActionExpert, int]:
    """The expert, and the step of the run whose weights it has (0: none)."""
    device = resolve_device(config.device)
    enter(device)
    expert = load_expert(checkpoint, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    step = 0 if run is None else apply_checkpoint(expert, run, checkpoint, average=config.ema, data=data)
    return expert.eval(), step


def _actions(
    config: EvalConfig, expert: ActionExpert, data: CachedDataset, indices: Sequence[int], *, tails: int
) -> Generator[tuple[Sequence[int], Tensor]]:
    """Batch by batch: indices of its samples, and sampled actions `[B, K, 64, 2]`."""
    common = {"paths": config.paths, "flow_steps": config.flow_steps, "seed": config.seed}
    if not tails:
        yield from predict_ahead(expert, data, indices, batch_size=config.batch_size, capture=config.capture, **common)
        return
    for start in range(0, len(indices), config.batch_size):
        rows = indices[start : start + config.batch_size]
        yield rows, predict_actions(expert, [data.load(index, tails=tails) for index in rows], **common)


def _drive(*poses: Tensor) -> Drive:
    history_xyz, history_rot, future_xyz, future_rot = (tensor.double().numpy() for tensor in poses)
    return history_xyz, history_rot, future_xyz, future_rot


def _front(
    data: CachedDataset, index: int, truth_xyz: NDArray[np.float64], paths: Mapping[str, NDArray[np.float32]]
) -> bytes | None:
    """The front picture, with the paths where it is known how they project."""
    jpeg, lens = data.front_jpeg(index), data.front_lens(index)
    if jpeg is None or lens is None:
        return jpeg
    coloured = {
        label: (MODEL_COLOURS[number % len(MODEL_COLOURS)], xyz) for number, (label, xyz) in enumerate(paths.items())
    }
    try:
        return draw_paths(jpeg, lens, truth_xyz, coloured)
    except (ValueError, OSError):  # a picture without lines is better than none
        return jpeg


def _result(sample_id: str, drive: Drive, front_jpeg: bytes | None, paths: Mapping[str, Paths]) -> SampleResult:
    history_xyz, history_rot, truth_xyz, truth_rot = drive
    models: dict[str, ModelResult] = {
        label: judge(xyz, rot, truth_xyz, truth_rot) for label, (xyz, rot) in paths.items()
    }
    return SampleResult(
        sample_id=sample_id,
        clip_id=SampleRef.parse(sample_id).clip_id,
        truth_xyz=truth_xyz,
        truth_rot=truth_rot,
        history_xyz=history_xyz,
        history_rot=history_rot,
        front_jpeg=front_jpeg,
        strata=classify(*drive),
        models={**models, **judge_baselines(*drive)},
    )
