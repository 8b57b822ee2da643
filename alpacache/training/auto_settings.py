"""Before a run's first step: every setting that was left open gets its value, and the memory that it takes is known."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.expert import action_space
from alpacache.alpamayo.geometry import EXPERT_PARTS
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.prefix_rows import PrefixRows
from alpacache.cached_samples.ring import BatchRing
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.planning.gpus import Gpu
from alpacache.planning.machine import gpu_speed
from alpacache.planning.memory_model import fastest_plan
from alpacache.planning.time_model import compute_seconds, optimizer_seconds
from alpacache.planning.workload import MAX_DRAWS, MemoryPlan, Workload
from alpacache.training.config import TrainConfig
from alpacache.training.data_order import batches_of, global_order
from alpacache.training.optimizers import resolve
from cache_store import CorruptSampleError

DELIVERED_BATCHES = 5
"""Read to learn how fast batches come; the first does not count."""
_DELIVERY_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoDraws:
    """The choice and why."""

    draws: int
    batch_s: float
    """Seconds in which the stores deliver a batch."""
    step_s: float
    """Estimated seconds of a step with these draws."""


def choose_draws(
    plan_for: Callable[[int], MemoryPlan | None], work: Workload, *, batch_s: float, gpu: Gpu
) -> AutoDraws:
    """The least number of draws that keeps the GPU busy, or the most that fit.

    Args:
        plan_for: draws -> plan, or None where they do not fit.
        batch_s: from `delivery_seconds`.
        gpu: what a step is to run on.
    """
    chosen: AutoDraws | None = None
    draws = 1
    while draws <= MAX_DRAWS and (plan := plan_for(draws)) is not None:
        step_s = compute_seconds(work, plan, gpu) + optimizer_seconds(work, gpu)
        chosen = AutoDraws(draws=draws, batch_s=batch_s, step_s=step_s)
        if chosen.step_s >= batch_s:
            break
        draws *= 2
    if chosen is None:
        raise ValueError("not even one draw fits; plan for one draw first, which says what to change.")
    return chosen


def delivery_seconds(ring: BatchRing) -> float:
    """Seconds a batch of a ring over a few batches that nobody works on."""
    started, count = 0.0, -1
    with ring:
        for batch in ring:
            ring.done(batch)
            count += 1
            if count == 0:
                started = time.monotonic()
            elif time.monotonic() - started > _DELIVERY_LIMIT_S:
                break
        elapsed = time.monotonic() - started
    return elapsed / count if count > 0 else 0.0


_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def settle(
    config: TrainConfig, checkpoint: Checkpoint, data: CachedDataset, world: World, *, resumed: bool = False
) -> tuple[TrainConfig, MemoryPlan | None]:
    """The config with all settings known and, on a GPU, the memory they take. Caps the allocator at the budget.

    All processes get the same settings: those of the one with the least room. `resumed`: `config` is as a run has begun
    with. Raises `UsageError` where nothing fits.
    """
    device, batch_size = world.device, world.local_batch_size(config.batch_size)
    optimizer = resolve(config.optimizer, device)
    if device.type != "cuda":
        draws = 1 if config.draws == "auto" else config.draws
        micro_batch = min(config.micro_batch or batch_size, batch_size)
        return replace(config, draws=draws, micro_batch=micro_batch, checkpointing=bool(config.checkpointing)), None
    cap = cap_memory(config.budget_bytes, device)
    work = Workload.of(
        checkpoint.shapes(*EXPERT_PARTS),
        data.layout,
        data.longest,
        trainable=config.trainable,
        lora_rank=config.lora_rank,
        batch_size=batch_size,
        optimizer=optimizer,
        compiled=config.compile,
        validates=config.val is not None,
        pinned_bytes=int(data.kv_bytes.sum()) if config.in_memory else None,
    )

    def plan_for(
        draws: int, size: int | None = config.micro_batch, checkpointing: bool | None = config.checkpointing
    ) -> MemoryPlan:
        return fastest_plan(work, draws=draws, micro_batch=size, checkpointing=checkpointing, cap_bytes=cap)

    if config.draws == "auto":
        plan_for(1)  # raises where nothing fits
        measured = _auto_draws(config, data, checkpoint, device, work, plan_for) if world.is_first else None
        draws = world.broadcast(measured)
    else:
        draws = config.draws
    try:
        plan = plan_for(draws)
    except UsageError as error:
        if resumed:
            raise _no_longer_fits(config, error, lambda: plan_for(draws, None, None)) from error
        raise
    sizes, recomputing = zip(*world.all_gather((plan.micro_batch, plan.checkpointing)), strict=True)
    if len(set(sizes)) > 1 or len(set(recomputing)) > 1:  # other GPUs have other room
        plan = plan_for(draws, min(sizes), any(recomputing))
    return replace(config, draws=draws, micro_batch=plan.micro_batch, checkpointing=plan.checkpointing), plan


def _no_longer_fits(config: TrainConfig, error: UsageError, plan_what_fits: Callable[[], MemoryPlan]) -> UsageError:
    """What to do where a run's own settings do not fit: most of those that the plan would lower must stay."""
    room = "free GPU memory, raise --memory-budget, or go on with a larger GPU"
    try:
        plan = plan_what_fits()
        how = f"--micro-batch {plan.micro_batch}{' --checkpointing' * plan.checkpointing}"
        remedy = f"Pass {how} (sums are then rounded differently), or {room}."
    except UsageError:
        remedy = f"Its batch size, draws and trainable part must stay: {room}."
    table = str(error).rpartition("\n")[0]  # without what a run that has not begun could change
    return UsageError(f"{config.out} does not fit as it was begun: {table}\n{remedy}")


