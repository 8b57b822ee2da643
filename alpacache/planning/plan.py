"""What both stages will take, before either is begun: tokens, bytes, hours, memory. From a model's sizes alone.

Neither weights nor a GPU are needed. Bytes are those of the store's own code; the memory is `train`'s own plan; hours
are scaled from one measured GPU (`stage_times`) and from the disk's speed, so they are estimates and say so.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from alpacache.alpamayo import Checkpoint, PrefixLayout
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.families import RELEASED
from alpacache.alpamayo.geometry import Geometry
from alpacache.alpamayo.rollout import MAX_TOKENS
from alpacache.driving.sample import sort_cameras
from alpacache.errors import UsageError
from alpacache.planning.config import PlanConfig, Trainable, budget_gib
from alpacache.planning.machine import (
    GPUS,
    MEASURED,
    Gpu,
    disk_speed,
    existing_folder,
    gpu_named,
    gpu_speed,
)
from alpacache.planning.memory_model import allowed_bytes, fastest_plan, memory_plan
from alpacache.planning.sample_size import planned_prompt, sample_bytes
from alpacache.planning.time_model import (
    compute_seconds,
    optimizer_seconds,
    prefill_batch,
    prefill_seconds,
    reading_seconds,
)
from alpacache.planning.workload import MemoryPlan, Workload
from cache_store import CODECS, CodecName
from cache_store.storage.local_files import free_bytes

READ_BYTES_S, WRITE_BYTES_S = 1.5e9, 1.0e9
"""Assumed of a disk that was not measured: cold reads of an NVMe drive, and writes until they are durable (measured:
1.4 to 1.8 and 0.7 to 2.1 GB/s, `benchmarks/results/`)."""
CORES = 16
"""Of the CPU beside the GPU that was measured; assumed unless this machine is probed."""
_BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What times are for."""

    gpu: Gpu
    gpu_is: Literal["measured", "scaled", "probed"]
    """Where times come from: this very GPU, its data sheet, or a short probe."""
    read_bytes_s: float
    write_bytes_s: float
    cores: int
    """Of the CPU."""
    disk_is: Literal["assumed", "probed"]
    """And the number of cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractPlan:
    """Stage one; its parts overlap. Loading the VLM is not counted."""

    weights_bytes: int
    """Of the VLM on the GPU, beside which an activation or two must fit."""
    prefill_s: float
    """A sample."""
    reading_s: float
    """A sample, decoded and resized by the CPU's cores together."""
    write_s: float
    """A sample, durable."""
    hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """Stage two. Validation, checkpoints and compilation are not counted."""

    steps: int
    compute_s: float
    """Forward and backward of a step."""
    optimizer_s: float
    read_s: float
    """In which the disk delivers a batch; a step takes what is longer."""
    hours: float
    """Every sample read from disk every time."""
    hours_in_memory: float
    """Samples stay in RAM after the first epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found; sizes in bytes."""

    model: str
    cameras: tuple[str, ...]
    frames: int
    codec: str
    samples: int
    """In the store: clips times t0s times views."""
    views: int
    rollouts: int
    """A sample; their bytes are an upper bound."""
    tokens: int
    """Of a prefix."""
    tokens_an_image: int
    images: int
    bytes_by_field: Mapping[str, int]
    """Of a sample, as `info` counts them."""
    bytes_by_codec: Mapping[str, int]
    """Of a sample with all its fields."""
    kv_bytes_by_codec: Mapping[str, int]
    store_bytes: int
    free_bytes: int | None
    """At `--store`."""
    machine: Machine
    extract: ExtractPlan
    train: TrainPlan
    memory: MemoryPlan
    memory_bytes: int
    """That the allocator will have reserved at its peak."""
    cap_bytes: int
    notes: tuple[str, ...]
    """What the numbers rest on, and what does not fit."""


