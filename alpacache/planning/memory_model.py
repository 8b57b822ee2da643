"""GPU memory that a training run takes, worked out before its first step, and the settings that make it fit.

The peak is at the end of the backward or of the last forward. Gradients appear as activations go, so the two share
memory, unless an earlier micro-batch has left gradients already, or a captured step keeps them until the next one. With
two backwards a step, activations stay for the second one, and gradients of a layer or two are there at a time.
The size of activations was measured on an H100 (`benchmarks/results/`); everything else is counted.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from alpacache.cached_samples.ring import samples_ahead
from alpacache.driving.sample import FUTURE_STEPS
from alpacache.errors import UsageError
from alpacache.planning.gpus import GPUS, MEASURED, Gpu
from alpacache.planning.time_model import step_seconds
from alpacache.planning.workload import BF16_BYTES, STATE_PLACES, VAL_BATCH, MemoryPlan, Workload, halved, state_bytes
from alpacache.prefix.layout import LEAST_DECODED

_SAVED = {("all", False): (44, 8), ("all", True): (21, 6), ("lora", False): (30, 8), ("lora", True): (19, 6)}
"""(what is trained, whether layers are compiled) -> bytes that a layer keeps of a token for the backward, as multiples
of the hidden and the intermediate size (measured; `head` is like `all`)."""
_WORKSPACE_BYTES = 112 * 2**20
"""cuBLAS workspaces of three streams, and small tensors (measured)."""
_GAPS = 0.02
"""Share of what a step allocates that is lost to pages nothing fills (measured)."""
_HOLES = 0.25
"""Share of the activations that lies too scattered for gradients to reuse (measured: a tenth to a half)."""
_LAYERS_AT_ONCE = 2
"""Layers whose gradients are there at a time where none is kept."""
_MARGIN = 0.03
"""Share of the cap that is left free where a slower choice does not need it: the plan is no more accurate than this."""
_TIGHT_MARGIN, _WORTH = 0.01, 0.9
"""Share that is left free where state is streamed, so that nearly all memory is counted, or where else gradients would
have to be made twice, if a step then takes at most `_WORTH` of the time."""
_ROOM, _MOST_MORE = 0.06, 1 / 7
"""Layers kept decoded beyond the least leave `_ROOM` of the cap free and take at most `_MOST_MORE` of everything else,
unless the codec is heavy. They make a step some 3 % shorter, and a run that needs little of a card should stay so."""


def memory_plan(
    work: Workload,
    *,
    draws: int,
    micro_batch: int,
    checkpointing: bool,
    streamed_layers: int = 0,
    backwards: int = 1,
    captured: bool | None = None,
) -> MemoryPlan:
    """Compute the memory these settings need; `captured` None: as the workload allows."""
    captured = work.captured if captured is None else captured
    row, tokens = _row_bytes(work), micro_batch * draws * FUTURE_STEPS
    wide, inner = _SAVED["lora" if work.trainable == "lora" else "all", work.compiled]
    layer = tokens * (wide * work.hidden + inner * work.intermediate)
    # With checkpointing every layer's input in float32, and one layer in full.
    activations = 4 * tokens * work.hidden * work.layers + layer if checkpointing else layer * work.layers
    gradients, moments = work.trained * BF16_BYTES, state_bytes(work.optimizer, work.trained)
    if backwards == 2:
        gradients = gradients * min(_LAYERS_AT_ONCE, work.layers) // work.layers
    share, largest = streamed_layers / work.layers, min(work.trained // work.layers, work.hidden * work.intermediate)
    kept = round(gradients * share) if captured and backwards == 1 else 0
    both = peak = gradients - kept + activations
    if micro_batch == work.batch_size and backwards == 1:
        peak = max(activations, gradients - kept + round(_HOLES * activations))
    peak = min(peak, both)
    # The widest moment of a layer's backward: gradients of gate, up and their product, and of the residual stream.
    widest = tokens * (3 * BF16_BYTES * work.intermediate + 8 * work.hidden)
    adapters = work.trained if work.trainable == "lora" else 0
    streamed = round(moments * share)
    return MemoryPlan(
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        draws=draws,
        decoded_layers=LEAST_DECODED,
        streamed_layers=streamed_layers,
        backwards=backwards,
        captured=captured,
        weights=(work.parameters + adapters) * BF16_BYTES,
        gradients=gradients,
        moments=moments - streamed,
        arriving=min(streamed, STATE_PLACES * state_bytes(work.optimizer, largest)),
        streamed=streamed,
        prefixes=2 * work.batch_size * row + _arriving_bytes(work),
        decoding=LEAST_DECODED * _decoded_bytes(work, micro_batch) + _beside_decoded(work, micro_batch),
        activations=activations,
        shared=both - peak,
        validation=_validation_bytes(work, row) if work.validates else 0,
        # A gradient that is kept lies twice while it is moved.
        workspace=_WORKSPACE_BYTES + widest + round(_GAPS * peak) + (largest * BF16_BYTES if kept else 0),
        pinned=_pinned_bytes(work) + streamed,
    )


def fastest_plan(
    work: Workload,
    *,
    draws: int,
    micro_batch: int | None,
    checkpointing: bool | None,
    cap_bytes: int,
    gpu: Gpu = GPUS[MEASURED],
    bus_bytes_s: float | None = None,
    backwards: int | None = None,
) -> MemoryPlan:
    """Choose the fastest of the settings that fit; what is not None stays.

    `bus_bytes_s`: rate each way between RAM and the GPU, over which the optimizer's state of as many layers comes and
    goes as there is no room for; None: all of it stays on the GPU, and a step makes one backward. Raises `UsageError`
    where nothing fits, with what the smallest settings take and what to change.
    """
    asked = partial(_choices, draws=draws, streams=bus_bytes_s is not None, backwards=backwards)
    choices = asked(work, micro_batch, checkpointing)

    def seconds(plan: MemoryPlan) -> float:
        return step_seconds(work, plan, gpu, bus_bytes_s or 0.0)

    def fastest(share: float) -> MemoryPlan | None:
        # Of one choice the plan that streams least.
        plans = (next((plan for plan in some if plan.device_bytes <= share * cap_bytes), None) for some in choices)
        return min((plan for plan in plans if plan is not None), key=seconds, default=None)

    plan, tight = fastest(1 - _MARGIN), fastest(1 - _TIGHT_MARGIN)
    if tight is not None and (plan is None or seconds(tight) < _WORTH * seconds(plan)):
        dear = plan is not None and plan.backwards == 2 and tight.backwards == 1
        plan = tight if tight.streamed_layers or dear else plan
    if plan := plan or fastest(1.0):
        return with_room_used(work, plan, cap_bytes=cap_bytes)
    least = _least(choices)
    lines = "\n  ".join(f"{size / 2**30:7.2f} GiB  {name}" for name, size in least.device_table())
    open_ones = " and ".join(
        ["--micro-batch"] * (micro_batch is not None) + ["--no-checkpointing"] * (checkpointing is False)
    )
    if open_ones and _least(asked(work, None, checkpointing or None)).device_bytes <= cap_bytes:
        remedy = f"Leave {open_ones} out, or raise --memory-budget."
    else:
        remedy = _remedy(work, partial(asked, micro_batch=micro_batch, checkpointing=checkpointing), cap_bytes)
    raise UsageError(
        f"training would take {least.device_bytes / 2**30:.2f} GiB of GPU memory at the least ({least.settings}, "
        f"{draws} draws); {cap_bytes / 2**30:.2f} GiB are allowed:\n  {lines}\n{remedy}"
    )


def _choices(
    work: Workload,
    micro_batch: int | None,
    checkpointing: bool | None,
    *,
    draws: int,
    streams: bool,
    backwards: int | None,
) -> list[list[MemoryPlan]]:
    """Plans to choose from: of each choice those that stream more and more layers' state, or none alone."""
    sizes = halved(work.batch_size) if micro_batch is None else [min(micro_batch, work.batch_size)]
    streams = streams and work.trainable != "head"  # the head is in no layer
    counts = range(work.layers + 1 if streams else 1)
    # With all state on the GPU a captured step is always the faster one.
    ways = [(counts, 1, work.captured)]
    if streams and work.captured:
        ways.append((counts[1:], 1, False))
    if streams:
        ways.append((counts, 2, work.captured))
    return [
        [
            memory_plan(
                work,
                draws=draws,
                micro_batch=size,
                checkpointing=choice,
                streamed_layers=count,
                backwards=times,
                captured=captured,
            )
            for count in some
        ]
        for size in sizes
        for choice in ([False, True] if checkpointing is None else [checkpointing])
        for some, times, captured in ways
        if times == 1 or size == work.batch_size  # the norm is that of the whole batch's gradient
        if backwards in (None, times)
    ]