def _auto_draws(
    config: TrainConfig,
    data: CachedDataset,
    checkpoint: Checkpoint,
    device: torch.device,
    work: Workload,
    plan_for: Callable[[int], MemoryPlan],
) -> int:
    """Measured with the run's own first batches; samples that stay in memory are no reason to wait."""

    def plan_or_none(draws: int) -> MemoryPlan | None:
        try:
            return plan_for(draws)
        except UsageError:
            return None

    batch_s = 0.0 if config.in_memory else _delivery_seconds(config, data, checkpoint, device, work.batch_size)
    return choose_draws(plan_or_none, work, batch_s=batch_s, gpu=gpu_speed(device.index or 0)).draws


def _delivery_seconds(
    config: TrainConfig, data: CachedDataset, checkpoint: Checkpoint, device: torch.device, batch_size: int
) -> float:
    """Of the first batches; without damaged samples, where the run is to leave them out."""
    order, space, damaged = global_order(config, data), action_space(checkpoint), set[str]()
    rows = PrefixRows(data.layout, data.longest, batch_size=batch_size, device=device)
    while True:
        batches = batches_of(order, batch_size, first=0, end=DELIVERED_BATCHES)
        sound = ([place for place in batch if data.sample_id(place[1]) not in damaged] for batch in batches)
        ring = BatchRing(data, space, (batch for batch in sound if batch), rows)
        try:
            return delivery_seconds(ring)
        except CorruptSampleError as error:
            if config.on_damage == "stop" or not error.sample_id or error.sample_id in damaged:
                raise
            damaged.add(error.sample_id)


def cap_memory(budget_bytes: int | None, device: torch.device, *, beside_bytes: int = 0) -> int:
    """Hold the allocator to a budget and return what it may take: no more than is free, all of it without a budget.

    `beside_bytes`: part of the budget that is taken already, and not by the allocator.
    """
    if not any(os.environ.get(name) for name in _ALLOCATOR_SETTINGS):
        # Pages that any tensor may use next: 1 GiB less is reserved at full size (measured).
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    if budget_bytes is None:
        return free
    cap = budget_bytes - beside_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device.index or 0)
    return min(cap, free)