def plan(config: PlanConfig) -> Plan:
    """Work everything out. Raises `UsageError` for what cannot be: a bad option, or training that does not fit."""
    cameras = sort_cameras(config.cameras)
    checkpoint = None if config.model is None else Checkpoint(config.model)
    prompt = planned_prompt(checkpoint, cameras, frames=config.frames, picture=config.picture)
    geometry = RELEASED.geometry if checkpoint is None else geometry_of(checkpoint)
    machine, hidden_states = _machine(config), config.hidden_states == "last"
    sizes = {
        name: sample_bytes(geometry, prompt, codec=CODECS.get(name), hidden_states=hidden_states, rollouts=config.tails)
        for name in get_args(CodecName)
    }
    chosen = sizes[config.codec]
    store_bytes = config.stored * sum(chosen.values())
    free = None if config.store is None else free_bytes(existing_folder(config.store))
    cap = _cap_bytes(config, machine.gpu)
    work = _workload(config, geometry, prompt.tokens)
    memory = fastest_plan(work, draws=config.draws, micro_batch=None, checkpointing=None, cap_bytes=cap)
    extract = _extract_plan(config, geometry, machine, prompt.tokens, sum(chosen.values()))
    return Plan(
        model=geometry.model,
        cameras=cameras,
        frames=config.frames,
        codec=config.codec,
        samples=config.stored,
        views=config.views,
        rollouts=config.tails,
        tokens=prompt.tokens,
        tokens_an_image=prompt.tokens_an_image,
        images=len(cameras) * config.frames,
        bytes_by_field=chosen,
        bytes_by_codec={codec: sum(by_field.values()) for codec, by_field in sizes.items()},
        kv_bytes_by_codec={codec: by_field["kv"] for codec, by_field in sizes.items()},
        store_bytes=store_bytes,
        free_bytes=free,
        machine=machine,
        extract=extract,
        train=_train_plan(config, work, memory, machine, chosen),
        memory=memory,
        memory_bytes=memory.device_bytes,
        cap_bytes=cap,
        notes=tuple(_notes(config, geometry, machine, extract, store_bytes, free)),
    )


def least_training_bytes(trainable: Trainable) -> int:
    """GPU memory of the smallest useful training of the released model: one front camera, int8, one sample a step."""
    config = PlanConfig(samples=1, codec="int8", batch_size=1, trainable=trainable)
    prompt = planned_prompt(None, config.cameras, frames=config.frames, picture=config.picture)
    work = _workload(config, RELEASED.geometry, prompt.tokens)
    return memory_plan(work, draws=1, micro_batch=1, checkpointing=True).device_bytes


def _workload(config: PlanConfig, geometry: Geometry, tokens: int) -> Workload:
    """As `train` plans for: compiled, with a validation store."""
    layout = PrefixLayout(
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        codec=CODECS.get(config.codec),
    )
    return Workload.of(
        geometry.expert_shapes,
        layout,
        tokens,
        trainable=config.trainable,
        lora_rank=config.lora_rank,
        batch_size=config.batch_size,
        optimizer="adamw8",
        compiled=True,
        validates=True,
    )


def _cap_bytes(config: PlanConfig, gpu: Gpu) -> int:
    """What `train --memory-budget` allows the allocator on this GPU."""
    size = gpu.memory_gb if config.memory_budget is None else min(gpu.memory_gb, budget_gib(config.memory_budget))
    return allowed_bytes(size)


def _machine(config: PlanConfig) -> Machine:
    named = gpu_named(config.gpu)
    machine = Machine(
        gpu=named,
        gpu_is="measured" if named is GPUS[MEASURED] else "scaled",
        read_bytes_s=READ_BYTES_S,
        write_bytes_s=WRITE_BYTES_S,
        cores=CORES,
        disk_is="assumed",
    )
    if not config.probe:
        return machine
    try:
        disk = disk_speed(config.store or ".")
    except OSError as error:
        raise UsageError(f"cannot write at {config.store or '.'} ({error}); give --store a place for it.") from error
    gpu, gpu_is = machine.gpu, machine.gpu_is
    if torch.cuda.is_available():
        gpu, gpu_is = gpu_speed(), "probed"
    return Machine(
        gpu=gpu,
        gpu_is=gpu_is,
        read_bytes_s=disk.read_bytes_s,
        write_bytes_s=disk.write_bytes_s,
        cores=len(os.sched_getaffinity(0)),
        disk_is="probed",
    )


