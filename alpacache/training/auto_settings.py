"""Settles, before a run's first step, what the config left open: draws, micro-batch, checkpointing.

They decide how much memory a step takes and how fast it is, so they follow from the GPU's room and the stores' speed.
All processes of a run get the same.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.order import GlobalOrder
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.distributed.world import World
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.errors import DeviceMemoryError, UsageError
from alpacache.planning.gpus import Gpu
from alpacache.planning.machine import gpu_speed
from alpacache.planning.memory_model import fastest_plan
from alpacache.planning.time_model import compute_seconds, optimizer_seconds
from alpacache.planning.workload import MAX_DRAWS, MemoryPlan, Workload
from alpacache.training.data_order import batches_of
from alpacache.training.run_directory import RunDirectory
from cache_store import CorruptSampleError

_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_TIMED_BATCHES = 5
"""Batches read to learn how fast they come; the first does not count."""
_TIME_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How a step is computed, as the config has it."""

    draws: int | Literal["auto"]
    micro_batch: int | None
    """None: as many samples as fit."""
    checkpointing: bool | None
    """None: where it is what fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettledStep:
    """How a step is computed."""

    draws: int
    micro_batch: int
    checkpointing: bool
    plan: MemoryPlan | None
    """GPU memory that it takes; None on a CPU."""


def restore_auto_settings(asked: StepSettings, directory: RunDirectory, world: World) -> StepSettings:
    """Settings in which those left open, and which change the result, are as a run was begun with them.

    A micro-batch is restored only on as many processes as it was planned for.
    """
    if not directory.steps:
        return asked
    before = directory.state(directory.steps[-1])["settings"]
    draws = before["draws"] if asked.draws == "auto" else asked.draws
    micro_batch = asked.micro_batch
    if micro_batch is None and before["processes"] == world.size:
        micro_batch = before["micro_batch"]
    return replace(asked, draws=draws, micro_batch=micro_batch)


def settle_on_cpu(asked: StepSettings, batch_size: int) -> SettledStep:
    """Settings for a CPU, whose memory is not planned: one draw, whole batches, no checkpointing unless asked."""
    return SettledStep(
        draws=1 if asked.draws == "auto" else asked.draws,
        micro_batch=min(asked.micro_batch or batch_size, batch_size),
        checkpointing=bool(asked.checkpointing),
        plan=None,
    )


def settle_on_gpu(
    asked: StepSettings,
    work: Workload,
    world: World,
    *,
    cap_bytes: int,
    batch_seconds: Callable[[], float],
    resumed_run: str | None,
) -> SettledStep:
    """Settings for the GPUs of all processes: those of the process with the least room.

    Raises `UsageError` where nothing fits.

    Args:
        asked: settings of the config, restored where a run goes on.
        work: a process's part of the run.
        world: the processes.
        cap_bytes: from `cap_memory`.
        batch_seconds: measures the seconds in which the stores deliver a batch; called for draws `auto` alone.
        resumed_run: directory of a run that goes on: what to change is then limited.
    """

    def plan_for(draws: int, micro_batch: int | None, checkpointing: bool | None) -> MemoryPlan:
        return fastest_plan(
            work, draws=draws, micro_batch=micro_batch, checkpointing=checkpointing, cap_bytes=cap_bytes
        )

    def plan_asked(draws: int) -> MemoryPlan:
        return plan_for(draws, asked.micro_batch, asked.checkpointing)

    draws = asked.draws
    if draws == "auto":
        plan_asked(1)  # raises where nothing fits
        chosen: int | None = None
        if world.is_first:
            gpu = gpu_speed(world.device.index or 0)
            chosen = choose_draws(plan_asked, work, batch_s=batch_seconds(), gpu=gpu)
        draws = world.broadcast(chosen)
    try:
        plan = plan_asked(draws)
    except UsageError as error:
        if resumed_run is None:
            raise
        raise _no_longer_fits(resumed_run, error, lambda: plan_for(draws, None, None)) from error
    sizes, recomputing = zip(*world.all_gather((plan.micro_batch, plan.checkpointing)), strict=True)
    if len(set(sizes)) > 1 or len(set(recomputing)) > 1:  # GPUs have different room
        plan = plan_for(draws, min(sizes), any(recomputing))
    return SettledStep(draws=draws, micro_batch=plan.micro_batch, checkpointing=plan.checkpointing, plan=plan)


def _no_longer_fits(run: str, error: UsageError, plan_what_fits: Callable[[], MemoryPlan]) -> UsageError:
    """The error for a run whose own settings do not fit: most of those that the plan would lower must stay."""
    room = "free GPU memory, raise --memory-budget, or go on with a larger GPU"
    try:
        plan = plan_what_fits()
        how = f"--micro-batch {plan.micro_batch}{' --checkpointing' * plan.checkpointing}"
        remedy = f"Pass {how} (sums are then rounded differently), or {room}."
    except UsageError:
        remedy = f"Its batch size, draws and trainable part must stay: {room}."
    table = str(error).rpartition("\n")[0]  # without the remedy for a run that has not begun
    return UsageError(f"{run} does not fit as it was begun: {table}\n{remedy}")


def out_of_memory(
    error: torch.OutOfMemoryError, settled: SettledStep, peak_bytes: int, *, resumable: bool
) -> DeviceMemoryError:
    """The error for a GPU whose memory did not suffice after all, with what to turn down."""
    planned = "" if settled.plan is None else f" ({settled.plan.device_bytes / 2**30:.2f} GiB were planned)"
    less = f"--micro-batch {max(1, settled.micro_batch // 2)} --checkpointing"
    again = f"Checkpoints are intact: go on with --resume {less}"
    anew = f"Try {less}, a smaller --batch-size or --draws, or --trainable lora"
    return DeviceMemoryError(
        f"out of GPU memory with {peak_bytes / 2**30:.2f} GiB reserved{planned}: {error}\n"
        f"{again if resumable else anew}; other programs on this GPU take from it too."
    )


def choose_draws(plan_for: Callable[[int], MemoryPlan], work: Workload, *, batch_s: float, gpu: Gpu) -> int:
    """The least number of draws whose step takes as long as the next batch, or the most that fit.

    Args:
        plan_for: makes the plan for a number of draws; one draw fits, `UsageError` where more do not.
        work: a process's part of the run.
        batch_s: seconds in which the stores deliver a batch.
        gpu: the GPU that a step runs on.
    """
    chosen = draws = 1
    while draws <= MAX_DRAWS:
        try:
            plan = plan_for(draws)
        except UsageError:
            break
        chosen = draws
        if compute_seconds(work, plan, gpu) + optimizer_seconds(work, gpu) >= batch_s:
            break
        draws *= 2
    return chosen


def batch_seconds(
    data: CachedDataset,
    space: UnicycleActionSpace,
    order: GlobalOrder,
    *,
    batch_size: int,
    device: torch.device,
    skip_damaged: bool,
) -> float:
    """Seconds in which the stores deliver a batch, measured with the run's first ones and nothing to wait for."""
    damaged: set[str] = set()
    rows = PrefixRows(data.layout, data.longest, batch_size=batch_size, device=device)
    while True:
        batches = batches_of(order, batch_size, first=0, end=_TIMED_BATCHES)
        sound = ([place for place in batch if data.sample_id(place[1]) not in damaged] for batch in batches)
        ring = BatchRing(data, space, (batch for batch in sound if batch), rows)
        try:
            return _time(ring)
        except CorruptSampleError as error:
            if not skip_damaged or not error.sample_id or error.sample_id in damaged:
                raise
            damaged.add(error.sample_id)


def _time(ring: BatchRing) -> float:
    """Mean seconds a batch, without the first."""
    started, count = 0.0, -1
    with ring:
        for batch in ring:
            ring.done(batch)
            count += 1
            if count == 0:
                started = time.monotonic()
            elif time.monotonic() - started > _TIME_LIMIT_S:
                break
        elapsed = time.monotonic() - started
    return elapsed / count if count > 0 else 0.0


def cap_memory(budget_bytes: int | None, device: torch.device, *, beside_bytes: int = 0) -> int:
    """Hold the allocator to a budget and return what it may take: no more than is free, all of it without a budget.

    `beside_bytes`: part of the budget that is taken already, and not by the allocator.
    """
    if not any(os.environ.get(name) for name in _ALLOCATOR_SETTINGS):
        # Lets any tensor reuse any freed page: 1 GiB less is reserved at full size (measured on an H100).
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    if budget_bytes is None:
        return free
    cap = budget_bytes - beside_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device.index or 0)
    return min(cap, free)
