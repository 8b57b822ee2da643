"""Stage two: train the action expert from cached prefixes. The VLM is never loaded.

One plain loop. Its state is (weights, optimizer, step) and every random number is a function of the seed and a place in
the global order, so a run that was killed and resumed ends with the same bits as one that was not.
"""

import gc
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from alpacache import randomness
from alpacache.alpamayo import ActionExpert, Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import POSE_FIELDS
from alpacache.cached_samples.identity import check_base, check_same_vlm, model_identity
from alpacache.cached_samples.prefix_rows import PrefixRows
from alpacache.cached_samples.ring import Batch, BatchRing
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.config import to_toml
from alpacache.distributed.peer_memory import peer_memory
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.distributed.world import World, join_world
from alpacache.errors import DataError, DeviceMemoryError, InterruptedRunError, NonFiniteError, UsageError
from alpacache.interrupt import InterruptGuard
from alpacache.planning.workload import MemoryPlan
from alpacache.prefix.layout import LEAST_DECODED
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.strict_json import plain
from alpacache.training.auto_settings import cap_memory, settle
from alpacache.training.checkpoint_writer import CheckpointWriter
from alpacache.training.config import TrainConfig
from alpacache.training.data_order import batches_of, order_and_damage
from alpacache.training.ema import WeightAverage
from alpacache.training.optimizers import make_optimizer
from alpacache.training.resume_check import (
    as_begun,
    check_alike,
    check_settings,
    settings_record,
    stores_record,
    total_steps,
)
from alpacache.training.run_directory import RunCheckpoint, RunDirectory, read_checkpoint
from alpacache.training.step import StepResult, StepValues, TrainStep
from alpacache.training.trackers import Tracker, make_trackers, scalars
from alpacache.training.trainable import checkpoint_tensors, choose_trainable, enable_checkpointing
from alpacache.training.validation import Validation, means
from cache_store import CorruptSampleError

_NON_FINITE_LIMIT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a run of stage two did."""

    run: str
    steps: int
    samples: int
    """Distinct samples in the stores."""
    first_loss: float | None
    """Mean over this call's first steps (up to 20); None if there was nothing left to do."""
    last_loss: float | None
    """Mean over its last steps."""
    val_loss: float | None
    """Of the last validation; it may be NaN, which is then nowhere the best."""
    best_val_loss: float | None
    val_min_ade: float | None
    """Metres; None unless the best is chosen by it."""
    stopped_early: bool
    """Before the last step, because validation had stopped getting better."""
    damaged: int
    """Samples that were left out because their stored bytes are damaged."""
    seconds: float
    samples_per_s: float
    data_wait: float
    """Share of the time spent waiting for data."""
    planned_gib: float | None
    """Peak reserved GPU memory, as planned before the first step."""
    peak_gib: float | None
    """The same, measured."""
    draws: int


def train(
    config: TrainConfig, *, on_progress: OnProgress = ignore, on_plan: Callable[[MemoryPlan], None] = lambda plan: None
) -> TrainReport:
    """Train until the configured step; saves on the way, at the end, and when a signal asks to stop.

    On a GPU `on_plan` is told what memory the run will take, before any of it is taken. Under torchrun every process
    calls this with the same config; the first one writes.
    """
    with join_world(config.device) as world:
        return _train(config, world, on_progress, on_plan if world.is_first else lambda plan: None)


