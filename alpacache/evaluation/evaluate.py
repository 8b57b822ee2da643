"""Did it help? The base model and trained ones predict paths for the same cached samples from the same noise."""

import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.alpamayo import ActionExpert, Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.sample import Floats, SampleRef
from alpacache.driving.strata import classify
from alpacache.errors import InterruptedRunError, UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.judging import SampleResult, judge, judge_baselines
from alpacache.evaluation.output import write_results
from alpacache.evaluation.runs import labelled_runs, open_run
from alpacache.evaluation.summary import EvalSummary, summarise
from alpacache.gpu.device import enter, resolve_device
from alpacache.inference.prediction import Paths, predict_actions, predict_ahead, to_paths
from alpacache.interrupt import InterruptGuard
from alpacache.pictures.canvas import MODEL_COLOURS
from alpacache.pictures.front_view import draw_paths
from alpacache.progress import OnProgress, Progress, ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """The numbers of an evaluation, and the directory that they were written to."""

    summary: EvalSummary
    results: Sequence[SampleResult]
    out: str
    seconds: float


def evaluate(config: EvalConfig, *, on_progress: OnProgress = ignore) -> EvalReport:
    """Sample paths for every cached sample and model, judge them, and write JSON, pictures and a report to `out`."""
    started = time.monotonic()
    runs = labelled_runs(config.checkpoint, config.compare)
    base = Checkpoint(config.model)
    data = CachedDataset([config.store], base)
    indices = data.plain[: config.samples]
    on_rollouts = config.reasoning == "auto" and data.rollouts > 0
    if on_rollouts and config.paths > data.rollouts:
        raise UsageError(
            f"{config.store} has {data.rollouts} reasoning rollouts a sample, {config.paths} paths need one each; pass "
            f"--paths {data.rollouts}, or --reasoning none for paths without reasoning."
        )
    models = {
        label: None if run is None else open_run(run, base, vlm=data.vlm, average=config.ema)
        for label, run in runs.items()
    }
    device = resolve_device(config.device)
    _check_writable(Path(config.out))

    enter(device)
    poses = cache(data.poses)  # read while the device computes
    predicted: dict[str, list[Paths]] = {label: [] for label in models}
    with InterruptGuard() as guard:
        for label, run in models.items():
            expert = load_expert(base, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
            if run is not None:
                run.put_into(expert)
            batches = _sampled_actions(
                expert.eval(),
                data,
                indices,
                on_rollouts=on_rollouts,
                paths=config.paths,
                flow_steps=config.flow_steps,
                seed=config.seed,
                batch_size=config.batch_size,
                capture=config.capture,
            )
            with closing(batches):
                for rows, actions in batches:
                    if guard.requested:
                        raise InterruptedRunError("stopped on request; an evaluation keeps nothing, run it again.")
                    predicted[label] += [
                        to_paths(expert.action_space, draws, *poses(index)[:2])
                        for index, draws in zip(rows, actions, strict=True)
                    ]
                    done, total = sum(map(len, predicted.values())), len(models) * len(indices)
                    rate = done / (time.monotonic() - started)
                    on_progress(Progress(done=done, total=total, unit="samples", rate=rate, notes={"model": label}))
            del expert, batches  # before the next expert is loaded

    results = [
        _judge_sample(data, index, poses(index), {label: paths[place] for label, paths in predicted.items()})
        for place, index in enumerate(indices)
    ]
    summary = summarise(results, seed=config.seed)
    settings = {
        "paths": config.paths,
        "flow_steps": config.flow_steps,
        "seed": config.seed,
        "reasoning": "rollout" if on_rollouts else "none",
        "view": 0,
    }
    losses = {label: run.metrics() for label, run in models.items() if run is not None}
    write_results(Path(config.out), summary, results, settings=settings, losses=losses)
    return EvalReport(summary=summary, results=results, out=config.out, seconds=time.monotonic() - started)


def _check_writable(out: Path) -> None:
    """Make the output directory. Raises `UsageError` if nothing can be written there."""
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"--out {out}: nothing can be written there ({error}); name another directory.") from error


def _sampled_actions(
    expert: ActionExpert,
    data: CachedDataset,
    indices: Sequence[int],
    *,
    on_rollouts: bool,
    paths: int,
    flow_steps: int,
    seed: int,
    batch_size: int,
    capture: bool,
) -> Generator[tuple[Sequence[int], Tensor]]:
    """Yield batch by batch the indices of its samples and their sampled actions `[B, paths, 64, 2]`."""
    if not on_rollouts:
        yield from predict_ahead(
            expert,
            data,
            indices,
            paths=paths,
            flow_steps=flow_steps,
            seed=seed,
            batch_size=batch_size,
            capture=capture,
        )
        return
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        samples = [data.load(index, tails=paths) for index in rows]
        yield rows, predict_actions(expert, samples, paths=paths, flow_steps=flow_steps, seed=seed)


def _judge_sample(
    data: CachedDataset, index: int, poses: tuple[Tensor, Tensor, Tensor, Tensor], paths: Mapping[str, Paths]
) -> SampleResult:
    history_xyz, history_rot, truth_xyz, truth_rot = drive = tuple(tensor.double().numpy() for tensor in poses)
    judged = {label: judge(xyz, rot, truth_xyz, truth_rot) for label, (xyz, rot) in paths.items()}
    sample_id = data.sample_id(index)
    return SampleResult(
        sample_id=sample_id,
        clip_id=SampleRef.parse(sample_id).clip_id,
        truth_xyz=truth_xyz,
        truth_rot=truth_rot,
        history_xyz=history_xyz,
        history_rot=history_rot,
        front_jpeg=_front_picture(data, index, truth_xyz, {label: xyz for label, (xyz, _) in paths.items()}),
        strata=classify(*drive),
        models=judged | judge_baselines(*drive),
    )


def _front_picture(
    data: CachedDataset, index: int, truth_xyz: Floats, paths: Mapping[str, NDArray[np.float32]]
) -> bytes | None:
    """The front camera's picture, with the paths drawn into it where its calibration is known."""
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
