"""Stage two: train the action expert from cached prefixes. The VLM is never loaded.

One plain loop. Its state is (weights, optimizer, step) and every random number is a function of the seed and a place in
the global order, so a run that was killed and resumed ends with the same bits as one that was not.
"""

import gc
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from alpacache import randomness, strict_json
from alpacache.alpamayo.checkpoint import listed
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.cached_samples.identity import check_base, check_same_vlm, model_identity
from alpacache.cached_samples.ring import Batch, BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.config import to_toml
from alpacache.distributed.world import join_world
from alpacache.errors import DataError, InterruptedRunError, NonFiniteError, UsageError
from alpacache.interrupt import InterruptGuard
from alpacache.planning.config import NEW_EXPERT
from alpacache.planning.workload import MemoryPlan, Workload, expert_sizes
from alpacache.progress import OnProgress, ignore
from alpacache.torchrun import lone_task
from alpacache.training import auto_settings
from alpacache.training.absence import Absence
from alpacache.training.checkpoint_writer import CheckpointWriter
from alpacache.training.config import TrainConfig
from alpacache.training.data_order import DamagedSamples, batches_of, choice_lines
from alpacache.training.learner import Learner, planned_optimizer
from alpacache.training.optimizers import StepOptimizer, make_optimizer, resolve
from alpacache.training.resume_check import (
    check_begun,
    check_same_expert,
    check_unchanged,
    differing_settings,
    free_settings,
    kept_settings,
    schedule_of,
    settings_record,
)
from alpacache.training.run_directory import RunCheckpoint, RunDirectory, read_checkpoint
from alpacache.training.run_inputs import RunInputs
from alpacache.training.run_log import LossSum, RunLog, TrainReport, added, make_trackers
from alpacache.training.run_names import CONFIG, MEMORY, SAMPLES
from alpacache.training.schedule import BestValidation, LearningRate, SkippedSteps
from alpacache.training.step import StepResult, TrainStep
from alpacache.training.trainable import choose_trainable, enable_checkpointing
from alpacache.training.validation import Validation
from cache_store import SampleReadError, UnreachableStoreError