def _extract_plan(
    config: PlanConfig, geometry: Geometry, machine: Machine, tokens: int, size_bytes: int
) -> ExtractPlan:
    at_once = prefill_batch(cameras=len(config.cameras), frames=config.frames)
    prefill_s = prefill_seconds(geometry.vlm_parameters, at_once * tokens, machine.gpu) / at_once
    reading_s = reading_seconds(len(config.cameras), config.picture, machine.cores)
    write_s = size_bytes / machine.write_bytes_s
    return ExtractPlan(
        weights_bytes=geometry.vlm_parameters * _BF16_BYTES,
        prefill_s=prefill_s,
        reading_s=reading_s,
        write_s=write_s,
        hours=config.stored * max(prefill_s, reading_s, write_s) / 3600,
    )


def _train_plan(
    config: PlanConfig, work: Workload, memory: MemoryPlan, machine: Machine, sizes: Mapping[str, int]
) -> TrainPlan:
    steps = math.ceil(config.epochs * config.stored / config.batch_size)
    first_epoch = min(steps, config.stored / config.batch_size)
    compute_s, optimizer_s = compute_seconds(work, memory, machine.gpu), optimizer_seconds(work, machine.gpu)
    busy_s = compute_s + optimizer_s
    read_s = config.batch_size * sizes["kv"] / machine.read_bytes_s
    step_s = max(busy_s, read_s)
    return TrainPlan(
        steps=steps,
        compute_s=compute_s,
        optimizer_s=optimizer_s,
        read_s=read_s,
        hours=steps * step_s / 3600,
        hours_in_memory=(first_epoch * step_s + (steps - first_epoch) * busy_s) / 3600,
    )


def _notes(
    config: PlanConfig,
    geometry: Geometry,
    machine: Machine,
    extract: ExtractPlan,
    store_bytes: int,
    free: int | None,
) -> list[str]:
    gpu, notes = machine.gpu, []
    if free is not None and store_bytes > free:
        notes.append(
            f"The store does not fit: {store_bytes / 1e9:.1f} GB against {free / 1e9:.1f} free at {config.store}. "
            "Take a smaller --codec, --hidden-states none, fewer --samples, or another disk."
        )
    if extract.weights_bytes > _cap_bytes(config, gpu):
        notes.append(
            f"Stage one does not fit: the VLM's weights alone take {extract.weights_bytes / 2**30:.1f} GiB. Extract on "
            "a larger GPU and copy the store."
        )
    if machine.gpu_is == "measured":
        notes.append("Times follow from steps and prefills that were measured on one H100 80GB.")
    else:
        scaled = "a probe" if machine.gpu_is == "probed" else "the rates of data sheets"
        notes.append(f"Times are estimates: measured on one H100 80GB only, scaled to {gpu.name} by {scaled}.")
    if geometry is not RELEASED.geometry:
        notes.append("Times were measured with the released sizes; for this model they are scaled by its parameters.")
    if machine.disk_is == "assumed":
        notes.append(
            f"The disk is assumed: reads {READ_BYTES_S / 1e9:.1f} GB/s, durable writes {WRITE_BYTES_S / 1e9:.1f} GB/s. "
            "--probe measures it."
        )
        notes.append(f"Recordings are taken to be H.264, decoded by {CORES} CPU cores; --probe counts this machine's.")
    if config.tails:
        notes.append(
            f"Reasoning rollouts are counted at their longest, {MAX_TOKENS} tokens of text each: their bytes are an "
            "upper bound. The time to generate them, a step of the VLM a token, is not counted."
        )
    notes.append("Not counted: loading and compiling, encoding KV, validation, checkpoints.")
    return notes