def _least(choices: list[list[MemoryPlan]]) -> MemoryPlan:
    return min((plan for some in choices for plan in some), key=lambda plan: plan.device_bytes)


def with_room_used(work: Workload, plan: MemoryPlan, *, cap_bytes: int) -> MemoryPlan:
    """Keep as many layers decoded as there is room for."""
    each = _decoded_bytes(work, plan.micro_batch)
    if each == 0:
        return plan
    room = (1 - _ROOM) * cap_bytes - plan.device_bytes
    if not work.layout.is_heavy:
        room = min(room, _MOST_MORE * plan.device_bytes)
    layers = min(work.layout.layers, plan.decoded_layers + int(max(0.0, room) // each))
    beside = _beside_decoded(work, plan.micro_batch)
    if work.layout.is_heavy and layers == work.layout.layers:  # a heavy codec's are then decoded in one go
        more = _beside_decoded(work, plan.micro_batch, all_layers=True) - beside
        if (layers - plan.decoded_layers) * each + more <= room:
            beside += more
        else:
            layers -= work.layout.tensor_codec.layers_together
    return replace(plan, decoded_layers=layers, decoding=layers * each + beside)


def _row_bytes(work: Workload) -> int:
    """Bytes of a sample in the rows of a batch."""
    return sum(work.layout.row_sizes(work.longest, work.tail_room))


def _arriving_bytes(work: Workload) -> int:
    """Place of one sample's plain elements before stem and tail are joined."""
    if work.tail_room is None or work.layout.codec is not None:
        return 0
    return work.layout.row_bytes(max(work.tail_room.stored, work.tail_room.tail))


def _decoded_tail_bytes(work: Workload, samples: int) -> int:
    """Size of one layer of tails, decoded, and of its keys once more in the order of their stems."""
    layout = work.layout
    if work.tail_room is None or layout.codec is None:
        return 0
    return samples * work.tail_room.tail * 3 * layout.kv_heads * layout.head_dim * BF16_BYTES


def _beside_decoded(work: Workload, samples: int, *, all_layers: bool = False) -> int:
    """Memory of decoding beside the decoded layers: tails, and what the codec itself needs."""
    layout, own = work.layout, 0
    if layout.codec is not None:
        own = layout.codec.decoding_bytes(layout.shape(samples * work.longest), all_layers=all_layers)
    return own + _decoded_tail_bytes(work, samples)


def _validation_bytes(work: Workload, row: int) -> int:
    """One batch, and one decoded layer of it; its lengths are taken to be those of training."""
    decoded = _decoded_bytes(work, VAL_BATCH) + _decoded_tail_bytes(work, VAL_BATCH)
    return VAL_BATCH * row + decoded + _arriving_bytes(work)


def _pinned_bytes(work: Workload) -> int:
    """Page-locked host memory: all samples, or the ring's buffers."""
    if work.pinned_bytes is not None:
        return work.pinned_bytes
    return samples_ahead(work.batch_size) * work.layout.read_bytes(work.longest, work.tail_room)


def _decoded_bytes(work: Workload, samples: int) -> int:
    """Size of one decoded layer; zero for bfloat16, which is read where it lies."""
    layout = work.layout
    return 0 if layout.codec is None else samples * work.longest * 2 * layout.kv_heads * layout.head_dim * BF16_BYTES


def _remedy(work: Workload, choices: Callable[[Workload], list[list[MemoryPlan]]], cap_bytes: int) -> str:
    """Say what to change so that the smallest settings would fit."""
    smaller = range(1, work.batch_size)
    batch = bisect_right(
        smaller, cap_bytes, key=lambda size: _least(choices(replace(work, batch_size=size))).device_bytes
    )
    if batch:
        return f"Lower --batch-size to {batch}, or raise --memory-budget."
    if work.trainable == "all":
        return (
            "Use --trainable lora (about a third of the memory) or, from scratch, a smaller expert; or raise "
            "--memory-budget."
        )
    return "Raise --memory-budget, or train on shorter prefixes (fewer cameras)."
