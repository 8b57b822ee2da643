"""Cost of both stages before either is begun: tokens, bytes, hours, memory. From a model's sizes alone.

Neither weights nor a GPU are needed. Bytes come from the store's own code and memory from `train`'s own plan. Hours are
scaled from one measured GPU (`time_model`) and from the disk's speed, so they are estimates and say so.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from alpacache.alpamayo import Checkpoint, PrefixLayout
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.families import RELEASED as DEFAULT_RELEASED
from alpacache.alpamayo.families import released
from alpacache.alpamayo.family import Geometry
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.new_expert import new_shapes, plan_expert
from alpacache.alpamayo.recognition import recognise_family
from alpacache.alpamayo.rollout import MAX_TOKENS
from alpacache.cached_samples.features import tail_name
from alpacache.cached_samples.identity import codec_for
from alpacache.driving.cameras import check_places, sort_cameras
from alpacache.driving.splits import parse_split
from alpacache.errors import UsageError
from alpacache.gpu.host_memory import available_bytes
from alpacache.layer_choice import chosen_layers, layers_to_run
from alpacache.planning import time_model
from alpacache.planning.config import PlanConfig, ReleasedFamily, Trainable, allowed_bytes, budget_bytes, codec_names
from alpacache.planning.gpus import GPUS, MEASURED, Gpu, gpu_named
from alpacache.planning.machine import bus_speed, disk_speed, existing_folder, gpu_speed
from alpacache.planning.memory_model import fastest_plan, memory_plan
from alpacache.planning.prefill_plan import (
    PATCH_VALUES,
    PrefillPlan,
    PrefillWork,
    WeightsHome,
    choose_plan,
)
from alpacache.planning.sample_count import count_samples
from alpacache.planning.sample_size import PlannedPrompt, longest_tail, planned_prompt, sample_bytes
from alpacache.planning.workload import BF16_BYTES, MemoryPlan, Workload, expert_sizes, state_bytes, told_pinned
from alpacache.prefix.layout import TailRoom
from cache_store import codec_named
from cache_store.storage.local_files import free_bytes

_USUAL_ROUTE = "turn left onto Main Street in 40 m"
"""Counted for routes that a source gives."""
READ_BYTES_S, WRITE_BYTES_S = 1.5e9, 1.0e9
"""Speed assumed of a disk that was not measured: cold reads of an NVMe drive, and writes until they are durable
(measured: 1.4 to 1.8 and 0.7 to 2.1 GB/s, `benchmarks/results/`)."""
_TAIL_SHARE = {"direct": 0.0, "mix": 0.5, "rollouts": 1.0}
"""Share of the samples that a training on these prefixes reads a tail of."""
_UNTOLD = (
    "The checkpoint does not tell whether its prompt names cameras and numbers frames: counted is the longer one, with "
    "both. `extract` asks which it is."
)
_OWN_EXPERT = (
    "The expert of {model} attends to every layer, and the store would have some alone: counted is its training as if "
    "it could. `train` takes a new expert there; add --from-scratch."
)
_SMALL = "transform:2.2"
"""Codec that is named beside those of `--codec` where bytes decide."""
_AMPLE = 2**50
"""Host memory of a machine that is not probed."""
CORES = 16
"""CPU cores beside the GPU that was measured; assumed unless this machine is probed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that times are for."""

    gpu: Gpu
    gpu_is: Literal["measured", "scaled", "probed"]
    """Source of the times: this very GPU, its data sheet, or a short probe."""
    read_bytes_s: float
    write_bytes_s: float
    cores: int
    disk_is: Literal["assumed", "probed"]
    """Source of the disk's speed and the number of cores."""
    bus_bytes_s: float
    """Between RAM and the GPU, each way, both at once; assumed unless the GPU is probed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractPlan:
    """Stage one; its parts overlap. Loading the VLM is not counted."""

    weights_bytes: int
    """The VLM on the GPU, beside which an activation or two must fit."""
    prefill_s: float
    """Seconds of the VLM for a sample."""
    reading_s: float
    """Seconds in which the CPU's cores together decode and resize a sample."""
    write_s: float
    """Seconds until a sample is durable."""
    bus_s: float
    """Seconds a sample in which weights from RAM or files arrive, beside the VLM; 0 where they stay on the GPU."""
    hours: float | None
    """Without those in which reasoning rollouts are generated; None where stage one does not fit."""
    memory: PrefillPlan | None
    """Place of the weights and memory taken; None where nothing fits, which `notes` say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """Stage two. Validation, checkpoints and compilation are not counted."""

    steps: int
    compute_s: float
    """Forward and backward of a step."""
    optimizer_s: float
    bus_s: float
    """Seconds in which optimizer state from RAM comes and goes, mostly beside the forward; 0 where all of it stays."""
    step_s: float
    """Seconds of a step on the GPU."""
    copy_s: float
    """Seconds in which a batch crosses the bus, beside the step before it."""
    read_s: float
    """Seconds in which the disk delivers a batch. A step takes as long as the longest of GPU, bus and disk."""
    hours: float
    """Hours if every sample is read from disk every time."""
    hours_in_memory: float
    """Hours if samples stay in RAM after the first epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """The same training with the VLM in every step, on a GPU that holds both models: what the cache saves.

    Counted in its favour: the expert's step costs what alpacache's does, and recordings are decoded beside it.
    """

    memory_bytes: int
    """GPU memory: the VLM's weights beside the training's own."""
    hours: float
    """For all epochs; nothing is written or read but the recordings."""
    cached_hours: float | None
    """Both stages, every sample read from disk every time; None, as all below, where stage one does not fit."""
    cached_memory_bytes: int | None
    """GPU memory of both stages, one after the other."""
    break_even_epochs: float | None
    """Epochs after which both stages took no longer; None where the disk delivers samples no faster than the VLM."""
    break_even_in_memory: float | None
    """The same if samples stay in RAM after the first epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Cost of both stages; sizes in bytes."""

    model: str
    cameras: tuple[str, ...]
    blank: tuple[str, ...]
    """The `cameras` that a black picture stands in for."""
    frames: int
    codec: str
    samples: int
    """Samples in the store: clips times t0s times views."""
    clips: int | None
    """Clips that they are of, where a source was counted."""
    views: int
    rollouts: int
    """Reasoning rollouts per sample; their bytes are an upper bound."""
    tokens: int
    """Length of a prefix."""
    tokens_an_image: int
    images: int
    bytes_by_field: Mapping[str, int]
    """Size of a sample, as `info` counts it."""
    bytes_by_codec: Mapping[str, int]
    """Size of a sample with all its fields."""
    kv_bytes_by_codec: Mapping[str, int]
    store_bytes: int
    free_bytes: int | None
    """Room at `--store`."""
    machine: Machine
    extract: ExtractPlan
    train: TrainPlan
    loop: LoopPlan
    memory: MemoryPlan
    memory_bytes: int
    """Bytes that the allocator will have reserved at its peak."""
    cap_bytes: int
    checkpoint_bytes: int
    """Size of a checkpoint of the run: what is trained, and the optimizer's state. A run keeps several (`--keep`)."""
    notes: tuple[str, ...]
    """Assumptions behind the numbers, and what does not fit."""


