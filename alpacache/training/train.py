"""Stage two: train the action expert from cached prefixes. The VLM is never loaded.

One plain loop. Its state is (weights, optimizer, step) and every random number is a function of the seed and a place in
the global order, so a run that was killed and resumed ends with the same bits as one that was not.
"""

import dataclasses
import gc
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from alpacache import randomness
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.alpamayo.expert import action_space
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import check_base, check_same_vlm, model_identity
from alpacache.cached_samples.order import GlobalOrder
from alpacache.cached_samples.ring import Batch, BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.config import to_toml
from alpacache.distributed.peer_memory import peer_memory
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.distributed.world import World, join_world
from alpacache.errors import DataError, InterruptedRunError, UsageError
from alpacache.interrupt import InterruptGuard
from alpacache.planning.workload import MemoryPlan, Workload, expert_sizes
from alpacache.prefix.layout import LEAST_DECODED
from alpacache.progress import OnProgress, ignore
from alpacache.strict_json import plain
from alpacache.training.auto_settings import (
    SettledStep,
    StepSettings,
    batch_seconds,
    cap_memory,
    out_of_memory,
    restore_auto_settings,
    settle_on_cpu,
    settle_on_gpu,
)
from alpacache.training.best import BestValidation
from alpacache.training.checkpoint_writer import CheckpointWriter
from alpacache.training.config import TrainConfig
from alpacache.training.damage import DamagedSamples
from alpacache.training.data_order import batches_of, global_order, total_steps
from alpacache.training.learner import Learner
from alpacache.training.learning_rate import LearningRate
from alpacache.training.non_finite import SkippedSteps
from alpacache.training.optimizers import make_optimizer, resolve
from alpacache.training.resume_check import check_processes_agree, check_unchanged, settings_record, stores_record
from alpacache.training.run_directory import RunCheckpoint, RunDirectory, read_checkpoint
from alpacache.training.run_log import RunLog, TrainReport
from alpacache.training.step import StepResult, TrainStep
from alpacache.training.trackers import make_trackers
from alpacache.training.trainable import choose_trainable, enable_checkpointing
from alpacache.training.validation import Validation, means
from cache_store import CorruptSampleError


