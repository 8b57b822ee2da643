"""Seconds that the stages take on a GPU, from what one H100 80 GB took at full size (compiled, captured).

For another GPU they are scaled: what grows with tokens by the rate of its arithmetic; reading weights and adding to
gradients, once a micro-batch, and the optimizer by the bandwidth of its memory; what the GPU spends in kernels too
small to fill it, and in beginning them, not at all. Another model's are scaled by
parameters. So nothing but a run of the released model on the H100 is more than an estimate.
"""

import math
from typing import TYPE_CHECKING

from alpacache.driving.sample import FUTURE_STEPS
from alpacache.planning.gpus import GPUS, MEASURED, Gpu

if TYPE_CHECKING:
    from alpacache.planning.workload import MemoryPlan, Workload


_IMAGES_AT_ONCE = 32
"""That `extract` sends through the VLM on a GPU: about 6,000 tokens. With fewer, its kernels take longer to launch than
to run; more are hardly faster (benchmarks/results)."""


def prefill_batch(*, cameras: int, frames: int) -> int:
    """Samples that `extract` sends through the VLM at once on a GPU, if it is not told: 8 of one camera, 2 of four."""
    return max(1, _IMAGES_AT_ONCE // (cameras * frames))


RELEASED_VLM, RELEASED_EXPERT = 8.8e9, 2.279e9
"""Parameters of the models that were measured."""

# Measured in batches of 1, 2, 4 and 8: at 790 tokens (1 camera) 54 to 99, 85 to 106, 160 and 303 ms, at 2,974 (4
# cameras) 153, 294, 583 and 1,158 ms.
_LAUNCHES_S = 0.075
"""Of all its kernels, by a CPU core, which the GPU waits for where there is little to compute; 54 to 99 ms."""
_PREFILL_S = 8e-3
_PREFILL_TOKEN_S = 47.5e-6
_PICTURE = (1080, 1920)
_CAMERA_CORE_S = 0.8
"""To decode and resize one camera's frames of a sample out of H.264 of that size: 0.74 and 0.77 (1 camera), 0.82 and
0.88 (4 cameras)."""

# int8, 4 cameras (2,975 tokens), 8 samples: 46.9 ms a step; in two micro-batches 64.2; of 4 draws 92.9. 1 camera
# (840 tokens), 16 samples: 52.9. Of each 13.2 ms are norm and optimizer. Four equations for four unknowns.
_PART_S = 8.3e-3
"""Of a micro-batch, however small, on any GPU. 12 ms by these equations, and by a step of 43.9 ms on an H200, which
differs by its memory alone; since then steps have become faster, on an H200 to 37.7 ms (4 cameras) and 44.7 (1)."""
_PART_TRAFFIC_S = 5.3e-3
"""Of a micro-batch, to read the weights and to add to their gradients."""
_TOKEN_S = 17.88e-6
"""Of an action token."""
_PAIR_S = 4.057e-9
"""Of an action token and a prefix token that it attends to."""
_DECODED_S = 23.0e-9
"""Of a prefix token to decode once; layers that are not kept decoded are decoded again for the backward."""
_OPTIMIZER_S = 13.2e-3
"""Norm and adamw8 over all of the released expert's parameters."""
_RECOMPUTED = 4 / 3
"""With checkpointing."""


def prefill_seconds(vlm_parameters: int, tokens: int, gpu: Gpu) -> float:
    """Of one pass over so many tokens, of one sample or of several; launching kernels takes as long on any GPU."""
    model = vlm_parameters / RELEASED_VLM
    computing = (_PREFILL_S + tokens * _PREFILL_TOKEN_S) * model * _arithmetic(gpu)
    return max(_LAUNCHES_S * min(1.0, model), computing)


def reading_seconds(cameras: int, picture: tuple[int, int], cores: int) -> float:
    """Of one sample, read and preprocessed beside so many others as there are CPU cores. `picture`: height, width."""
    return cameras * _CAMERA_CORE_S * math.prod(picture) / math.prod(_PICTURE) / cores


def compute_seconds(work: "Workload", plan: "MemoryPlan", gpu: Gpu) -> float:
    """Forward and backward of a step. Adapters are taken to cost as much as training everything does."""
    model = work.parameters / RELEASED_EXPERT
    tokens = work.batch_size * plan.draws * FUTURE_STEPS
    arithmetic = tokens * (_TOKEN_S + _PAIR_S * work.longest) * _arithmetic(gpu)
    parts = math.ceil(work.batch_size / plan.micro_batch)
    passes = 2 - plan.decoded_layers / work.layers
    decoded = work.batch_size * work.longest * passes * _DECODED_S
    traffic = (parts * _PART_TRAFFIC_S + decoded) * _traffic(gpu)
    return (arithmetic + parts * _PART_S + traffic) * model * (_RECOMPUTED if plan.checkpointing else 1.0)


def optimizer_seconds(work: "Workload", gpu: Gpu) -> float:
    """Gradient norm and update of a step."""
    return _OPTIMIZER_S * work.trained / RELEASED_EXPERT * _traffic(gpu)


def _arithmetic(gpu: Gpu) -> float:
    return GPUS[MEASURED].tflops / gpu.tflops


def _traffic(gpu: Gpu) -> float:
    return GPUS[MEASURED].memory_gb_s / gpu.memory_gb_s
