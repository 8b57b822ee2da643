"""Messages of a run: progress, the report, and for each step a row of `metrics.jsonl` and the trackers' scalars.

Trackers are TensorBoard events by default, Weights & Biases if asked for.
"""

import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import torch

from alpacache.errors import UsageError
from alpacache.progress import OnProgress, Progress
from alpacache.regular_file import read_regular
from alpacache.training.run_directory import RunDirectory
from alpacache.training.run_names import WANDB_ID
from alpacache.training.step import StepResult, StepValues
from cache_store import SampleReadError

_log = logging.getLogger(__name__)
_REPORTED_STEPS = 20
"""Steps at either end of a run over which its report takes the mean loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """The outcome of one call of `train`."""

    run: str
    steps: int
    """Steps of the run, earlier calls included."""
    samples: int
    """Distinct samples in the stores."""
    first_loss: float | None
    """Mean over this call's first steps (up to 20); None if there was nothing left to do."""
    last_loss: float | None
    """Mean over its last steps (up to 20)."""
    val_loss: float | None
    """The last validation's loss; None without one, NaN where it was not finite."""
    best_val_loss: float | None
    val_min_ade: float | None
    """The last validation's minADE, metres; None unless the best is chosen by it."""
    stopped_early: bool
    """True if the run ended because validation had stopped getting better."""
    damaged: int
    """Number of samples that are left out for good, as they could not be read twice in the run or at its end."""
    missed: int
    """Number of samples that could not be read once and could be later."""
    skipped: int
    """Steps of the run that were not applied, because loss or gradient was not finite."""
    seconds: float
    samples_per_s: float
    data_wait: float
    """Share of the time spent waiting for data."""
    planned_gib: float | None
    """Peak reserved GPU memory, as planned before the first step."""
    peak_gib: float | None
    """Peak reserved GPU memory, measured."""
    draws: int
    chosen: Mapping[str, Any] | None = None
    """The choice of samples as it is recorded, with the number and the share of an epoch by stratum; None for all."""


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, directory: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"TensorBoard needs tensorboard ({error}); install it, or pass --track none.") from error
        # Makes readers hide what a killed run wrote after its last checkpoint.
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One W&B run for a run directory, which keeps its id, so that a resumed run goes on there."""

    name = "Weights & Biases"

    def __init__(self, run: Path, config_toml: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError(f"--track wandb needs wandb ({error}): pip install 'alpacache[wandb]'.") from error
        note = run / WANDB_ID
        run_id = _read_id(note) if note.exists() else uuid4().hex[:8]
        try:
            self._run = wandb.init(
                project="alpacache",
                name=run.name,
                id=run_id,
                resume="allow",
                dir=str(run),
                config={"toml": config_toml},
            )
        except (wandb.Error, OSError, ValueError) as error:  # no key, no network; a setting from outside that is none
            why = " ".join(str(error).split()).partition(" [type=")[0]
            raise UsageError(
                f"Weights & Biases cannot track this run ({why}). Run `wandb login` (or set "
                "WANDB_API_KEY), set WANDB_MODE=offline to keep its files here, or pass --track tensorboard."
            ) from error
        note.write_text(run_id + "\n")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def _read_id(note: Path) -> str:
    """The id under which Weights & Biases knows a run."""
    try:
        run_id = read_regular(note, limit_bytes=200).decode().strip()
        if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):
            raise ValueError("it holds no id of letters, digits, - and _")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{note} cannot be used: {error}. Remove it, and Weights & Biases takes the run for a new one, or pass "
            "--track tensorboard."
        ) from error
    return run_id


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSum:
    """Losses of samples, added up in the order in which they came: a resumed run adds on and gets the same bits."""

    total: float = 0.0
    samples: int = 0

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(total=self.total + other.total, samples=self.samples + other.samples)

    @property
    def mean(self) -> float:
        return self.total / self.samples


def added(parts: Sequence[Mapping[str, LossSum]]) -> dict[str, LossSum]:
    """Sums by name over those of several processes, in their order."""
    names = sorted({name for part in parts for name in part})
    return {name: reduce(add, [part[name] for part in parts if name in part]) for name in names}


Tracker: TypeAlias = _TensorBoard | _WeightsAndBiases
"""A service that takes the scalars of each step."""


def make_trackers(track: str, run: Path, *, first_step: int, config_toml: str) -> list[Tracker]:
    """Trackers for a run that goes on after `first_step`. Raises `UsageError` where one is not installed.

    `track`: `none`, `tensorboard`, or `wandb` for both.
    """
    if track == "none":
        return []
    board = _TensorBoard(run / "tensorboard", first_step)
    return [board, _WeightsAndBiases(run, config_toml)] if track == "wandb" else [board]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a row of `metrics.jsonl`, without its step."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class RunLog:
    """Rows, trackers, progress and timing of one call of `train`; only the first process writes.

    `data_wait` is the share of the time spent waiting for data. On a GPU that is the time that the device idled before
    a step: from the end of the step before until this one's samples were there. On a CPU it is what the loop waited.
    """

    def __init__(
        self, directory: RunDirectory, *, first: int, total: int, batch_size: int, on_progress: OnProgress, writes: bool
    ) -> None:
        """`first`: the step that the run goes on after; `writes`: whether this is the first process."""
        self._directory, self._on_progress, self._writes = directory, on_progress, writes
        self._first, self._total, self._batch_size = first, total, batch_size
        self.trackers: list[Tracker] = []
        """They get every later row, too."""
        self._losses: list[float] = []
        self.turn_losses: dict[str, LossSum] = {}
        """Losses of this process's samples by turn stratum, since the last validation."""
        self._started = time.monotonic()
        self._ended: torch.cuda.Event | None = None
        """End of the last step that was read, on the device; None after a pause."""
        self._read_s = self._read_waited_s = 0.0
        """`seconds` and the ring's waiting when the last step was read."""
        self._timed_s = self._waited_s = 0.0
        """Sums over all steps that were timed."""

    @property
    def seconds(self) -> float:
        """Seconds since the run, or its resumption, began."""
        return time.monotonic() - self._started

    @property
    def data_wait(self) -> float | None:
        """Share of all timed steps that was spent waiting for data; None before the first."""
        return self._waited_s / self._timed_s if self._timed_s else None

    def begin_ring(self) -> None:
        """A new ring counts its waiting from zero."""
        self._read_waited_s = 0.0

    def pause(self) -> None:
        """Begin anew: what passes from here to the next step is not waiting for data."""
        self._ended = None

    def row(self, number: int, result: StepResult, values: StepValues, *, lr: float, waited_s: float) -> dict[str, Any]:
        """The row of a step that was read; `waited_s`: seconds that its ring has waited so far."""
        seconds = self.seconds
        rate = (number - self._first) / seconds * self._batch_size
        row = {"step": number, "loss": values.loss, "lr": lr, "grad_norm": values.norm, "samples_per_s": rate}
        before, self._ended = self._ended, result.ended
        if result.ended is None or result.began is None:
            step_s, wait_s = seconds - self._read_s, waited_s - self._read_waited_s
            self._read_s, self._read_waited_s = seconds, waited_s
        elif before is None:
            return row
        else:
            step_s, wait_s = (before.elapsed_time(event) / 1e3 for event in (result.ended, result.began))
        self._timed_s += step_s
        self._waited_s += wait_s
        return row | {"step_ms": step_s * 1e3, "data_wait": wait_s / step_s if step_s else 0.0}

    def count_losses(self, result: StepResult, values: StepValues) -> None:
        """Take the losses of a step that was applied into the report and the means by turn."""
        self._losses.append(values.loss)
        for turn, loss in zip(result.batch.turns, values.losses, strict=True):
            self.turn_losses[turn] = self.turn_losses.get(turn, LossSum()) + LossSum(total=loss, samples=1)

    def write(self, row: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Write a row, and report progress with some notes beside those of the row."""
        if not self._writes:
            return
        self._directory.append_metrics(row)
        self._track(row)
        told = {"loss": "skipped" if row["loss"] is None else f"{row['loss']:.4f}"}
        if self.data_wait is not None:
            told["wait"] = f"{self.data_wait:.0%}"
        told["samples/s"] = f"{row['samples_per_s']:.3g}"
        if "val_loss" in row:
            told["val"] = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
            if row.get("val_prefix", "direct") != "direct":
                told["val"] += f" on {row['val_prefix']}"
        rate = row["samples_per_s"] / self._batch_size
        progress = Progress(done=row["step"], total=self._total, unit="steps", rate=rate, notes={**told, **notes})
        self._on_progress(progress)

    def write_more(self, row: Mapping[str, Any]) -> None:
        """Write further numbers of a step whose row is written."""
        if self._writes:
            self._directory.append_metrics(row)
            self._track(row)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                _log.warning("%s could not be closed (%s); the run itself is saved.", tracker.name, error)

    def _track(self, row: Mapping[str, Any]) -> None:
        """Give a row's numbers to the trackers; whatever happens to one of them, training goes on."""
        for tracker in list(self.trackers):
            try:
                tracker.log(row["step"], scalars(row))
            except Exception as error:
                _log.warning("%s takes no more numbers (%s); training goes on without it.", tracker.name, error)
                self.trackers.remove(tracker)

    def write_damage(self, step: int, error: SampleReadError, *, for_good: bool = True) -> None:
        """Write which sample is left out, from a step on or at its next turn alone."""
        key, when = ("damaged", f"from step {step + 1} on") if for_good else ("missed", "until it comes next")
        _log.warning("left out %s: %s", when, str(error))  # the error itself would keep what it refers to
        self._directory.append_metrics({"step": step, key: error.sample_id, "message": str(error)})

    def warn_of_validation(self, step: int, validated: Mapping[str, float]) -> None:
        """Warn where a validation is not finite."""
        if self._writes and (broken := [name for name, value in validated.items() if not math.isfinite(value)]):
            _log.warning(
                "validation at step %d is not finite (%s): the weights are broken or near it. Train again with a lower "
                "--lr or a longer --warmup.",
                step,
                ", ".join(broken),
            )

    def totals(self, step: int) -> dict[str, Any]:
        """Fields of `TrainReport` on losses and time, after the last step."""
        window = max(1, min(_REPORTED_STEPS, len(self._losses) // 2))
        ends = self._losses[:window], self._losses[-window:]
        first, last = (sum(losses) / window if losses else None for losses in ends)
        rate = (step - self._first) * self._batch_size / self.seconds
        times = {"seconds": self.seconds, "samples_per_s": rate, "data_wait": self.data_wait or 0.0}
        return {"first_loss": first, "last_loss": last, **times}