def train(
    config: TrainConfig, *, on_progress: OnProgress = ignore, on_plan: Callable[[MemoryPlan], None] = lambda plan: None
) -> TrainReport:
    """Train until the configured step; saves on the way, at the end, and when a signal asks to stop.

    On a GPU `on_plan` is told what memory the run will take, before any of it is taken. Under torchrun every process
    calls this with the same config; the first one writes.
    """
    with join_world(config.device) as world:
        directory = RunDirectory(config.out)
        directory.refuse_existing(resume=config.resume)
        if world.size > 1 and config.on_damage == "skip":
            raise UsageError(
                "on_damage is 'skip' with several processes; mend the store with `alpacache verify` instead."
            )
        inputs = _open_inputs(config, directory, world)
        step = _settle(config, directory, inputs, world)
        if step.plan is not None and world.is_first:
            on_plan(step.plan)
        config = replace(config, draws=step.draws, micro_batch=step.micro_batch, checkpointing=step.checkpointing)
        run = _Run(config, world, directory, inputs, step, on_progress)
        world.barrier()
        try:
            return run.loop()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, step, run.learner.peak_bytes(), resumable=bool(directory.steps)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What a run learns from, opened and checked."""

    checkpoint: Checkpoint
    data: CachedDataset
    val: CachedDataset | None
    stores: list[dict[str, Any]]
    """The `stores_record` of `data`."""
    order: GlobalOrder
    unreadable: dict[int, CorruptSampleError]
    """Samples that the order found damaged."""
    total: int
    """Steps of the whole run."""


def _open_inputs(config: TrainConfig, directory: RunDirectory, world: World) -> _Inputs:
    """Open model and stores, and check that all processes see the same ones and can go on from the same step."""
    checkpoint = Checkpoint(config.model)
    data = CachedDataset(config.store_paths, checkpoint)
    val = CachedDataset([config.val], checkpoint) if config.val else None
    if val is not None:
        check_same_vlm(data.vlm, val.vlm, run=f"this run ({config.out})", what=f"--val {config.val}")
    stores = stores_record(config.store_paths, data)
    total = total_steps(config.steps, config.epochs, samples=len(data), batch_size=config.batch_size)
    check_processes_agree(
        world,
        dataclasses.asdict(config),
        directory=directory,
        checkpoint=checkpoint,
        stores=stores,
        val=val,
        total=total,
    )
    order, unreadable = global_order(
        data,
        list(zip(config.store_paths, config.store_weights, strict=True)),
        seed=config.seed,
        by_curvature=config.balance == "curvature",
        skip_damaged=config.on_damage == "skip",
    )
    return _Inputs(
        checkpoint=checkpoint, data=data, val=val, stores=stores, order=order, unreadable=unreadable, total=total
    )


def _settle(config: TrainConfig, directory: RunDirectory, inputs: _Inputs, world: World) -> SettledStep:
    """Settle what the config left open, and hold the allocator to the memory budget."""
    device, batch_size, data = world.device, world.local_batch_size(config.batch_size), inputs.data
    optimizer = resolve(config.optimizer, device)
    asked = StepSettings(draws=config.draws, micro_batch=config.micro_batch, checkpointing=config.checkpointing)
    asked = restore_auto_settings(asked, directory, world)
    if device.type != "cuda":
        return settle_on_cpu(asked, batch_size)
    work = Workload(
        **expert_sizes(inputs.checkpoint.shapes(*EXPERT_PARTS), config.trainable, config.lora_rank),
        layout=data.layout,
        longest=data.longest,
        trainable=config.trainable,
        batch_size=batch_size,
        optimizer=optimizer,
        compiled=config.compile,
        validates=config.val is not None,
        pinned_bytes=int(data.kv_bytes.sum()) if config.in_memory else None,
    )

    def measure() -> float:
        if config.in_memory:  # nothing to wait for after the first epoch
            return 0.0
        space, skip = action_space(inputs.checkpoint), config.on_damage == "skip"
        return batch_seconds(data, space, inputs.order, batch_size=batch_size, device=device, skip_damaged=skip)

    return settle_on_gpu(
        asked,
        work,
        world,
        cap_bytes=cap_memory(config.budget_bytes, device),
        batch_seconds=measure,
        resumed_run=config.out if directory.steps else None,
    )


def _make_learner(config: TrainConfig, checkpoint: Checkpoint, world: World) -> Learner:
    """Load the expert, choose what is trained, and make its optimizer."""
    device = world.device
    expert = load_expert(checkpoint, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    parameters = choose_trainable(
        expert, config.trainable, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, seed=config.seed
    )
    if config.checkpointing:
        enable_checkpointing(expert)
    memory = peer_memory(world)
    update = ShardedUpdate(parameters, world, memory)
    if memory is not None:
        cap_memory(config.budget_bytes, device, beside_bytes=memory.beside_bytes)
    optimizer = make_optimizer(
        config.optimizer, parameters, betas=config.betas, weight_decay=config.weight_decay, shards=update.shards
    )
    return Learner(expert, parameters, optimizer, update, memory)


class _Run:
    """A run under way: its learner, the step that it has come to, and what it has seen."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        directory: RunDirectory,
        inputs: _Inputs,
        settled: SettledStep,
        on_progress: OnProgress,
    ) -> None:
        """Begin a run, or go on from its newest checkpoint."""
        self.config, self.world, self.directory, self.inputs, self.settled = config, world, directory, inputs, settled
        self.rate = LearningRate.of(peak=config.peak_lr, final=config.min_lr, warmup=config.warmup, total=inputs.total)
        self.learner = _make_learner(config, inputs.checkpoint, world)
        self.validation = None if inputs.val is None else Validation(inputs.val, config)
        self.damaged = DamagedSamples(inputs.data, config.on_damage)
        self.writer = CheckpointWriter(directory)
        self.skipped = SkippedSteps()
        self.best = BestValidation(by=config.best_by)
        self.validated: dict[str, float] = {}
        """Numbers of the last validation."""
        self.step = 0
        self.stopped_early = self.stopping = False
        saved: RunCheckpoint | None = None
        if directory.steps:
            saved = self._restore(directory.steps[-1])
        elif world.is_first:
            directory.write_config(to_toml(config))
            directory.rewind_metrics(0)
        if config.ema is not None and world.is_first:
            self.learner.start_average(config.ema, config.ema_every, saved)
        self.first = self.step
        """Step that this call goes on after."""
        self.log = RunLog(
            directory,
            first=self.first,
            total=inputs.total,
            batch_size=config.batch_size,
            on_progress=on_progress,
            writes=world.is_first,
        )

    def _restore(self, step: int) -> RunCheckpoint:
        """Take over a checkpoint; refuses a changed setting that would change the result."""
        config, path = self.config, self.directory.checkpoint(step)
        average = config.ema is not None and self.world.is_first and self.directory.has_average(step)
        content = read_checkpoint(path, optimizer=True, average=average)
        check_base(self.inputs.checkpoint, content.state["base"], run=path)
        check_same_vlm(content.state["vlm"], self.inputs.data.vlm, run=path, what="the stores that are given now")
        check_unchanged(content.state["settings"], self._settings(), run=config.out)
        self.learner.load(content)
        self.step = step
        self.best = BestValidation(**content.state["best"])
        self.stopped_early = self.best.by == config.best_by and self._has_lost_patience()
        self.damaged.load(content.state)
        if self.world.is_first:
            self.directory.point_links(step, best=self.best.step)
            self.directory.rewind_metrics(step)
        return content

    def loop(self) -> TrainReport:
        """Train to the last step, or until validation stops getting better."""
        config, expert = self.config, self.learner.expert
        if expert.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(expert.device)
        expert.train()
        for index, error in self.inputs.unreadable.items():
            if index not in self.damaged:
                self.damaged.add(index)
                self.log.write_damage(self.step, error)
        rows = PrefixRows(
            self.inputs.data.layout,
            self.inputs.data.longest,
            batch_size=self.world.local_batch_size(config.batch_size),
            device=expert.device,
            # The device tells of damage a step late, when an average would have taken in what did not happen.
            check_on_device=config.on_damage == "stop" and config.ema is None,
        )
        step = self._make_step(rows)
        with InterruptGuard() as guard, ExitStack() as closing:
            closing.enter_context(self.writer)
            closing.enter_context(self.log)
            if self.world.is_first:
                toml, run = to_toml(config), self.directory.path
                for tracker in make_trackers(config.track, run, first_step=self.step, config_toml=toml):
                    self.log.add_tracker(tracker)
            while self.step < self.inputs.total and not self.stopped_early:
                ring = self._make_ring(rows)
                try:
                    with ring:
                        self._train_on(ring, step, guard)
                except CorruptSampleError as error:
                    self._meet_damage(error)
                del ring
                gc.collect()  # it, what its threads read and their error refer to each other: all RAM of --in-memory
        self.skipped.check_learned(config.out)
        return self._report()

    def _make_ring(self, rows: PrefixRows) -> BatchRing:
        config, world = self.config, self.world
        batches = batches_of(self.inputs.order, config.batch_size, first=self.step, end=self.inputs.total)
        return BatchRing(
            self.inputs.data,
            self.learner.expert.action_space,
            (self.damaged.replace(batch)[world.rank :: world.size] for batch in batches),
            rows,
            in_memory=config.in_memory,
        )

    def _make_step(self, rows: PrefixRows) -> TrainStep:
        config, learner, settled = self.config, self.learner, self.settled
        staged = StagedBatch(
            rows,
            learner.expert,
            draws=settled.draws,
            at_once=settled.micro_batch,
            decoded_layers=LEAST_DECODED if settled.plan is None else settled.plan.decoded_layers,
        )
        return TrainStep(
            learner.expert,
            learner.parameters.values(),
            learner.optimizer,
            learner.update,
            staged,
            micro_batch=settled.micro_batch,
            clip=config.clip,
            causal=config.causal,
            capture=config.capture,
            compile_layers=config.compile,
        )

    def _train_on(self, ring: BatchRing, step: TrainStep, guard: InterruptGuard) -> None:
        """Train on the ring's batches, to the last or until it is time to stop."""
        # On a GPU a step is read when the next one is enqueued, so that the device never waits.
        lag = 0 if self.world.device.type == "cpu" else 1
        underway: deque[tuple[int, StepResult]] = deque()
        self.log.clock.begin_ring()
        try:
            for batch in ring:
                underway.append((self.step + 1, self._enqueue(step, batch, stop=guard.requested)))
                ring.done(batch)
                self.step += 1
                if self.learner.average is not None:
                    self.learner.average.after(self.step)
                self.stopping |= guard.requested and self.world.size == 1  # several must all learn of it, by the step
                validating = self.validation is not None and self._is_due(self.config.val_every)
                pausing = validating or self._is_due(self.config.save_every)
                while len(underway) > (0 if pausing or self.stopping else lag):
                    ring.release_finished()
                    self._read(*underway.popleft(), ring, validating=validating and not underway)
                if pausing or self.stopping:
                    self._pause(validated=validating)
                if self.stopped_early:
                    return
        except CorruptSampleError:
            while underway and underway[0][0] <= self.step:
                self._read(*underway.popleft(), ring, validating=False)
            raise

    def _is_due(self, every: int) -> bool:
        """Whether it is time for what is done every so many steps and after the last one."""
        return self.step == self.inputs.total or self.step % every == 0

    def _enqueue(self, step: TrainStep, batch: Batch, *, stop: bool) -> StepResult:
        seed, draws, schedule = self.config.seed, self.settled.draws, self.config.times
        noise = torch.stack([randomness.noise(seed, position, draws=draws) for position in batch.positions])
        t = torch.stack(
            [randomness.times(seed, position, draws=draws, schedule=schedule) for position in batch.positions]
        )
        return step.run(batch, noise, t, self.rate(self.step), stop=stop)

    def _read(self, number: int, result: StepResult, ring: BatchRing, *, validating: bool) -> None:
        """Read what came of a step, validate if it is time, and write its row."""
        values = result.values()
        if values.damaged:
            self.step = number - 1
            raise ring.damage_error()
        self.stopping |= values.stop
        row = self.log.row(number, result, values, lr=self.rate(number - 1), waited_s=ring.waited_s)
        if self.skipped.count(values.loss, values.norm):
            row |= {"loss": None, "grad_norm": None, "skipped": self._sample_ids(number)}
            self.skipped.check_streak(number, row["skipped"])
        else:
            self.log.count_losses(result, values)
        if validating:
            row |= self._validate(row)
        self.log.write(row, self._notes())

    def _sample_ids(self, number: int) -> list[str]:
        """Ids of a step's samples in all processes."""
        (batch,) = batches_of(self.inputs.order, self.config.batch_size, first=number - 1, end=number)
        return [self.inputs.data.sample_id(index) for _, index in self.damaged.replace(batch)]

    def _validate(self, row: dict[str, Any]) -> dict[str, Any]:
        """The part of a step's row that a validation adds: its numbers, and the training losses by turn."""
        assert self.validation is not None
        try:
            self.validated = self.validation.run(self.learner.expert, self.world)
        except CorruptSampleError as error:
            self.log.write(row, self._notes())
            raise self._damaged_validation(error) from error
        self.log.warn_of_validation(row["step"], self.validated)
        by_turn = means(self.world.all_gather(self.log.take_by_turn()))
        return {**plain(self.validated), **{f"train_loss/{turn}": loss for turn, loss in by_turn.items()}}

    def _damaged_validation(self, error: CorruptSampleError) -> DataError:
        """Nothing stands in for a sample of --val: all validations of a run must be of the same samples."""
        saved = self.world.size == 1  # several could not agree on it
        if saved:
            self._save(and_wait=True)
        state = f"Saved at step {self.step}" if saved else "Checkpoints are intact"
        return DataError(
            f"validation on {self.config.val} failed: {error}\n{state}. Mend it with `alpacache verify --deep "
            "--repair` and `alpacache extract`, or give another --val; then go on with --resume."
        )

    def _notes(self) -> dict[str, str]:
        """What progress tells besides the numbers of the step."""
        notes = {}
        if self.world.device.type == "cuda":
            notes["GiB"] = f"{self.learner.peak_bytes() / 2**30:.1f}"
        if len(self.damaged):
            notes["damaged"] = str(len(self.damaged))
        return notes

    def _pause(self, *, validated: bool) -> None:
        """After a step that was read: keep the best, save when it is time, stop if asked to."""
        finished, improved = self.step == self.inputs.total, False
        if validated:
            by = self.config.best_by
            improved = self.best.update(self.step, self.validated["val_loss" if by == "loss" else "val_min_ade"], by)
            self.stopped_early = self._has_lost_patience()
        ending = finished or self.stopping or self.stopped_early
        if improved or ending or self.step % self.config.save_every == 0:
            self._save(and_wait=ending)
        self.log.clock.pause()
        if self.stopping and not finished:
            raise InterruptedRunError(
                f"stopped on request at step {self.step}; saved. Run again with --resume to go on."
            )

    def _has_lost_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.best.since >= patience and self.step < self.inputs.total

    def _meet_damage(self, error: CorruptSampleError) -> None:
        """Leave a damaged sample out, or save and raise the error."""
        if self.config.on_damage == "stop" and self.step > self.first and self.world.size == 1:
            self._save(and_wait=True)  # several processes could not agree on it
        self.damaged.leave_out(error)
        self.log.write_damage(self.step, error)

    def _save(self, *, and_wait: bool) -> None:
        """Write a checkpoint. `and_wait`: until it is on the medium, and the other processes know."""
        self.learner.update.complete(self.learner.optimizer.tensors())
        if self.world.is_first:
            plan = self.settled.plan
            if plan is not None:
                peak = self.learner.peak_bytes()
                self.directory.write_memory({"planned": dict(plan.table()), "measured_peak": peak})
            content = self.learner.checkpoint(self._state())
            self.writer.save(self.step, content, keep=self.config.keep, best=self.best.step)
        if and_wait:
            self.writer.wait()
            self.world.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "base": model_identity(self.inputs.checkpoint),
            "vlm": self.inputs.data.vlm,
            "best": dataclasses.asdict(self.best),
            "trainable": self.config.trainable,
            **self.damaged.state(),
        }

    def _settings(self) -> dict[str, Any]:
        used = {"lr": self.config.peak_lr, "store_weights": self.config.store_weights}
        settings = dataclasses.asdict(self.config) | used
        return settings_record(settings, self.inputs.stores, processes=self.world.size)

    def _report(self) -> TrainReport:
        plan, cuda = self.settled.plan, self.world.device.type == "cuda"
        first_loss, last_loss = self.log.mean_losses()
        return TrainReport(
            run=self.config.out,
            steps=self.step,
            samples=len(self.inputs.data),
            first_loss=first_loss,
            last_loss=last_loss,
            val_loss=self.validated.get("val_loss"),
            best_val_loss=self.best.value if self.best.by == "loss" else None,
            val_min_ade=self.validated.get("val_min_ade"),
            stopped_early=self.stopped_early,
            damaged=len(self.damaged),
            seconds=self.log.clock.seconds,
            samples_per_s=self.log.samples_per_s(self.step),
            data_wait=self.log.clock.data_wait or 0.0,
            planned_gib=None if plan is None else plan.device_bytes / 2**30,
            peak_gib=self.learner.peak_bytes() / 2**30 if cuda else None,
            draws=self.settled.draws,
        )
