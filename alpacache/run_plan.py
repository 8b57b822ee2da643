"""Before a run's first step: every setting that was left open gets its value, and the memory that it takes is known."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.expert import action_space
from alpacache.alpamayo.geometry import EXPERT_PARTS
from alpacache.auto_draws import DELIVERED_BATCHES, choose_draws, delivery_seconds
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.order import GlobalOrder, make_groups
from alpacache.cached_samples.ring import BatchRing
from alpacache.config import TrainConfig, weighted_stores
from alpacache.distributed.world import World
from alpacache.driving.strata import TURNS, Turn
from alpacache.errors import UsageError
from alpacache.optimizers import resolve
from alpacache.planning.config import budget_gib
from alpacache.planning.machine import gpu_speed
from alpacache.planning.memory_model import allowed_bytes, fastest_plan
from alpacache.planning.workload import MemoryPlan, Workload
from cache_store import CorruptSampleError

_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def settle(
    config: TrainConfig, checkpoint: Checkpoint, data: CachedDataset, world: World, *, resumed: bool = False
) -> tuple[TrainConfig, MemoryPlan | None]:
    """The config with all settings known and, on a GPU, the memory they take. Caps the allocator at the budget.

    All processes get the same settings: those of the one with the least room. `resumed`: `config` is as a run has begun
    with. Raises `UsageError` where nothing fits.
    """
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

    def plan_for(
        draws: int, size: int | None = config.micro_batch, checkpointing: bool | None = config.checkpointing
    ) -> MemoryPlan:
        return fastest_plan(work, draws=draws, micro_batch=size, checkpointing=checkpointing, cap_bytes=cap)

    if config.draws == "auto":
        plan_for(1)  # raises where nothing fits
        measured = _auto_draws(config, data, checkpoint, device, work, plan_for) if world.is_first else None
        draws = world.from_first(measured)
    else:
        draws = config.draws
    try:
        plan = plan_for(draws)
    except UsageError as error:
        if resumed:
            raise _no_longer_fits(config, error, lambda: plan_for(draws, None, None)) from error
        raise
    sizes, recomputing = zip(*world.gathered((plan.micro_batch, plan.checkpointing)), strict=True)
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
    while True:
        batches = batches_of(order, batch_size, first=0, end=DELIVERED_BATCHES)
        sound = ([place for place in batch if data.sample_id(place[1]) not in damaged] for batch in batches)
        ring = BatchRing(data, space, (batch for batch in sound if batch), batch_size=batch_size, device=device)
        try:
            return delivery_seconds(ring)
        except CorruptSampleError as error:
            if config.on_damage == "stop" or not error.sample_id or error.sample_id in damaged:
                raise
            damaged.add(error.sample_id)


def global_order(config: TrainConfig, data: CachedDataset) -> GlobalOrder:
    """Which sample is at which place of the run."""
    return order_and_damage(config, data)[0]


def order_and_damage(config: TrainConfig, data: CachedDataset) -> tuple[GlobalOrder, dict[int, CorruptSampleError]]:
    """The order, and which samples were found damaged by it; these are at places of their own until left out."""
    weighted: list[tuple[range, float]] = []
    for indices, (store, weight) in zip(data.store_ranges, weighted_stores(config.stores), strict=True):
        if weight is not None and not indices:
            raise UsageError(f"store {store} has no committed sample for its share; leave it out.")
        if weight is not None:
            weighted.append((indices, weight))
    if not weighted and config.balance == "none":
        return GlobalOrder(config.seed, len(data)), {}
    turns, damaged = _turns(config, data) if config.balance == "curvature" else (None, {})
    # Without weights the stores are one pool: curvature counts, not where a sample lies.
    groups = make_groups(weighted or [(range(len(data)), 1.0)], turns)
    return GlobalOrder(config.seed, len(data), groups=groups), damaged


def _turns(config: TrainConfig, data: CachedDataset) -> tuple[list[Turn], dict[int, CorruptSampleError]]:
    """Each sample's stratum; a damaged one that the run is to leave out counts as of the first."""
    found = data.turns()
    damaged = {index: turn for index, turn in enumerate(found) if isinstance(turn, CorruptSampleError)}
    if damaged and (config.on_damage == "stop" or len(damaged) * 2 > len(data)):
        raise next(iter(damaged.values()))
    return [TURNS[0] if isinstance(turn, CorruptSampleError) else turn for turn in found], damaged


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
