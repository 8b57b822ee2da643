"""Seconds that the stages take on a GPU, from measurements at full size on one H100 80 GB (compiled, captured).

For another GPU, time that grows with tokens is scaled by its rate of arithmetic. Reading weights and adding to
gradients, once a micro-batch, and the optimizer are scaled by the bandwidth of its memory. Starting kernels, and
kernels too small to fill the GPU, are not scaled. For another model everything is scaled by parameters. So all but the
released model on an H100 is an estimate.
"""

import math

from alpacache.driving.sample import FUTURE_STEPS
from alpacache.planning.gpus import GPUS, MEASURED, Gpu
from alpacache.planning.workload import MemoryPlan, Workload

_IMAGES_AT_ONCE = 32
"""Images that `extract` sends through the VLM at once on a GPU: about 6,000 tokens. With fewer, kernels take longer to
launch than to run; more are hardly faster (`benchmarks/results/`)."""


def prefill_batch(*, cameras: int, frames: int) -> int:
    """Samples that `extract` sends through the VLM at once on a GPU by default: 8 of one camera, 2 of four."""
    return max(1, _IMAGES_AT_ONCE // (cameras * frames))


def worth_compiling(vlm_parameters: int, *, images: int) -> bool:
    """Tell whether prefills of so many images take long enough that compiling the VLM's layers is paid back in them.

    By the rate of the measured GPU: on a slower one as much of a longer time is saved, and compiling takes as long.
    """
    return prefill_seconds(vlm_parameters, images * _TOKENS_AN_IMAGE, GPUS[MEASURED]) >= _COMPILED_FROM_S


RELEASED_VLM, RELEASED_EXPERT = 8.8e9, 2.279e9
"""Parameters of the measured models."""

# Measured in batches of 1, 2, 4 and 8: at 790 tokens (1 camera) 54 to 99, 85 to 106, 160 and 303 ms, at 2,974 (4
# cameras) 153, 294, 583 and 1,158 ms.
_LAUNCHES_S = 0.075
"""Time a CPU core takes to launch all kernels of a prefill (54 to 99 ms). The GPU waits for it where there is little to
compute."""
_PREFILL_S = 8e-3
_PREFILL_TOKEN_S = 47.5e-6
_TOKENS_AN_IMAGE = 187
"""Tokens per image of a prompt with 16 images (2,993 tokens); with four images it is 202."""
_COMPILED_FROM_S = 60.0
"""Seconds of prefill, not compiled, from which it is compiled: a quarter of them is saved, for 10 s of compilation."""
_PICTURE = (1080, 1920)
_CAMERA_CORE_S = 0.8
"""Seconds of a CPU core to decode and resize one camera's frames of a sample from H.264 of that size: measured 0.74 and
0.77 (1 camera), 0.82 and 0.88 (4 cameras)."""

# Measured with int8, 4 cameras (2,975 tokens) and 8 samples: 46.9 ms a step, 64.2 in two micro-batches, 92.9 with 4
# draws; with 1 camera (840 tokens) and 16 samples: 52.9. Each has 13.2 ms of norm and optimizer. That makes four
# equations for four unknowns.
_PART_S = 8.3e-3
"""Seconds of any micro-batch, however small, on any GPU. The equations give 12 ms, and so did a step of 43.9 ms on an
H200, which differs in its memory alone. Steps have become faster since, on an H200 37.7 ms (4 cameras) and 44.7 (1)."""
_PART_TRAFFIC_S = 5.3e-3
"""Seconds of a micro-batch to read the weights and add to their gradients."""
_TOKEN_S = 17.88e-6
"""Seconds of an action token."""
_PAIR_S = 4.057e-9
"""Seconds of an action token for each prefix token that it attends to."""
_DECODED_S = 23.0e-9
"""Seconds to decode a prefix token once. Layers that are not kept decoded are decoded again for the backward."""
_HEAVY_DECODED_S = 0.68e-6
"""The same of a heavy codec, by itself: an H200 takes 8.9 ms for `transform:2.2` of 16 samples of one camera, and 16.1
for 8 of four."""
_OPTIMIZER_S = 13.2e-3
"""Seconds of gradient norm and adamw8 over all of the released expert's parameters."""
_LAUNCHED_S = 0.177
"""Seconds of a CPU core to launch a micro-batch kernel by kernel, at most: measured with layers that are not compiled,
8 samples of 4 cameras, on an H100."""
_FORWARD = 1 / 3
"""Part of forward and backward without checkpointing that is the forward."""
BUS_BYTES_S = 25e9
"""Rate assumed between RAM and a GPU, each way, both at once: PCIe 4.0 with 16 lanes."""


def prefill_seconds(vlm_parameters: int, tokens: int, gpu: Gpu) -> float:
    """Seconds of one pass over the tokens of one or several samples. Launching kernels takes as long on any GPU."""
    model = vlm_parameters / RELEASED_VLM
    computing = (_PREFILL_S + tokens * _PREFILL_TOKEN_S) * model * _arithmetic(gpu)
    return max(_LAUNCHES_S * min(1.0, model), computing)


def reading_seconds(cameras: int, picture: tuple[int, int], cores: int) -> float:
    """Seconds a sample to read and preprocess, with one sample on each CPU core. `picture`: height, width."""
    return cameras * _CAMERA_CORE_S * math.prod(picture) / math.prod(_PICTURE) / cores


def compute_seconds(work: Workload, plan: MemoryPlan, gpu: Gpu) -> float:
    """Seconds of a step's forward and backward. Adapters are assumed to cost as much as training everything."""
    model = work.parameters / RELEASED_EXPERT
    tokens = work.batch_size * plan.draws * FUTURE_STEPS
    arithmetic = tokens * (_TOKEN_S + _PAIR_S * work.longest) * _arithmetic(gpu)
    parts = math.ceil(work.batch_size / plan.micro_batch)
    passes = 1 + plan.backwards * (1 - plan.decoded_layers / work.layout.layers)
    decoded = work.batch_size * work.longest * passes
    each = _HEAVY_DECODED_S * _arithmetic(gpu) if work.layout.is_heavy else _DECODED_S * _traffic(gpu)
    decoding = decoded * each * (1 + _FORWARD if plan.checkpointing else 1.0)
    traffic = parts * _PART_TRAFFIC_S * _traffic(gpu)
    return ((arithmetic + parts * _PART_S + traffic) * _parts_of_one(plan) + decoding) * model


def optimizer_seconds(work: Workload, gpu: Gpu) -> float:
    """Seconds of a step's gradient norm and update."""
    return _OPTIMIZER_S * work.trained / RELEASED_EXPERT * _traffic(gpu)


def bus_seconds(plan: MemoryPlan, bus_bytes_s: float) -> float:
    """Seconds in which the state that is in RAM comes in, and goes out at the same time."""
    return plan.streamed / bus_bytes_s if plan.streamed else 0.0


def step_seconds(work: Workload, plan: MemoryPlan, gpu: Gpu, bus_bytes_s: float) -> float:
    """Seconds of a step, with copies of state beside what they can overlap: the forward of the next step, or of two
    backwards the second.

    Beside the backward before that, the first states arrive, as many as have a place.
    """
    computing, updating = compute_seconds(work, plan, gpu), optimizer_seconds(work, gpu)
    launching = 0.0 if plan.captured else _LAUNCHED_S * math.ceil(work.batch_size / plan.micro_batch)
    if not plan.streamed or plan.backwards == 2:
        computing = max(computing, launching * _parts_of_one(plan))
    if not plan.streamed:
        return computing + updating
    forward = computing * _FORWARD / _parts_of_one(plan)
    backward = computing - forward
    bus = bus_seconds(plan, bus_bytes_s)
    if plan.backwards == 2:
        second = backward / 2
        early = min(bus * plan.arriving / plan.streamed, computing - second)
        return computing - second + max(second + updating, bus - early)
    if plan.captured:  # gradients are read and written once more
        kept = 2 * plan.gradients * plan.streamed_layers / work.layers
        backward += kept / (gpu.memory_gb_s * 1e9)
    else:
        backward = max(backward, launching * (1 - _FORWARD))
        forward = max(forward, launching * _FORWARD)
    early = min(bus * plan.arriving / plan.streamed, backward)
    parts = math.ceil(work.batch_size / plan.micro_batch)
    later = forward * (1 - 1 / parts)  # the first micro-batch alone waits for updates
    return backward + later + max(forward - later + updating, bus - early)


def _parts_of_one(plan: MemoryPlan) -> float:
    """Time of a step's passes over the layers as a multiple of one forward and one backward."""
    return _FORWARD + plan.backwards * (1.0 if plan.checkpointing else 1 - _FORWARD)


def _arithmetic(gpu: Gpu) -> float:
    return GPUS[MEASURED].tflops / gpu.tflops


def _traffic(gpu: Gpu) -> float:
    return GPUS[MEASURED].memory_gb_s / gpu.memory_gb_s
