"""Settles, before a run's first step, what the config left open: draws, micro-batch, checkpointing, and how many
layers' optimizer state stays on the GPU.

They decide how much memory a step takes and how fast it is, so they follow from the GPU's room and the stores' speed.
All processes of a run get the same.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.order import GlobalOrder
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.distributed.world import World
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.errors import DeviceMemoryError, UsageError
from alpacache.gpu.device import cap_memory
from alpacache.gpu.host_memory import available_bytes
from alpacache.planning.gpus import Gpu
from alpacache.planning.machine import bus_speed, gpu_speed
from alpacache.planning.memory_model import fastest_plan, memory_plan
from alpacache.planning.time_model import BUS_BYTES_S, step_seconds
from alpacache.planning.workload import MAX_DRAWS, MemoryPlan, Workload, told_pinned
from alpacache.torchrun import this_process
from alpacache.training.data_order import DamagedSamples, batches_of
from alpacache.training.run_directory import RunDirectory
from cache_store import SampleReadError

_TIMED_BATCHES = 5
"""Batches read to learn how fast they come; the first does not count."""
_TIME_LIMIT_S = 20.0
_CPU_BYTES = 16
"""Bytes of a parameter that a CPU trains: weight, gradient and two moments in float32."""
_GPU_BYTES = 4
"""Least bytes of a parameter that a GPU trains: weight and gradient in bfloat16; moments may lie in RAM."""


def settle(
    work: Workload,
    world: World,
    directory: RunDirectory,
    *,
    draws: int | Literal["auto"],
    micro_batch: int | None,
    checkpointing: bool | None,
    budget_bytes: int | None,
    batch_seconds: Callable[[], float],
) -> MemoryPlan:
    """Settle draws, micro-batch and checkpointing: as asked, else as a resumed run began, else as fits the least room.

    Open are draws `auto`, a `micro_batch` of None (as many samples as fit) and `checkpointing` of None (where only that
    fits). Where not everything fits as it is fastest, optimizer state of some layers is kept in RAM, if that is faster
    than the other ways to make it fit; the GPU and its bus are measured then. With several processes, each of which has
    a shard of it, it stays on the GPU. Draws and micro-batch change the result, so they are as the run in `directory`
    was begun with them; the micro-batch only on as many processes as it was planned for. A CPU's memory is not planned:
    one draw, whole batches, no checkpointing. Of draws `auto`, `batch_seconds` measures the seconds in which the stores
    deliver a batch.

    Raises `UsageError` where nothing fits.
    """
    resumed = directory.state(directory.steps[-1])["settings"] if directory.steps else None
    if resumed is not None:
        draws = int(resumed["draws"]) if draws == "auto" else draws
        if micro_batch is None and resumed["processes"] == world.size:
            micro_batch = resumed["micro_batch"]
    if world.device.type != "cuda":
        size = min(micro_batch or work.batch_size, work.batch_size)
        draws = 1 if draws == "auto" else draws
        return memory_plan(work, draws=draws, micro_batch=size, checkpointing=bool(checkpointing))
    plan_for = partial(fastest_plan, work, cap_bytes=cap_memory(budget_bytes, world.device))
    number = world.device.index or 0
    bus_bytes_s, gpu = BUS_BYTES_S, None
    if world.size == 1 and not _fits_whole(work, partial(plan_for, draws=1 if draws == "auto" else draws)):
        bus_bytes_s, gpu = bus_speed(number), gpu_speed(number)
        plan_for = partial(plan_for, gpu=gpu, bus_bytes_s=bus_bytes_s)
        torch.cuda.empty_cache()
    plan_asked = partial(plan_for, micro_batch=micro_batch, checkpointing=checkpointing)
    if draws == "auto":
        draws = plan_asked(draws=1).draws  # raises where nothing fits
        if world.is_first:
            draws = choose_draws(
                lambda draws: plan_asked(draws=draws),
                work,
                batch_s=batch_seconds(),
                gpu=gpu or gpu_speed(number),
                bus_bytes_s=bus_bytes_s,
            )
        draws = int(world.all_gather(draws)[0])
    try:
        plan = plan_asked(draws=draws)
    except UsageError as error:
        if resumed is None:
            raise
        raise _no_longer_fits(directory.path, error, partial(plan_for, draws=draws)) from error
    sizes, recomputing = zip(*world.all_gather((plan.micro_batch, plan.checkpointing)), strict=True)
    if len(set(sizes)) > 1 or len(set(recomputing)) > 1:  # GPUs have different room
        plan = plan_for(draws=draws, micro_batch=min(sizes), checkpointing=any(recomputing))
    locked, available = plan.pinned * this_process().local_world_size, available_bytes()
    if locked > available:
        raise UsageError(told_pinned(plan, locked, available, in_memory=work.pinned_bytes is not None))
    return plan


def check_room(parameters: int, width: int, *, device: torch.device, budget_bytes: int | None) -> None:
    """Raise `UsageError` where a new expert is larger than the memory that it would be trained in."""
    on_cpu = device.type == "cpu"
    needed = (_CPU_BYTES if on_cpu else _GPU_BYTES) * parameters
    available = available_bytes() if on_cpu else cap_memory(budget_bytes, device)
    if needed > available:
        raise UsageError(
            f"the new expert of width {width} has {parameters:,} parameters, whose training takes "
            f"{needed / 2**30:.1f} GiB or more of {'RAM' if on_cpu else 'GPU memory'}; {available / 2**30:.1f} GiB are "
            f"{'available' if on_cpu else 'allowed'}. Lower --expert-width or --expert-layers."
        )


def _fits_whole(work: Workload, plan_for: Callable[..., MemoryPlan]) -> bool:
    """Tell whether whole batches fit without checkpointing and with all optimizer state on the GPU."""
    try:
        plan_for(micro_batch=work.batch_size, checkpointing=False)
    except UsageError:
        return False
    return True


def _no_longer_fits(run: Path, error: UsageError, plan_for: Callable[..., MemoryPlan]) -> UsageError:
    """The error for a run whose own settings do not fit: a resumed run cannot lower most of these settings."""
    room = "free GPU memory, raise --memory-budget, or go on with a larger GPU"
    try:
        plan = plan_for(micro_batch=None, checkpointing=None)
        how = f"--micro-batch {plan.micro_batch}{' --checkpointing' * plan.checkpointing}"
        remedy = f"Pass {how} (sums are then rounded differently), or {room}."
    except UsageError:
        remedy = f"Its batch size, draws and trainable part must stay: {room}."
    table = str(error).rpartition("\n")[0]  # without the remedy for a run that has not begun
    return UsageError(f"{run} does not fit as it was begun: {table}\n{remedy}")


def out_of_memory(
    error: torch.OutOfMemoryError, plan: MemoryPlan, peak_bytes: int, *, resumable: bool
) -> DeviceMemoryError:
    """The error for a GPU whose memory did not suffice after all, with what to turn down."""
    # Gradients are made twice of whole batches alone; in parts all of them would have to be kept.
    part = "" if plan.backwards == 2 else f"--micro-batch {max(1, plan.micro_batch // 2)} "
    less = "" if part == "" and plan.checkpointing else f"{part}--checkpointing"
    again = f"Checkpoints are intact: go on with --resume {less or 'and a larger --memory-budget'}"
    anew = f"Try {less and less + ', '}a smaller --batch-size or --draws, or --trainable lora"
    return DeviceMemoryError(
        f"out of GPU memory with {peak_bytes / 2**30:.2f} GiB reserved ({plan.device_bytes / 2**30:.2f} GiB were "
        f"planned): {error}\n{again if resumable else anew}; other programs on this GPU take from it too."
    )


def choose_draws(
    plan_for: Callable[[int], MemoryPlan], work: Workload, *, batch_s: float, gpu: Gpu, bus_bytes_s: float = BUS_BYTES_S
) -> int:
    """The least number of draws whose step takes as long as the next batch, `batch_s`, or the most that fit.

    `plan_for` makes the plan for a number of draws; one draw fits, and it raises `UsageError` where more do not.
    """
    chosen = draws = 1
    while draws <= MAX_DRAWS:
        try:
            plan = plan_for(draws)
        except UsageError:
            break
        chosen = draws
        if step_seconds(work, plan, gpu, bus_bytes_s) >= batch_s:
            break
        draws *= 2
    return chosen


def batch_seconds(
    data: CachedDataset,
    space: UnicycleActionSpace,
    order: GlobalOrder,
    damaged: DamagedSamples,
    *,
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean seconds in which the stores deliver a batch, measured with the run's first ones and nothing to wait for."""
    rows = PrefixRows(data.layout, data.longest, batch_size=batch_size, device=device, tail_room=data.tail_room)
    while True:
        batches = map(damaged.replace, batches_of(order, batch_size, first=0, end=_TIMED_BATCHES))
        ends: list[float] = []
        try:
            with BatchRing(data, space, batches, rows) as ring:
                for batch in ring:
                    ring.done(batch)
                    ends.append(time.monotonic())
                    if ends[-1] - ends[0] > _TIME_LIMIT_S:
                        break
            return (ends[-1] - ends[0]) / max(1, len(ends) - 1)
        except SampleReadError as error:
            damaged.leave_out(error)