def _train(
    config: TrainConfig, world: World, on_progress: OnProgress, on_plan: Callable[[MemoryPlan], None]
) -> TrainReport:
    directory = RunDirectory(config.out)
    if directory.steps and not config.resume:
        raise UsageError(
            f"{config.out} already holds a run (step {directory.steps[-1]}); pass --resume to go on, or choose "
            "another --out."
        )
    if world.size > 1 and config.on_damage == "skip":
        raise UsageError("on_damage is 'skip' with several processes; mend the store with `alpacache verify` instead.")
    device, checkpoint = world.device, Checkpoint(config.model)
    data = CachedDataset(config.store_paths, checkpoint)
    val = CachedDataset([config.val], checkpoint) if config.val else None
    if val is not None:
        check_same_vlm(data.vlm, val.vlm, run=f"this run ({config.out})", what=f"--val {config.val}")
    stores = stores_record(config, data)
    check_alike(config, directory, checkpoint, stores, val, world)
    begun = as_begun(config, directory, world)
    config, plan = settle(begun, checkpoint, data, world, resumed=bool(directory.steps))
    if plan is not None:
        on_plan(plan)
    expert = load_expert(checkpoint, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    run = _Run(config, directory, checkpoint, data, stores, val, expert, plan, world, on_progress)
    if directory.steps:
        run.restore()
    elif world.is_first:
        directory.write_config(to_toml(config))
        directory.rewind_metrics(0)
    world.barrier()
    try:
        return run.loop()
    except torch.OutOfMemoryError as error:
        peak = run.peak_bytes() / 2**30
        planned = "" if plan is None else f" ({plan.device_bytes / 2**30:.2f} GiB were planned)"
        less = f"--micro-batch {max(1, (config.micro_batch or 1) // 2)} --checkpointing"
        again = f"Checkpoints are intact: go on with --resume {less}"
        other = f"Try {less}, a smaller --batch-size or --draws, or --trainable lora"
        raise DeviceMemoryError(
            f"out of GPU memory with {peak:.2f} GiB reserved{planned}: {error}\n"
            f"{again if directory.steps else other}; other programs on this GPU take from it too."
        ) from error


class _Run:
    """The state of a run: weights, optimizer, step."""

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        checkpoint: Checkpoint,
        data: CachedDataset,
        stores: list[dict[str, Any]],
        val: CachedDataset | None,
        expert: ActionExpert,
        plan: MemoryPlan | None,
        world: World,
        on_progress: OnProgress,
    ) -> None:
        """`config`: with everything settled that the plan decides; `stores`: as `stores_record` gives them."""
        assert isinstance(config.draws, int)
        assert config.micro_batch is not None
        self.world, self.mine = world, world.local_batch_size(config.batch_size)
        """Samples of a batch that this process takes: the rank-th, and every n-th from there."""
        self.draws, self.micro_batch, self.plan = config.draws, config.micro_batch, plan
        self.config, self.directory, self.checkpoint = config, directory, checkpoint
        self.data, self.expert, self.on_progress = data, expert, on_progress
        self.validation = None if val is None else Validation(val, config)
        self.order, self.unreadable = order_and_damage(config, data)
        self.stores, self.total = stores, total_steps(config, len(data))
        self.warmup = min(100, self.total // 10) if config.warmup is None else config.warmup
        if self.warmup >= self.total:
            raise UsageError(
                f"warmup is {self.warmup} of {self.total} steps; expected fewer, so that lr is ever reached."
            )
        self.parameters = choose_trainable(
            expert, config.trainable, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, seed=config.seed
        )
        if config.checkpointing:
            enable_checkpointing(expert)
        self.memory = peer_memory(world)
        self.shared = ShardedUpdate(self.parameters, world, self.memory)
        if self.memory is not None:
            cap_memory(config.budget_bytes, expert.device, beside_bytes=self.memory.beside_bytes)
        self.optimizer = make_optimizer(
            config.optimizer,
            self.parameters,
            betas=config.betas,
            weight_decay=config.weight_decay,
            shards=self.shared.shards,
        )
        self.average: WeightAverage | None = None
        self.step = 0
        self.best: dict[str, Any] = {"step": None, "value": None, "by": config.best_by, "since": 0}
        """Of all validations the best, and how many there were since."""
        self.damaged: set[int] = set()
        """Indices of samples that are left out."""
        self.losses: list[float] = []
        self.by_turn: dict[str, list[float]] = defaultdict(list)
        """Losses of samples since the last validation."""
        self.validated: dict[str, float] = {}
        """What the last validation found."""
        self.trackers: list[Tracker] = []
        self.writer = CheckpointWriter(directory)
        self.bad_steps = 0
        self.stopped_early = self.stopping = False
        self.started, self.first = time.monotonic(), 0
        self.ended: torch.cuda.Event | None = None
        """When the last step that was read had ended on the device; None after a pause."""
        self.read_s = self.read_waited_s = 0.0
        """Seconds and waiting of the loop when the last step was read."""
        self.timed_s = self.waited_s = 0.0
        """Over all steps that were timed: their seconds, and those of them that were spent waiting for data."""

    def peak_bytes(self) -> int:
        """The most of the GPU's memory that the run has taken so far, CUDA's own aside."""
        beside = 0 if self.memory is None else self.memory.beside_bytes
        return torch.cuda.max_memory_reserved(self.expert.device) + beside

    def loop(self) -> TrainReport:
        config, expert = self.config, self.expert
        if expert.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(expert.device)
        expert.train()
        if config.ema is not None and self.average is None and self.world.is_first:
            self.average = WeightAverage(self.parameters, decay=config.ema, every=config.ema_every)
        for index, error in self.unreadable.items():
            if index not in self.damaged:
                self._note_damage({index}, error)
        rows = PrefixRows(
            self.data.layout,
            self.data.longest,
            batch_size=self.mine,
            device=expert.device,
            # Damage is then known a step late, when an average would have taken in what did not happen.
            check_on_device=config.on_damage == "stop" and config.ema is None,
        )
        step = self._make_step(rows)
        self.started, self.first = time.monotonic(), self.step
        with InterruptGuard() as guard, ExitStack() as closing:
            closing.enter_context(self.writer)
            if self.world.is_first:
                self.trackers = make_trackers(config, self.directory.path, first_step=self.step)
            for tracker in self.trackers:
                closing.callback(tracker.close)
            while self.step < self.total and not self.stopped_early:
                places = batches_of(self.order, config.batch_size, first=self.step, end=self.total)
                ring = BatchRing(
                    self.data,
                    expert.action_space,
                    (self._without_damaged(batch)[self.world.rank :: self.world.size] for batch in places),
                    rows,
                    in_memory=config.in_memory,
                )
                try:
                    with ring:
                        self._run_through(ring, step, guard)
                except CorruptSampleError as error:
                    self._leave_out(error)
                del ring
                gc.collect()  # it, what its threads read and their error refer to each other: all RAM of --in-memory
        return self._report(self.first, time.monotonic() - self.started)

    def _make_step(self, rows: PrefixRows) -> TrainStep:
        config = self.config
        staged = StagedBatch(
            rows,
            self.expert,
            draws=self.draws,
            at_once=self.micro_batch,
            decoded_layers=LEAST_DECODED if self.plan is None else self.plan.decoded_layers,
        )
        return TrainStep(
            self.expert,
            self.parameters.values(),
            self.optimizer,
            self.shared,
            staged,
            micro_batch=self.micro_batch,
            clip=config.clip,
            causal=config.causal,
            capture=config.capture,
            compile_layers=config.compile,
        )

    def _run_through(self, ring: BatchRing, step: TrainStep, guard: InterruptGuard) -> None:
        """Train on the ring's batches, to the last or until it is time to stop."""
        config, lag = self.config, 0 if self.expert.device.type == "cpu" else 1
        underway: deque[tuple[int, StepResult]] = deque()
        self.read_waited_s = 0.0
        try:
            for batch in ring:
                underway.append((self.step + 1, self._enqueue(step, batch, stop=guard.requested)))
                ring.done(batch)
                self.step += 1
                if self.average is not None:
                    self.average.after(self.step)
                finished = self.step == self.total
                validating = self.validation is not None and (finished or self.step % config.val_every == 0)
                self.stopping |= guard.requested and self.world.size == 1  # several must all learn of it, by the step
                pausing = validating or finished or self.stopping or self.step % config.save_every == 0
                # On a GPU the last step is read when the next one is enqueued, so that the device never waits.
                while len(underway) > (0 if pausing or self.stopping else lag):
                    ring.release_finished()
                    self._take(*underway.popleft(), ring, validating=validating and not underway)
                if pausing or self.stopping:
                    self._pause(validated=validating)
                if self.stopped_early:
                    return
        except CorruptSampleError:
            while underway and underway[0][0] <= self.step:
                self._take(*underway.popleft(), ring, validating=False)
            raise

    def _take(self, number: int, result: StepResult, ring: BatchRing, *, validating: bool) -> None:
        """Read a step and tell of it."""
        values = result.values()
        if values.damaged:
            self.step = number - 1
            raise ring.damage_error()
        row = self._row(number, result, values, waited_s=ring.waited_s)
        if validating:
            assert self.validation is not None
            try:
                self.validated = self.validation.run(self.expert, self.world)
            except CorruptSampleError as error:
                if self.world.is_first:
                    self.directory.append_metrics(row)
                raise self._damaged_validation(error) from error
            by_turn = means(self.world.all_gather(dict(self.by_turn)))
            row |= plain(self.validated) | {f"train_loss/{turn}": loss for turn, loss in by_turn.items()}
            self.by_turn.clear()
        if not self.world.is_first:
            return
        self.directory.append_metrics(row)
        for tracker in self.trackers:
            tracker.log(number, scalars(row))
        self._tell(row)

    def _pause(self, *, validated: bool) -> None:
        """After a step that was read: keep the best, save when it is time, stop if asked to."""
        config, finished = self.config, self.step == self.total
        improved = False
        if validated:
            value = self.validated["val_loss" if config.best_by == "loss" else "val_min_ade"]
            improved = math.isfinite(value) and (not self._has_best() or value < self.best["value"])
            since = 0 if improved else self.best["since"] + 1
            best = {"step": self.step, "value": value, "by": config.best_by} if improved else self.best
            self.best = {**best, "since": since}
            self.stopped_early = config.patience is not None and since >= config.patience and not finished
        if improved or finished or self.stopping or self.stopped_early or self.step % config.save_every == 0:
            self._save(and_wait=finished or self.stopping or self.stopped_early)
        self.ended = None  # what passes until the next step is no waiting for data
        if self.stopping and not finished:
            raise InterruptedRunError(
                f"stopped on request at step {self.step}; saved. Run again with --resume to go on."
            )

    def _has_best(self) -> bool:
        """Whether there is a validation that others can be compared with."""
        value = self.best["value"]
        return value is not None and math.isfinite(value) and self.best["by"] == self.config.best_by

    def _without_damaged(self, batch: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The batch with the next sample in place of each that is left out."""
        if not self.damaged:
            return batch
        count = len(self.data)
        return [
            (place, next(other for other in range(index, index + count) if other % count not in self.damaged) % count)
            for place, index in batch
        ]

    def _leave_out(self, error: CorruptSampleError) -> None:
        """Go on without a damaged sample, or not: then the error is raised again."""
        if self.config.on_damage == "stop":
            if self.step > self.first and self.world.size == 1:  # several could not agree on it
                self._save(and_wait=True)
            raise error
        found = {index for index in range(len(self.data)) if self.data.sample_id(index) == error.sample_id}
        if len(found) > 1:  # in several stores
            found = {index for index in found - self.damaged if self._is_damaged(index)}
        if not found or found <= self.damaged or len(self.damaged | found) * 2 > len(self.data):
            raise error
        self._note_damage(found, error)

    def _is_damaged(self, index: int) -> bool:
        reader, sample_id = self.data.locate(index)
        try:
            reader.read(sample_id, (*self.data.prefix_fields, *POSE_FIELDS))
        except CorruptSampleError:
            return True
        return False

    def _note_damage(self, found: set[int], error: CorruptSampleError) -> None:
        self.damaged |= found
        self.directory.append_metrics({"step": self.step, "damaged": error.sample_id, "message": str(error)})

    def _damaged_validation(self, error: CorruptSampleError) -> DataError:
        """Nothing stands in for a sample of --val: the best of a run is told by the same samples throughout."""
        saved = self.world.size == 1  # several could not agree on it
        if saved:
            self._save(and_wait=True)
        state = f"Saved at step {self.step}" if saved else "Checkpoints are intact"
        return DataError(
            f"validation on {self.config.val} failed: {error}\n{state}. Mend it with `alpacache verify --deep "
            "--repair` and `alpacache extract`, or give another --val; then go on with --resume."
        )

    def restore(self) -> None:
        """Go on from the newest checkpoint; refuses a changed setting that would change the result."""
        path = self.directory.checkpoint(self.directory.steps[-1])
        content = read_checkpoint(path, optimizer=True, average=self.directory.has_average(self.directory.steps[-1]))
        check_base(self.checkpoint, content.state["base"], run=path)
        check_same_vlm(content.state.get("vlm"), self.data.vlm, run=path, what="the stores that are given now")
        check_settings(content.state["settings"], self._settings(), run=self.config.out)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(content.model[name])
        self.optimizer.load_tensors(content.optimizer)
        self.step = content.state["step"]
        self.best = content.state["best"]
        patience = self.config.patience
        if patience is not None and self.best["by"] == self.config.best_by:
            self.stopped_early = self.best["since"] >= patience and self.step < self.total
        ids = set(content.state.get("damaged", []))
        by_id = [index for index in range(len(self.data)) if self.data.sample_id(index) in ids] if ids else []
        self.damaged = set(content.state.get("damaged_indices", by_id))  # an older version knew the ids alone
        if content.average and self.config.ema is not None and self.world.is_first:
            self.average = WeightAverage(self.parameters, decay=self.config.ema, every=self.config.ema_every)
            self.average.load(content.average, content.state.get("average"))
        if self.world.is_first:
            self.directory.point_links(self.step, best=self.best["step"])
            self.directory.rewind_metrics(self.step)

    def _enqueue(self, step: TrainStep, batch: Batch, *, stop: bool) -> StepResult:
        config = self.config
        noise = torch.stack([randomness.noise(config.seed, place, draws=self.draws) for place in batch.positions])
        t = torch.stack(
            [randomness.times(config.seed, place, draws=self.draws, schedule=config.times) for place in batch.positions]
        )
        return step.run(batch, noise, t, self._lr(self.step), stop=stop)

    def _lr(self, step: int) -> float:
        config = self.config
        return learning_rate(step, total=self.total, warmup=self.warmup, peak=config.peak_lr, final=config.min_lr)

    def _row(self, number: int, result: StepResult, values: StepValues, *, waited_s: float) -> dict[str, Any]:
        """What is written of a step. Raises `NonFiniteError` after a few in a row that were not finite."""
        loss, norm = values.loss, values.norm
        self.stopping |= values.stop
        seconds = time.monotonic() - self.started
        rate = (number - self.first) / seconds
        row: dict[str, Any] = {"step": number, "loss": loss, "lr": self._lr(number - 1), "grad_norm": norm}
        row |= {"samples_per_s": rate * self.config.batch_size, **self._timing(result, seconds, waited_s)}
        if math.isfinite(loss) and math.isfinite(norm):
            self.losses.append(loss)
            for turn, value in zip(result.batch.turns, values.losses, strict=True):
                self.by_turn[turn].append(value)
            self.bad_steps = 0
            return row
        self.bad_steps += 1
        row |= {"loss": None, "grad_norm": None, "skipped": self._sample_ids(number)}
        if self.bad_steps >= _NON_FINITE_LIMIT:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self.bad_steps} steps in a row, last at step {number} "
                f"with {', '.join(row['skipped'])}; none was applied. Lower --lr, or check those samples with "
                "`alpacache verify --deep`."
            )
        return row

    def _sample_ids(self, number: int) -> list[str]:
        """Of a step's global batch."""
        (batch,) = batches_of(self.order, self.config.batch_size, first=number - 1, end=number)
        return [self.data.sample_id(index) for _, index in self._without_damaged(batch)]

    def _timing(self, result: StepResult, seconds: float, waited_s: float) -> dict[str, float]:
        """`step_ms` and `data_wait` of one step, where they are known.

        On a GPU the wait is what the device idled before the step: between the last step's end and the moment when the
        samples of this one were there. On a CPU it is what the loop waited.
        """
        if result.ended is None or result.began is None:
            step_s, wait_s = seconds - self.read_s, waited_s - self.read_waited_s
            self.read_s, self.read_waited_s = seconds, waited_s
        elif self.ended is None:
            self.ended = result.ended
            return {}
        else:
            step_s, wait_s = (self.ended.elapsed_time(event) / 1e3 for event in (result.ended, result.began))
            self.ended = result.ended
        self.timed_s += step_s
        self.waited_s += wait_s
        return {"step_ms": step_s * 1e3, "data_wait": wait_s / step_s if step_s else 0.0}

    def _save(self, *, and_wait: bool) -> None:
        """`and_wait`: until it is on the medium, and the other processes know."""
        self.shared.complete(self.optimizer.tensors())
        if self.world.is_first:
            self._write()
        if and_wait:
            self.writer.wait()
            self.world.barrier()

    def _write(self) -> None:
        state = {
            "settings": self._settings(),
            "base": model_identity(self.checkpoint),
            "vlm": self.data.vlm,
            "best": self.best,
            "average": None if self.average is None else self.average.state,
            "trainable": self.config.trainable,
            "damaged": sorted(self.data.sample_id(index) for index in self.damaged),
            "damaged_indices": sorted(self.damaged),
        }
        content = RunCheckpoint(
            model=checkpoint_tensors(self.expert, self.parameters),
            optimizer=self.optimizer.tensors(),
            average={} if self.average is None else self.average.tensors(),
            state=state,
        )
        if self.plan is not None:
            self.directory.write_memory({"planned": dict(self.plan.table()), "measured_peak": self.peak_bytes()})
        self.writer.save(self.step, content, keep=self.config.keep, best=self.best["step"])

    def _settings(self) -> dict[str, Any]:
        return settings_record(self.config, self.stores, processes=self.world.size)

    def _tell(self, row: dict[str, Any]) -> None:
        notes = {"loss": "skipped" if row["loss"] is None else f"{row['loss']:.4f}"}
        if self.timed_s:
            notes["wait"] = f"{self.waited_s / self.timed_s:.0%}"
        if self.expert.device.type == "cuda":
            notes["GiB"] = f"{self.peak_bytes() / 2**30:.1f}"
        notes["samples/s"] = f"{row['samples_per_s']:.3g}"
        if self.damaged:
            notes["damaged"] = str(len(self.damaged))
        if "val_loss" in row:
            notes["val"] = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        rate = row["samples_per_s"] / self.config.batch_size
        self.on_progress(Progress(done=row["step"], total=self.total, unit="steps", rate=rate, notes=notes))

    def _report(self, first: int, seconds: float) -> TrainReport:
        done = self.step - first
        device = self.expert.device
        window = max(1, min(20, len(self.losses) // 2))
        return TrainReport(
            run=self.config.out,
            steps=self.step,
            samples=len(self.data),
            first_loss=_mean(self.losses[:window]),
            last_loss=_mean(self.losses[-window:]),
            val_loss=self.validated.get("val_loss"),
            best_val_loss=self.best["value"] if self.best["by"] == "loss" else None,
            val_min_ade=self.validated.get("val_min_ade"),
            stopped_early=self.stopped_early,
            damaged=len(self.damaged),
            seconds=seconds,
            samples_per_s=done * self.config.batch_size / seconds if seconds else 0.0,
            data_wait=self.waited_s / self.timed_s if self.timed_s else 0.0,
            planned_gib=self.plan.device_bytes / 2**30 if self.plan is not None else None,
            draws=self.draws,
            peak_gib=self.peak_bytes() / 2**30 if device.type == "cuda" else None,
        )


def learning_rate(step: int, *, total: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up from `peak / warmup`, then a cosine that reaches `final` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total - 1 - warmup)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