def plan(config: PlanConfig) -> Plan:
    """Work everything out. Raises `UsageError` for what cannot be: a bad option, or training that does not fit."""
    cameras = sort_cameras([*config.cameras, *config.blank])
    counted = count_samples(
        config.source,
        cameras=config.cameras,
        split=config.split,
        split_by=parse_split(config.split_by),
        clips=config.clips,
        t0=config.t0,
        most=config.samples,
    )
    rollouts, samples = config.tails, counted.samples * config.views
    model = _planned_model(
        config.model,
        config.family,
        recorded=config.cameras,
        blank=config.blank,
        frames=config.frames,
        picture=config.picture,
        route=config.route,
        layers=config.layers,
        new_expert=config.expert_choices if config.from_scratch else None,
    )
    geometry, prompt, layers = model.geometry, model.prompt, model.layers
    machine = _machine(gpu_named(config.gpu), probed_folder=(config.store or ".") if config.probe else None)
    parts: dict[str, Any] = {"hidden_states": config.hidden_states == "last", "rollouts": rollouts, "layers": layers}
    sizes = {
        name: sample_bytes(geometry, prompt, codec=codec_for(name, layers), **parts)
        for name in dict.fromkeys([*codec_names(), config.codec])
    }
    chosen, one_bytes = sizes[config.codec], sum(sizes[config.codec].values())
    store_bytes = samples * one_bytes
    free = None if config.store is None else free_bytes(existing_folder(config.store))
    budget = () if config.memory_budget is None else (budget_bytes(config.memory_budget),)
    cap = min((allowed_bytes(machine.gpu.memory_gb), *budget))
    kv_bytes = chosen["kv"] + _TAIL_SHARE[config.prefix] * chosen.get(f"{tail_name(0)}kv", 0)
    room = None if config.prefix == "direct" else TailRoom(stored=prompt.tokens, tail=longest_tail(prompt))
    training = config.trainable, config.lora_rank, config.codec, config.batch_size
    work = _workload(geometry, prompt.tokens, *training, room)
    work = replace(work, layout=replace(work.layout, layers=model.attended))
    memory = fastest_plan(
        work,
        draws=config.draws,
        micro_batch=None,
        checkpointing=None,
        cap_bytes=cap,
        gpu=machine.gpu,
        bus_bytes_s=machine.bus_bytes_s,
    )
    run_layers = layers_to_run(layers, whole=config.hidden_states == "last" or rollouts > 0)
    host_bytes = available_bytes() if config.probe else None
    prefill, refusal = _prefill_plan(
        geometry,
        prompt,
        stored_bytes=sum(size for name, size in chosen.items() if name.endswith("kv") or name == "hidden"),
        samples=samples,
        run_layers=run_layers,
        rollouts=rollouts,
        cap_bytes=cap,
        host_bytes=host_bytes,
    )
    extract = _extract_plan(
        geometry,
        prompt,
        prefill,
        machine,
        config.picture,
        run_layers=run_layers,
        recorded=len(cameras) - len(set(config.blank)),
        samples=samples,
        one_bytes=one_bytes,
    )
    train = _train_plan(samples, config.epochs, work, memory, machine, kv_bytes=kv_bytes)
    return Plan(
        model=geometry.model,
        cameras=cameras,
        blank=tuple(name for name in cameras if name in config.blank),
        frames=config.frames,
        codec=config.codec,
        samples=samples,
        clips=counted.clips,
        views=config.views,
        rollouts=rollouts,
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
        train=train,
        loop=_loop_plan(extract, train, memory, samples=samples, epochs=config.epochs, batch_size=config.batch_size),
        memory=memory,
        memory_bytes=memory.device_bytes,
        cap_bytes=cap,
        checkpoint_bytes=work.trained * BF16_BYTES + state_bytes(work.optimizer, work.trained),
        notes=(
            *counted.notes,
            *_misfits(store_bytes, free, refusal, memory, host_bytes, store=config.store),
            *_bus_note(train, sizes, config.codec),
            *_basis(machine, own_model=geometry.model != DEFAULT_RELEASED.geometry.model, rollouts=config.tails),
            *([_UNTOLD] if model.is_unclear else []),
            *([_OWN_EXPERT.format(model=geometry.model)] if layers is not None and not config.from_scratch else []),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlannedModel:
    """The model that is planned for, and what it is shown."""

    geometry: Geometry
    """With a new expert in it, where one is to be trained."""
    prompt: PlannedPrompt
    is_unclear: bool
    """True where nothing says which prompt the checkpoint was trained with: then the longer one counts."""
    layers: tuple[int, ...] | None
    """The VLM's layers that are stored; None: all."""
    attended: int
    """Number of layers that the expert attends to."""


def _planned_model(
    name: str | None,
    family_name: str | None,
    *,
    recorded: Sequence[str],
    blank: Sequence[str],
    frames: int,
    picture: tuple[int, int],
    route: str,
    layers: str | None,
    new_expert: Mapping[str, Any] | None,
) -> _PlannedModel:
    """Settle the model: a checkpoint by its name, or else the released one of a family.

    `recorded` cameras are shown with `blank` ones; `new_expert` has the sizes of one that takes the place of the
    model's. Raises `UsageError` for what does not go together.
    """
    family, sizes_of = released(family_name)
    builder, is_unclear, geometry = None, False, sizes_of.geometry
    if name is not None:
        if family_name is not None:
            raise UsageError(f"family {family_name} is for plans without a model; leave --family or --model out.")
        checkpoint = Checkpoint(name)
        is_unclear = recognise_family(checkpoint).family is None
        text = True if is_unclear else None
        builder = InputBuilder(checkpoint, camera_names=text, frame_numbers=text, routes=route)
        geometry = geometry_of(checkpoint)
    if not (family.prompt if builder is None else builder.format).camera_names:
        check_places(recorded, blank)
    written = {"none": None, "source": _USUAL_ROUTE}.get(route, route)
    cameras = sort_cameras([*recorded, *blank])
    prompt = planned_prompt(builder, cameras, frames=frames, picture=picture, route=written, family=family_name)
    stored = None if layers is None else chosen_layers(layers, geometry.layers)
    held = tuple(range(geometry.layers)) if stored is None else stored
    attended = len(held)
    if new_expert is not None:
        geometry, attended = _with_new_expert(geometry, new_expert, held)
    return _PlannedModel(geometry=geometry, prompt=prompt, is_unclear=is_unclear, layers=stored, attended=attended)


def _with_new_expert(geometry: Geometry, choices: Mapping[str, Any], held: Sequence[int]) -> tuple[Geometry, int]:
    """The geometry with a new expert in it, and how many of the VLM's layers that attends to."""
    sizes: dict[str, Any] = {"kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim}
    spec = plan_expert(geometry.expert_shapes, **sizes, **choices, held=held, seed=0)
    shapes = new_shapes(geometry.expert_shapes, spec, **sizes)
    return replace(geometry, expert_shapes=shapes), len(set(spec.layer_map))


def _prefill_plan(
    geometry: Geometry,
    prompt: PlannedPrompt,
    *,
    stored_bytes: int,
    samples: int,
    run_layers: int | None,
    rollouts: int,
    cap_bytes: int,
    host_bytes: int | None,
) -> tuple[PrefillPlan | None, str]:
    """Memory of stage one as `extract` would plan it, or why it has none. Without `host_bytes` RAM is enough."""
    images = len(prompt.cameras) * prompt.frames * prompt.tokens_an_image
    work = PrefillWork(
        geometry=geometry,
        tokens=prompt.tokens + sum(prompt.twins.values()),
        image_tokens=images,
        stored_bytes=stored_bytes,
        pixel_bytes=images * geometry.vlm.merged * PATCH_VALUES * BF16_BYTES,
        rows=time_model.prefill_batch(cameras=len(prompt.cameras), frames=prompt.frames),
        ahead=CORES,
        samples=samples,
        run_layers=run_layers,
        rollouts=rollouts > 0,
    )
    try:
        return choose_plan(work, device_bytes=cap_bytes, host_bytes=_AMPLE if host_bytes is None else host_bytes), ""
    except UsageError as error:
        return None, str(error)


def _extract_plan(
    geometry: Geometry,
    prompt: PlannedPrompt,
    prefill: PrefillPlan | None,
    machine: Machine,
    picture: tuple[int, int],
    *,
    run_layers: int | None,
    recorded: int,
    samples: int,
    one_bytes: int,
) -> ExtractPlan:
    cameras = len(prompt.cameras)
    rows = time_model.prefill_batch(cameras=cameras, frames=prompt.frames) if prefill is None else prefill.rows
    bus_s = 0.0
    if prefill is not None and prefill.home != "gpu":
        rate = machine.bus_bytes_s if prefill.home == "ram" else machine.read_bytes_s
        bus_s = prefill.streamed_bytes / rate / prefill.group
    parameters = geometry.parameters_run(run_layers)
    seconds = {
        "prefill_s": time_model.prefill_seconds(parameters, rows * prompt.tokens, machine.gpu) / rows,
        "reading_s": time_model.reading_seconds(recorded, picture, machine.cores),
        "write_s": one_bytes / machine.write_bytes_s,
        "bus_s": bus_s,
    }
    hours = None if prefill is None else samples * max(seconds.values()) / 3600
    weights_bytes = geometry.vlm_parameters * BF16_BYTES
    return ExtractPlan(weights_bytes=weights_bytes, **seconds, hours=hours, memory=prefill)


def stage_one(
    device_bytes: int,
    host_bytes: int,
    family: ReleasedFamily | None = None,
    card: Gpu | None = None,
    *,
    read_bytes_s: float = READ_BYTES_S,
) -> tuple[WeightsHome | None, float | None]:
    """Place of the released model's weights in stage one (one front camera, int8), and hours for 1,000 samples.

    The place is None where nothing fits, and so are the hours then or without a card of known rates. `read_bytes_s`:
    the rate of the disk that weights in files come from.
    """
    found, geometry = plan(PlanConfig(samples=1000, codec="int8", family=family)), released(family)[1].geometry
    picture = PlanConfig(samples=1).picture
    prompt = planned_prompt(None, found.cameras, frames=found.frames, picture=picture, family=family)
    stored = found.kv_bytes_by_codec["int8"] + found.bytes_by_field["hidden"]
    memory, _ = _prefill_plan(
        geometry,
        prompt,
        stored_bytes=stored,
        samples=found.samples,
        run_layers=None,
        rollouts=0,
        cap_bytes=device_bytes,
        host_bytes=host_bytes,
    )
    if memory is None or card is None:
        return None if memory is None else memory.home, None
    extract = _extract_plan(
        geometry,
        prompt,
        memory,
        replace(_machine(card, probed_folder=None), read_bytes_s=read_bytes_s),
        picture,
        run_layers=None,
        recorded=len(found.cameras),
        samples=found.samples,
        one_bytes=stored,
    )
    return memory.home, extract.hours


def least_training_bytes(trainable: Trainable, family: ReleasedFamily | None = None) -> int:
    """GPU memory of the smallest useful training of the released model: one front camera, int8, one sample a step."""
    ask = PlanConfig(samples=1)
    prompt = planned_prompt(None, ask.cameras, frames=ask.frames, picture=ask.picture, family=family)
    work = _workload(released(family)[1].geometry, prompt.tokens, trainable, ask.lora_rank, "int8", batch_size=1)
    least = partial(memory_plan, work, draws=1, micro_batch=1, checkpointing=True)
    if trainable == "all":
        least = partial(least, streamed_layers=work.layers, backwards=2)
    return least().device_bytes


def _workload(
    geometry: Geometry,
    tokens: int,
    trainable: Trainable,
    lora_rank: int,
    codec: str,
    batch_size: int,
    tail_room: TailRoom | None = None,
) -> Workload:
    """Training as `train` would plan for it on a GPU: adamw8, compiled, with a validation store."""
    layers, heads, head_dim = geometry.layers, geometry.kv_heads, geometry.head_dim
    return Workload(
        **expert_sizes(geometry.expert_shapes, trainable, lora_rank),
        layout=PrefixLayout(layers=layers, kv_heads=heads, head_dim=head_dim, codec=codec_named(codec)),
        longest=tokens if tail_room is None else tail_room.longest,
        tail_room=tail_room,
        batch_size=batch_size,
        trainable=trainable,
        optimizer="adamw8",
        compiled=True,
        captured=True,
        validates=True,
    )


def _machine(gpu: Gpu, *, probed_folder: str | None) -> Machine:
    """A GPU of the table and assumed speeds, or with a folder this machine, measured there."""
    gpu_is: Literal["measured", "scaled", "probed"] = "measured" if gpu is GPUS[MEASURED] else "scaled"
    if probed_folder is None:
        speeds = {"read_bytes_s": READ_BYTES_S, "write_bytes_s": WRITE_BYTES_S}
        return Machine(gpu=gpu, gpu_is=gpu_is, **speeds, cores=CORES, disk_is="assumed", bus_bytes_s=gpu.bus_gb_s * 1e9)
    try:
        disk = disk_speed(probed_folder)
    except OSError as error:
        raise UsageError(f"cannot write at {probed_folder} ({error}); give --store a place for it.") from error
    bus_bytes_s = gpu.bus_gb_s * 1e9
    if torch.cuda.is_available():
        gpu, gpu_is, bus_bytes_s = gpu_speed(), "probed", bus_speed()
    speeds = {"read_bytes_s": disk.read_bytes_s, "write_bytes_s": disk.write_bytes_s}
    cores = len(os.sched_getaffinity(0))
    return Machine(gpu=gpu, gpu_is=gpu_is, **speeds, cores=cores, disk_is="probed", bus_bytes_s=bus_bytes_s)


def _train_plan(
    samples: int, epochs: float, work: Workload, memory: MemoryPlan, machine: Machine, *, kv_bytes: float
) -> TrainPlan:
    steps = math.ceil(epochs * samples / work.batch_size)
    first_epoch = min(steps, samples / work.batch_size)
    compute_s = time_model.compute_seconds(work, memory, machine.gpu)
    optimizer_s = time_model.optimizer_seconds(work, machine.gpu)
    busy_s = time_model.step_seconds(work, memory, machine.gpu, machine.bus_bytes_s)
    bus_s, read_s = (
        time_model.bus_seconds(memory, machine.bus_bytes_s),
        work.batch_size * kv_bytes / machine.read_bytes_s,
    )
    copy_s = work.batch_size * kv_bytes / machine.bus_bytes_s
    in_memory_s = max(busy_s, copy_s + bus_s)  # moments from RAM come over the same bus
    step_s = max(in_memory_s, read_s)
    hours, later_s = steps * step_s / 3600, (steps - first_epoch) * in_memory_s
    seconds = {"compute_s": compute_s, "optimizer_s": optimizer_s, "bus_s": bus_s, "step_s": busy_s, "read_s": read_s}
    return TrainPlan(
        steps=steps,
        **seconds,
        copy_s=copy_s,
        hours=hours,
        hours_in_memory=(first_epoch * step_s + later_s) / 3600,
    )


def _loop_plan(
    extract: ExtractPlan, train: TrainPlan, memory: MemoryPlan, *, samples: int, epochs: float, batch_size: int
) -> LoopPlan:
    looped_s = max(extract.prefill_s + train.step_s / batch_size, extract.reading_s)
    in_memory_s = max(train.step_s, train.copy_s + train.bus_s)
    cached_s = max(in_memory_s, train.read_s) / batch_size
    alone = LoopPlan(
        memory_bytes=extract.weights_bytes + memory.device_bytes,
        hours=epochs * samples * looped_s / 3600,
        cached_hours=None,
        cached_memory_bytes=None,
        break_even_epochs=None,
        break_even_in_memory=None,
    )
    if extract.hours is None or extract.memory is None:
        return alone
    saved_hours = samples * (looped_s - cached_s) / 3600
    from_disk = extract.hours / saved_hours if saved_hours > 0 else None
    later_s = in_memory_s / batch_size  # always below the loop's, which runs the VLM besides
    in_memory = (extract.hours * 3600 / samples + cached_s - later_s) / (looped_s - later_s)
    return replace(
        alone,
        cached_hours=extract.hours + train.hours,
        cached_memory_bytes=max(extract.memory.device_bytes, memory.device_bytes),
        break_even_epochs=from_disk,
        break_even_in_memory=in_memory if from_disk is None or from_disk > 1 else from_disk,
    )


def _misfits(
    store_bytes: int, free: int | None, refusal: str, memory: MemoryPlan, host_bytes: int | None, *, store: str | None
) -> Iterator[str]:
    """Say what does not fit on the disk, on the GPU or in RAM, and what to do."""
    if free is not None and store_bytes > free:
        yield (
            f"The store does not fit: {store_bytes / 1e9:.1f} GB against {free / 1e9:.1f} free at {store}. "
            "Take a smaller --codec, --hidden-states none, fewer --samples, or another disk."
        )
    if refusal:
        yield f"Stage one does not fit: {refusal}"
    if host_bytes is not None and memory.pinned > host_bytes:
        yield f"Stage two does not fit: {told_pinned(memory, memory.pinned, host_bytes)}"


def _bus_note(train: TrainPlan, sizes: Mapping[str, Mapping[str, int]], codec: str) -> Iterator[str]:
    """Say where the bus is what samples in RAM wait for, and what fewer bytes would do."""
    over_bus_s = train.copy_s + train.bus_s
    if over_bus_s <= train.step_s:
        return
    shares = {name: fields["kv"] / sizes[codec]["kv"] for name, fields in sizes.items()}
    small, shape = codec_named(_SMALL), (1, 2, 1, 1024, 128)
    assert small is not None
    shares[_SMALL] = small.expected_bytes(shape) / (2 * math.prod(shape)) * sizes["bf16"]["kv"] / sizes[codec]["kv"]
    smaller = sorted((share, name) for name, share in shares.items() if share < 0.99)
    less = ", ".join(f"{name} {(train.copy_s * share + train.bus_s) * 1e3:.0f} ms" for share, name in reversed(smaller))
    yield (
        f"From RAM the bus decides: {over_bus_s * 1e3:.0f} ms a step, the GPU takes {train.step_s * 1e3:.0f}. Fewer "
        f"bytes take as much less: {less or 'no codec has fewer'}. `alpacache codecs` tells what each does to the "
        "expert."
    )


def _basis(machine: Machine, *, own_model: bool, rollouts: int) -> Iterator[str]:
    """Say what the numbers rest on."""
    if machine.gpu_is == "measured":
        yield ("Times follow from steps and prefills that were measured on one H100 80GB.")
    else:
        scaled = "a probe" if machine.gpu_is == "probed" else "the rates of data sheets"
        yield (f"Times are estimates: measured on one H100 80GB only, scaled to {machine.gpu.name} by {scaled}.")
    if own_model:
        yield ("Times were measured with the released sizes; for this model they are scaled by its parameters.")
    if machine.disk_is == "assumed":
        yield (
            f"The disk is assumed: reads {READ_BYTES_S / 1e9:.1f} GB/s, durable writes {WRITE_BYTES_S / 1e9:.1f} GB/s. "
            "--probe measures it."
        )
        yield (f"Recordings are taken to be H.264, decoded by {CORES} CPU cores; --probe counts this machine's.")
    if rollouts:
        yield (
            f"Reasoning rollouts are counted at their longest, {MAX_TOKENS} tokens of text each: their bytes are an "
            "upper bound. The time to generate them, a step of the VLM a token, is not counted."
        )
    yield ("Not counted: loading and compiling, encoding KV, validation, checkpoints.")