def train(
    config: TrainConfig,
    *,
    on_progress: OnProgress = ignore,
    on_plan: Callable[[MemoryPlan], None] = lambda plan: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> TrainReport:
    """Train until the configured step; saves on the way, at the end, and when a signal asks to stop.

    On a GPU `on_plan` is told what memory the run will take, before any of it is taken; `on_note` gets a line on what a
    resumed run goes on from. Under torchrun every process calls this with the same config; the first one writes.
    """
    if (task := lone_task()) is not None:
        launcher, variable = task
        raise UsageError(
            f"this is one of several tasks that {launcher} has started ({variable} is set), and they do not know of "
            "each other. Start one task a machine, and torchrun in it (docs/how-to/several-machines.md); for runs of "
            f"their own, each with another --out, unset {variable}."
        )
    with join_world(config.device) as world:
        if world.size > 1 and config.on_damage == "skip":
            raise UsageError(
                "on_damage is 'skip' with several processes; mend the store with `alpacache verify` instead."
            )
        config = _with_kept_settings(config)
        inputs = RunInputs.of(config, world)
        with inputs.directory.owned(take_over=config.take_over) if world.is_first else nullcontext():
            check_begun(inputs.directory, resume=config.resume)  # another process may just have begun it
            return _train(config, inputs, on_progress, on_plan, on_note)


def _with_kept_settings(config: TrainConfig) -> TrainConfig:
    """The same with what it leaves open as the run was begun, or as new runs have it."""
    kept = kept_settings(RunDirectory(config.out), resume=config.resume)
    if config.from_scratch:
        given = {name: strict_json.plain(getattr(config, name)) for name in NEW_EXPERT}
        check_same_expert(kept, given, run=config.out)
    else:
        kept = {name: value for name, value in kept.items() if name not in NEW_EXPERT}
    return replace(config, **{name: value for name, value in kept.items() if getattr(config, name) is None})


def _train(
    config: TrainConfig,
    inputs: RunInputs,
    on_progress: OnProgress,
    on_plan: Callable[[MemoryPlan], None],
    on_note: Callable[[str], None],
) -> TrainReport:
    """Settle what the config left open, and train."""
    world, data, batch_size = inputs.world, inputs.data, inputs.world.local_batch_size(config.batch_size)

    def batch_seconds() -> float:
        from alpacache.alpamayo.expert import action_space

        if config.in_memory:  # nothing to wait for after the first epoch
            return 0.0
        space, damaged = action_space(inputs.checkpoint), DamagedSamples(data, config.on_damage)
        size, device = batch_size, world.device
        return auto_settings.batch_seconds(data, space, inputs.order, damaged, batch_size=size, device=device)

    work = Workload(
        **expert_sizes(inputs.checkpoint.shapes(*EXPERT_PARTS), config.trainable, config.lora_rank),
        layout=data.layout,
        longest=data.longest,
        trainable=config.trainable,
        batch_size=batch_size,
        optimizer=resolve(config.optimizer, world.device),
        compiled=config.compile,
        validates=config.val is not None,
        tail_room=data.tail_room,
        pinned_bytes=int(data.kv_bytes.sum() + data.tail_bytes.sum()) if config.in_memory else None,
        captured=config.capture,
    )
    if (new := inputs.new_expert) is not None:
        budget = config.budget_bytes
        auto_settings.check_room(work.parameters, new.width, device=world.device, budget_bytes=budget)
    assert config.draws is not None
    plan = auto_settings.settle(
        work,
        world,
        inputs.directory,
        draws=config.draws,
        micro_batch=config.micro_batch,
        checkpointing=config.checkpointing,
        budget_bytes=config.budget_bytes,
        batch_seconds=batch_seconds,
    )
    if world.is_first and world.device.type == "cuda":
        on_plan(plan)
    config = replace(config, draws=plan.draws, micro_batch=plan.micro_batch, checkpointing=plan.checkpointing)
    run = _Run(config, inputs, plan, on_progress, on_note)
    world.barrier()
    try:
        return run.loop()
    except torch.OutOfMemoryError as error:
        peak, resumable = run.learner.peak_bytes(), bool(inputs.directory.steps)
        raise auto_settings.out_of_memory(error, plan, peak, resumable=resumable) from error


class _Run:
    """A run under way: its learner, the step that it has come to, and what it has seen."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: RunInputs,
        plan: MemoryPlan,
        on_progress: OnProgress,
        on_note: Callable[[str], None],
    ) -> None:
        """Begin a run, or go on from its newest checkpoint."""
        assert config.seed is not None
        self.config, self.inputs, self.plan, self.seed, self._on_note = config, inputs, plan, config.seed, on_note
        self.world, self.directory, self.data, self.total = inputs.world, inputs.directory, inputs.data, inputs.total
        world, directory, schedule = self.world, self.directory, schedule_of(self.directory)
        self.settings = settings_record(
            asdict(config) | self._used(),
            inputs.stores,
            processes=world.size,
            schedule=schedule,
            chosen=self.data.chosen,
        )
        rates = {"peak": config.peak_lr, "final": config.final_lr}
        self.rate = LearningRate(**rates, warmup=config.warmup, total=self.total, schedule=schedule)
        self.learner = self._make_learner()
        self.validation = self._make_validation()
        self.damaged = DamagedSamples(self.data, config.on_damage)
        self.writer = CheckpointWriter(directory)
        self.skipped = SkippedSteps()
        self.best = BestValidation(by=config.best_by)
        self.validated: dict[str, float] = {}
        """Numbers of the last validation."""
        self.cut_short = False
        """True if a request to stop ended the last validation."""
        self.step = 0
        self.guard, self.absence = InterruptGuard(), Absence()
        self.stopped_early = self.stopping = False
        saved = self._begin_or_restore()
        if config.ema is not None and world.is_first:
            assert config.ema_every is not None
            self.learner.start_average(config.ema, config.ema_every, saved)
        self.chosen = self._tell_choice() if world.is_first else None
        """The choice of samples, with what it came to by stratum; None for all."""
        self.first = self.step
        """Step that this call goes on after."""
        steps = {"first": self.first, "total": self.total, "batch_size": config.batch_size}
        self.log = RunLog(directory, **steps, on_progress=on_progress, writes=world.is_first)
        if saved is not None:
            by_process = saved.state.get("turn_losses", [])[world.rank :: world.size]
            self.log.turn_losses = added([{turn: LossSum(**one) for turn, one in part.items()} for part in by_process])

    def _used(self) -> dict[str, Any]:
        """Settings as they come out: what defaults stand for, and the sizes of a new expert."""
        config, new = self.config, self.inputs.new_expert
        used: dict[str, Any] = {"lr": config.peak_lr, "min_lr": config.final_lr, "store_weights": config.store_weights}
        used["optimizer"] = resolve(config.optimizer, self.world.device)
        if new is not None:
            used |= {"expert_layers": len(new.layer_map), "expert_width": new.width, "expert_heads": new.heads}
            used |= {"expert_intermediate": new.intermediate, "expert_map": list(new.layer_map)}
        return used

    def _begin_or_restore(self) -> RunCheckpoint | None:
        """Take over the newest checkpoint, which is returned, or begin the run's directory."""
        config, directory, is_first = self.config, self.directory, self.world.is_first
        begun = to_toml(replace(config.with_absolute_places(), resume=False, take_over=False), mask=True)
        if directory.steps:
            saved = self._restore(directory.steps[-1])
            if is_first and directory.restore_config(begun):
                self._on_note(
                    f"{directory.path} had no {CONFIG} any more; it is written again, with the settings in force."
                )
            return saved
        if is_first:
            if config.resume:
                self._on_note(f"{config.out} has no checkpoint to go on from; the run begins at step 0.")
            directory.begin(begun)
            if self.data.chosen is not None:
                directory.write(SAMPLES, self.data.chosen.table(self.data.ids))
        return None

    def _tell_choice(self) -> dict[str, Any] | None:
        """Say what a choice of samples came to by stratum, and return its record; None where all are taken."""
        if self.data.chosen is None:
            return None
        strata = self.data.share_strata(self.inputs.order.due)
        for line in choice_lines(self.data.chosen, strata):
            self._on_note(line)
        return {**self.data.chosen.record, "strata": {name: asdict(one) for name, one in strata.items()}}

    def _make_validation(self) -> Validation | None:
        """The validation on held-out samples, if there are any."""
        config, val = self.config, self.inputs.val
        if val is None:
            return None
        return Validation(
            val,
            config.val_samples,
            times=config.times,
            causal=config.causal,
            with_min_ade=config.best_by == "min_ade",
            shuffled=config.val_shuffled,
        )

    def _make_learner(self) -> Learner:
        """Load the expert, choose what is trained, and make its optimizer."""
        from alpacache.alpamayo import load_expert  # seconds of imports, which no refusal should wait for

        config, world = self.config, self.world
        dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
        expert = load_expert(self.inputs.checkpoint, dtype=dtype, device=world.device)
        assert config.label_rule is not None
        expert.action_space = replace(expert.action_space, label_rule=config.label_rule)
        rank, alpha = config.lora_rank, config.lora_alpha
        parameters = choose_trainable(expert, config.trainable, lora_rank=rank, lora_alpha=alpha, seed=self.seed)
        if config.checkpointing:
            enable_checkpointing(expert)

        def optimizer(shards: Mapping[str, slice]) -> StepOptimizer:
            make = partial(make_optimizer, config.optimizer, betas=config.betas, weight_decay=config.weight_decay)
            return planned_optimizer(make, parameters, self.plan, layers=len(expert.expert.layers), shards=shards)

        return Learner(expert, parameters, world, optimizer, budget_bytes=config.budget_bytes)

    def _restore(self, step: int) -> RunCheckpoint:
        """Take over a checkpoint; refuses a changed setting that would change the result."""
        config, path = self.config, self.directory.checkpoint(step)
        averages = config.ema is not None and self.world.is_first
        averages &= self.directory.state(step)["average"] is not None
        content = read_checkpoint(path, optimizer=True, average=averages)
        check_same_vlm(content.state["vlm"], self.data.vlm, run=path, what="the stores that are given now")
        check_unchanged(content.state["settings"], self.settings, run=config.out)
        check_base(self.inputs.checkpoint, content.state["base"], run=path)
        self.learner.load(content)
        self.step = step
        self.best = BestValidation(**content.state["best"])
        self.stopped_early = self.best.by == config.best_by and self._has_lost_patience()
        self.skipped = SkippedSteps(**(content.state.get("skipped") or {}))
        self.damaged.indices = set(content.state["damaged_indices"])
        if self.world.is_first:
            self._on_note(self._what_goes_on(content.state))
            self.directory.mark(step, best=self.best.step)
            self.directory.prune(self._kept)
            self.directory.rewind_metrics(step, content.state.get("metrics"))
        return content

    def _what_goes_on(self, state: Mapping[str, Any]) -> str:
        """A line on what a resumed run goes on from and does otherwise than before."""
        out, reached = self.config.out, f"step {self.step} of {self.total}"
        if self.step == self.total:
            return f"{out} is finished ({reached}); nothing is left to train."
        if self.stopped_early:
            return f"{out} has stopped early at {reached}; a larger --patience goes on."
        before = {**state.get("free_settings", {}), "processes": state["settings"]["processes"]}
        before["micro_batch"] = state["settings"]["micro_batch"]
        now = free_settings(asdict(self.config.with_absolute_places())) | {"processes": self.world.size}
        differs = differing_settings(before, now)
        if self.config.ema is not None and state["average"] is None:
            differs.append("an average of the weights begins here")
        how = f"other than before: {', '.join(differs)}" if differs else "with the settings that it had"
        return f"{out} goes on from {reached}, {how}."

    def loop(self) -> TrainReport:
        """Train to the last step, or until validation stops getting better."""
        config, world, expert = self.config, self.world, self.learner.expert
        if expert.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(expert.device)
        expert.train()
        self._leave_out_unreadable()
        rows = PrefixRows(
            self.data.layout,
            self.data.longest,
            batch_size=world.local_batch_size(config.batch_size),
            device=expert.device,
            tail_room=self.data.tail_room,
            # The device tells of damage a step late, when an average would have taken in what did not happen.
            check_on_device=config.on_damage == "stop" and config.ema is None,
        )
        step = self._make_step(rows)
        with self.guard, ExitStack() as stack:
            stack.enter_context(self.writer)
            if world.is_first:
                toml, run = to_toml(config, mask=True), self.directory.path
                self.log.trackers = make_trackers(config.track, run, first_step=self.step, config_toml=toml)
                stack.callback(self.log.close)
            self._make_up_for_validation()
            while self.step < self.total and not self.stopped_early:
                batches = batches_of(self.inputs.order, config.batch_size, first=self.step, end=self.total)
                mine = (self.damaged.replace(batch)[world.rank :: world.size] for batch in batches)
                rows.damage.zero_()
                ring = BatchRing(self.data, expert.action_space, mine, rows, in_memory=config.in_memory)
                try:
                    with ring:
                        self._train_on(ring, step)
                except (SampleReadError, UnreachableStoreError) as error:
                    self._meet_damage(error)
                del ring
                gc.collect()  # it, what its threads read and their error refer to each other: all RAM of --in-memory
        self.skipped.check_learned(config.out, self.step)
        return self._report()

    def _make_step(self, rows: PrefixRows) -> TrainStep:
        config, learner, plan = self.config, self.learner, self.plan
        staged = StagedBatch(
            rows, learner.expert, draws=plan.draws, at_once=plan.micro_batch, decoded_layers=plan.decoded_layers
        )
        return TrainStep(
            learner,
            staged,
            micro_batch=plan.micro_batch,
            clip=config.clip,
            causal=config.causal,
            capture=plan.captured,
            compile_layers=config.compile,
        )

    def _train_on(self, ring: BatchRing, step: TrainStep) -> None:
        """Train on the ring's batches, to the last or until it is time to stop."""
        # On a GPU a step is read when the next one is enqueued, so that the device never waits.
        lag = 0 if self.world.device.type == "cpu" else 1
        underway: deque[tuple[int, StepResult]] = deque()
        self.log.begin_ring()
        try:
            for batch in ring:
                underway.append((self.step + 1, self._enqueue(step, batch, stop=self.guard.requested)))
                ring.done(batch)
                if self.damaged.awaits:
                    self.damaged.delivered(self._batch(self.step))
                self.step += 1
                self.learner.count_step(self.step)
                # Several processes must all learn of a request to stop, by the step.
                self.stopping |= self.guard.requested and self.world.size == 1
                validating = self.validation is not None and self._is_due(self.config.val_every)
                pausing = validating or self._is_due(self.config.save_every)
                while len(underway) > (0 if pausing or self.stopping else lag):
                    ring.release_finished()
                    self._read(*underway.popleft(), ring, validating=validating and not underway)
                if pausing or self.stopping:
                    self._pause(validating=validating)
                if self.stopped_early:
                    return
        except (SampleReadError, UnreachableStoreError):
            while underway and underway[0][0] <= self.step:
                self._read(*underway.popleft(), ring, validating=False)
            raise

    def _batch(self, number: int) -> list[tuple[int, int]]:
        """(position, sample index) of each sample of the step after so many."""
        (batch,) = batches_of(self.inputs.order, self.config.batch_size, first=number, end=number + 1)
        return batch

    def _is_due(self, every: int) -> bool:
        """Tell whether it is time for what is done every so many steps and after the last one."""
        return self.step == self.total or self.step % every == 0

    def _enqueue(self, step: TrainStep, batch: Batch, *, stop: bool) -> StepResult:
        seed, draws, schedule = self.seed, self.plan.draws, self.config.times
        noise = torch.stack([randomness.noise(seed, place, draws=draws) for place in batch.positions])
        t = torch.stack([randomness.times(seed, place, draws=draws, schedule=schedule) for place in batch.positions])
        return step.run(batch, noise, t, self.rate(self.step), stop=stop)

    def _read(self, number: int, result: StepResult, ring: BatchRing, *, validating: bool) -> None:
        """Read what came of a step, validate if it is time, and write its row."""
        values = result.values()
        if values.damaged:
            self.step = number - 1
            error = ring.damage_error()
            if self.world.size > 1:  # all see it, and could not agree on whether it has passed
                raise DataError(str(error)) from error
            raise error
        self.stopping |= values.stop
        row = self.log.row(number, result, values, lr=self.rate(number - 1), waited_s=ring.waited_s)
        if self.skipped.count(values.loss, values.norm):
            batch = self.damaged.replace(self._batch(number - 1))
            ids = [self.data.sample_id(index) for _, index in batch]  # in all processes
            if self.world.size == 1:  # those of bad losses, if it was not the gradient
                pairs = zip(ids, values.losses, strict=True)
                ids = [sample_id for sample_id, loss in pairs if not math.isfinite(loss)] or ids
            row |= {"loss": None, "grad_norm": None, "skipped": ids}
            self.skipped.check_streak(number, row["skipped"])
        else:
            self.log.count_losses(result, values)
        if validating:
            row |= self._validate(row)
        self.log.write(row, self._notes())

    def _validate(self, row: dict[str, Any]) -> dict[str, Any]:
        """The part of a step's row that a validation adds: its numbers, and the training losses by turn.

        Empty where a request to stop cuts it short: whoever resumes the run makes up for it.
        """
        assert self.validation is not None
        self.learner.settle()
        try:
            validated = self._validated(self.validation)
        except (SampleReadError, UnreachableStoreError) as error:
            # Nothing stands in for it: all validations must be of the same samples.
            if "lr" in row:  # else it is written already
                self.log.write(row, self._notes())
            state = "Checkpoints are intact"
            if self.world.size == 1:  # several could not agree on it
                self._save(and_wait=True)
                state = f"Saved at step {self.step}"
            raise DataError(
                f"validation on {self.config.val} failed: {error}\n{state}. Mend it with `alpacache verify --deep "
                "--repair` and `alpacache extract`, or give another --val; then go on with --resume."
            ) from error
        self.cut_short = validated is None
        self.stopping |= self.cut_short
        if validated is None:
            return {}
        self.validated = validated
        self.log.warn_of_validation(row["step"], self.validated)
        by_turn = added(self.world.all_gather(self.log.turn_losses))
        self.log.turn_losses = {}
        trained = {f"train_loss/{turn}": losses.mean for turn, losses in by_turn.items()}
        return {**strict_json.plain(self.validated), "val_prefix": self.config.prefix, **trained}

    def _notes(self) -> dict[str, str]:
        """Notes for the progress line, besides the numbers of the step."""
        cuda, damaged = self.world.device.type == "cuda", len(self.damaged.indices)
        notes = {"GiB": f"{self.learner.peak_bytes() / 2**30:.1f}"} if cuda else {}
        return notes | ({"damaged": str(damaged)} if damaged else {})

    def _make_up_for_validation(self) -> None:
        """Validate the step that the run goes on from, if a request to stop had cut that short."""
        told = [row for row in self.directory.metrics.rows(up_to=self.step) if row["step"] == self.step]
        cut_short = any("lr" in row for row in told) and not any("val_loss" in row for row in told)
        due = self.validation is not None and self._is_due(self.config.val_every) and cut_short
        if self.world.all_gather(due)[0]:
            if numbers := self._validate({"step": self.step}):
                self.log.write_more({"step": self.step, **numbers})
            self._pause(validating=True)

    def _validated(self, validation: Validation) -> dict[str, float] | None:
        """What a validation finds, None where a request to stop cuts it short; it begins anew after an absence."""
        while True:
            try:
                return validation.run(self.learner.expert, self.world, lambda: self.guard.requested)
            except UnreachableStoreError as error:
                if self.world.size > 1:  # several processes could not agree on it
                    raise
                self.absence.wait(self.step, error, self.guard)
            gc.collect()  # the ring whose threads have failed

    def _pause(self, *, validating: bool) -> None:
        """After a step that was read: keep the best, save when it is time, stop if asked to."""
        finished, improved = self.step == self.total and not self.cut_short, False
        if validating and not self.cut_short:
            by = self.config.best_by
            improved = self.best.update(self.step, self.validated["val_loss" if by == "loss" else "val_min_ade"], by)
            self.stopped_early = self._has_lost_patience()
        ending = finished or self.stopping or self.stopped_early
        if finished or self.stopped_early:
            for error in self.damaged.settle():
                self.log.write_damage(self.step, error)
        if improved or ending or self.step % self.config.save_every == 0:
            self._save(and_wait=ending)
        self.log.pause()
        if self.stopping and not finished:
            raise InterruptedRunError(f"stopped on request at step {self.step}; saved. Run again with --resume.")

    def _has_lost_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.best.since >= patience and self.step < self.total

    def _leave_out_unreadable(self) -> None:
        """Leave out, or try again later, what could not be read when the run began; `on_damage` is `skip` if any."""
        for error in self.data.nameless:
            self.log.write_damage(self.step, error)
        for index, error in self.data.unreadable.items():  # how large it is is not known either
            if index not in self.damaged.indices:
                self.damaged.give_up(index)
                self.log.write_damage(self.step, error)
            if len(self.damaged.indices) * 2 > len(self.data):
                raise error
        for index, error in self.inputs.unreadable.items():
            if index not in self.damaged.indices:
                self._note(error, for_good=self.damaged.leave_out(error))

    def _meet_damage(self, error: SampleReadError | UnreachableStoreError) -> None:
        """Leave a sample out that cannot be read, wait for a store that is away, or save and raise the error."""
        try:
            if isinstance(error, UnreachableStoreError):
                if self.world.size > 1:  # several processes could not agree on it
                    raise error
                self.absence.wait(self.step, error, self.guard)
                return
            for_good = self.damaged.leave_out(error, until=(self.step + 1) * self.config.batch_size)
        except (SampleReadError, UnreachableStoreError):
            if self.step > self.first and self.world.size == 1:
                self._save(and_wait=True)  # several processes could not agree on it
            raise
        self._note(error, for_good=for_good)

    def _note(self, error: SampleReadError, *, for_good: bool | None) -> None:
        """Write what `DamagedSamples.leave_out` made of an error."""
        if for_good is not None:
            self.log.write_damage(self.step, error, for_good=for_good)

    @property
    def _kept(self) -> int:
        """Checkpoints to keep. One that follows a skipped step pushes no other out: it may hold what broke the step."""
        return sys.maxsize if self.skipped.in_a_row else self.config.keep

    def _save(self, *, and_wait: bool) -> None:
        """Write a checkpoint. `and_wait`: until it is on the medium, and the other processes know.

        Raises `NonFiniteError` for weights or moments that are not finite, before anything is written.
        """
        self.learner.settle()
        self.learner.update.complete(self.learner.optimizer.tensors())
        if bad := self.learner.not_finite():
            raise NonFiniteError(
                f"after step {self.step} of {self.config.out} these are not finite (NaN or infinity): {listed(bad)}. "
                "They are not saved, and checkpoints saved before are intact: go on with --resume. If it happens "
                "again, see to the GPU, or train with another --out and a lower --lr."
            )
        turn_losses = self.world.all_gather(self.log.turn_losses)
        if self.world.is_first:
            if self.world.device.type == "cuda":
                record = {"planned": dict(self.plan.table()), "measured_peak": self.learner.peak_bytes()}
                self.directory.write(MEMORY, strict_json.dumps(record, indent=1) + "\n")
            state = {
                "settings": self.settings,
                "free_settings": free_settings(asdict(self.config.with_absolute_places())),
                "metrics": self.directory.metrics.seal,
                "base": model_identity(self.inputs.checkpoint),
                "new_expert": None if self.inputs.new_expert is None else self.inputs.new_expert.to_json(),
                "vlm": self.data.vlm,
                "best": asdict(self.best),
                "trainable": self.config.trainable,
                "skipped": asdict(self.skipped),
                "turn_losses": turn_losses,
                **self.damaged.state(),
            }
            self.writer.save(self.step, self.learner.checkpoint(state), keep=self._kept, best=self.best.step)
        if and_wait:
            self.writer.wait()
            self.world.barrier()

    def _report(self) -> TrainReport:
        cuda = self.world.device.type == "cuda"
        return TrainReport(
            run=self.config.out,
            steps=self.step,
            samples=len({self.data.sample_id(index) for index in range(len(self.data))}),
            val_loss=self.validated.get("val_loss"),
            best_val_loss=self.best.value if self.best.by == "loss" else None,
            val_min_ade=self.validated.get("val_min_ade"),
            stopped_early=self.stopped_early,
            damaged=len(self.damaged.indices) + len(self.data.nameless),
            missed=len(self.damaged.passing),
            skipped=self.skipped.total,
            **self.log.totals(self.step),
            planned_gib=self.plan.device_bytes / 2**30 if cuda else None,
            peak_gib=self.learner.peak_bytes() / 2**30 if cuda else None,
            draws=self.plan.draws,
            chosen=self.chosen,
        )
