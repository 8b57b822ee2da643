"""Before a run's first step: every setting that was left open gets its value, and the memory that it takes is known."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.expert import action_space
from alpacache.alpamayo.geometry import EXPERT_PARTS
from alpacache.auto_draws import DELIVERED_BATCHES, choose_draws, delivery_seconds
from alpacache.batches import BatchRing
from alpacache.cached_dataset import CachedDataset
from alpacache.config import TrainConfig, budget_gib, weighted_stores
from alpacache.errors import UsageError
from alpacache.machine_speed import gpu_speed
from alpacache.memory_plan import MemoryPlan, Workload, allowed_bytes, fastest_plan
from alpacache.optimizers import resolve
from alpacache.run_directory import RunDirectory
from alpacache.sample_order import GlobalOrder, make_groups
from alpacache.world import World

_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def as_begun(config: TrainConfig, directory: RunDirectory) -> TrainConfig:
    """What was left to the plan when the run began, and changes what a step computes, stays as it was planned then."""
    if not directory.steps:
        return config
    before = directory.state(directory.steps[-1])["settings"]
    open_ones = {
        name: before[name]
        for name in ("draws", "micro_batch")
        if getattr(config, name) in (None, "auto") and name in before
    }
    return replace(config, **open_ones)


def settle(
    config: TrainConfig, checkpoint: Checkpoint, data: CachedDataset, world: World
) -> tuple[TrainConfig, MemoryPlan | None]:
    """The config with all settings known and, on a GPU, the memory they take. Caps the allocator at the budget."""
    device, batch_size = world.device, world.share(config.batch_size)
    optimizer = resolve(config.optimizer, device)
    if device.type != "cuda":
        draws = 1 if config.draws == "auto" else config.draws
        micro_batch = config.micro_batch or batch_size
        return replace(config, draws=draws, micro_batch=micro_batch, checkpointing=bool(config.checkpointing)), None
    cap = cap_memory(config.memory_budget, device)
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

    def plan_for(draws: int) -> MemoryPlan:
        return fastest_plan(
            work, draws=draws, micro_batch=config.micro_batch, checkpointing=config.checkpointing, cap_bytes=cap
        )

    if config.draws == "auto":
        plan_for(1)  # raises where nothing fits
        measured = _auto_draws(config, data, checkpoint, device, work, plan_for) if world.is_first else None
        draws = world.from_first(measured)
    else:
        draws = config.draws
    plan = plan_for(draws)
    return replace(config, draws=draws, micro_batch=plan.micro_batch, checkpointing=plan.checkpointing), plan


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

    batch_s = 0.0
    if not config.in_memory:
        order = global_order(config, data)
        places = batches_of(order, work.batch_size, first=0, end=DELIVERED_BATCHES)
        space = action_space(checkpoint)
        batch_s = delivery_seconds(BatchRing(data, space, places, batch_size=work.batch_size, device=device))
    return choose_draws(plan_or_none, work, batch_s=batch_s, gpu=gpu_speed(device.index or 0)).draws


def global_order(config: TrainConfig, data: CachedDataset) -> GlobalOrder:
    """Which sample is at which place of the run."""
    weighted: list[tuple[range, float]] = []
    for indices, (store, weight) in zip(data.store_ranges, weighted_stores(config.stores), strict=True):
        if weight is not None and not indices:
            raise UsageError(f"store {store} has no committed sample for its share; leave it out.")
        if weight is not None:
            weighted.append((indices, weight))
    if not weighted and config.balance == "none":
        return GlobalOrder(config.seed, len(data))
    turns = data.turns() if config.balance == "curvature" else None
    # Without weights the stores are one pool: curvature counts, not where a sample lies.
    groups = make_groups(weighted or [(range(len(data)), 1.0)], turns)
    return GlobalOrder(config.seed, len(data), groups=groups)


def batches_of(order: GlobalOrder, batch_size: int, *, first: int, end: int) -> Iterator[list[tuple[int, int]]]:
    """(position, sample index) of each batch from step `first` on."""
    for step in range(first, end):
        yield [(position, order[position]) for position in range(step * batch_size, (step + 1) * batch_size)]


def cap_memory(budget: str | None, device: torch.device, *, beside_bytes: int = 0) -> int:
    """Bytes that the allocator may take: half a GiB less than a card of this size has, and no more than is free.

    `24GB` is 23.5 GiB, others likewise; without a budget it is what is free. The allocator is held to it.
    `beside_bytes`: of the budget, taken already and not by the allocator.
    """
    if not any(os.environ.get(name) for name in _ALLOCATOR_SETTINGS):
        # Pages that any tensor may use next: 1 GiB less is reserved at full size (measured).
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    if budget is None:
        return free
    cap = allowed_bytes(budget_gib(budget)) - beside_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device.index or 0)
    return min(cap, free)
