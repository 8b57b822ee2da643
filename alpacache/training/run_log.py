"""What a run tells: a row of `metrics.jsonl` and the trackers' scalars for each step, progress, and the report."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from alpacache.progress import OnProgress, Progress
from alpacache.training.run_directory import RunDirectory
from alpacache.training.step import StepResult, StepValues
from alpacache.training.trackers import Tracker, scalars
from cache_store import CorruptSampleError

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
    """Whether the run ended before its last step, because validation had stopped getting better."""
    damaged: int
    """Number of samples that were left out because their stored bytes are damaged."""
    seconds: float
    samples_per_s: float
    data_wait: float
    """Share of the time spent waiting for data."""
    planned_gib: float | None
    """Peak reserved GPU memory, as planned before the first step."""
    peak_gib: float | None
    """Peak reserved GPU memory, measured."""
    draws: int


class StepClock:
    """Measures how long steps take, and how much of that is waiting for data.

    On a GPU the wait is the time that the device idled before a step: from the end of the step before until this one's
    samples were there. On a CPU it is the time that the loop waited.
    """

    def __init__(self) -> None:
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
        """What passes from here to the next step is not waiting for data."""
        self._ended = None

    def measure(self, result: StepResult, *, ring_waited_s: float) -> dict[str, float]:
        """`step_ms` and `data_wait` of a step that was read, where they are known."""
        seconds = self.seconds
        if result.ended is None or result.began is None:
            step_s, wait_s = seconds - self._read_s, ring_waited_s - self._read_waited_s
            self._read_s, self._read_waited_s = seconds, ring_waited_s
        elif self._ended is None:
            self._ended = result.ended
            return {}
        else:
            step_s, wait_s = (self._ended.elapsed_time(event) / 1e3 for event in (result.ended, result.began))
            self._ended = result.ended
        self._timed_s += step_s
        self._waited_s += wait_s
        return {"step_ms": step_s * 1e3, "data_wait": wait_s / step_s if step_s else 0.0}


class RunLog:
    """Rows, trackers and progress of one call of `train`; only the first process writes.

    Use it inside `with`, which closes the trackers.
    """

    def __init__(
        self, directory: RunDirectory, *, first: int, total: int, batch_size: int, on_progress: OnProgress, writes: bool
    ) -> None:
        """`first`: the step that the run goes on after; `writes`: whether this is the first process."""
        self._directory, self._on_progress, self._writes = directory, on_progress, writes
        self._first, self._total, self._batch_size = first, total, batch_size
        self._trackers: list[Tracker] = []
        self._closing = ExitStack()
        self._losses: list[float] = []
        self._by_turn: dict[str, list[float]] = defaultdict(list)
        self.clock = StepClock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.close()

    def add_tracker(self, tracker: Tracker) -> None:
        """Send every later row to a tracker, too."""
        self._trackers.append(tracker)
        self._closing.callback(tracker.close)

    def take_by_turn(self) -> dict[str, list[float]]:
        """Losses of this process's samples by turn stratum, since the last time this was asked."""
        by_turn, self._by_turn = self._by_turn, defaultdict(list)
        return dict(by_turn)

    def row(self, number: int, result: StepResult, values: StepValues, *, lr: float, waited_s: float) -> dict[str, Any]:
        """The row of a step."""
        timing = self.clock.measure(result, ring_waited_s=waited_s)
        rate = (number - self._first) / self.clock.seconds
        row = {"step": number, "loss": values.loss, "lr": lr, "grad_norm": values.norm}
        return row | {"samples_per_s": rate * self._batch_size, **timing}

    def count_losses(self, result: StepResult, values: StepValues) -> None:
        """Take the losses of a step that was applied into the report and the means by turn."""
        self._losses.append(values.loss)
        for turn, loss in zip(result.batch.turns, values.losses, strict=True):
            self._by_turn[turn].append(loss)

    def write(self, row: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Write a row, and report progress with some notes beside those of the row."""
        if not self._writes:
            return
        self._directory.append_metrics(row)
        for tracker in self._trackers:
            tracker.log(row["step"], scalars(row))
        rate = row["samples_per_s"] / self._batch_size
        told = {**self._notes(row), **notes}
        self._on_progress(Progress(done=row["step"], total=self._total, unit="steps", rate=rate, notes=told))

    def write_damage(self, step: int, error: CorruptSampleError) -> None:
        """Write which sample is left out from a step on."""
        self._directory.append_metrics({"step": step, "damaged": error.sample_id, "message": str(error)})

    def warn_of_validation(self, step: int, validated: Mapping[str, float]) -> None:
        """Warn where a validation is not finite."""
        if self._writes and (broken := [name for name, value in validated.items() if not math.isfinite(value)]):
            _log.warning(
                "validation at step %d is not finite (%s): the weights are broken or near it. Train again with a lower "
                "--lr or a longer --warmup.",
                step,
                ", ".join(broken),
            )

    def _notes(self, row: Mapping[str, Any]) -> dict[str, str]:
        notes = {"loss": "skipped" if row["loss"] is None else f"{row['loss']:.4f}"}
        if self.clock.data_wait is not None:
            notes["wait"] = f"{self.clock.data_wait:.0%}"
        notes["samples/s"] = f"{row['samples_per_s']:.3g}"
        if "val_loss" in row:
            notes["val"] = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        return notes

    def mean_losses(self) -> tuple[float | None, float | None]:
        """Mean loss over the first steps, and over the last."""
        window = max(1, min(_REPORTED_STEPS, len(self._losses) // 2))
        return _mean(self._losses[:window]), _mean(self._losses[-window:])

    def samples_per_s(self, step: int) -> float:
        """Mean rate from the first step to this one."""
        return (step - self._first) * self._batch_size / self.clock.seconds


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
