"""Seconds that the stages take on a GPU, from what one H100 80 GB took at full size (compiled, captured).

For another GPU they are scaled: what grows with tokens by the rate of its arithmetic; what does not (reading weights
and adding gradients once a micro-batch, the optimizer) by the bandwidth of its memory. Another model's are scaled by
parameters. So nothing but a run of the released model on the H100 is more than an estimate.
"""

import math
from typing import TYPE_CHECKING

from alpacache.gpus import GPUS, MEASURED, Gpu
from alpacache.sample import FUTURE_STEPS

if TYPE_CHECKING:
    from alpacache.memory_plan import MemoryPlan, Workload

RELEASED_VLM, RELEASED_EXPERT = 8.8e9, 2.279e9
"""Parameters of the models that were measured."""

# One sample's prefill: 85 ms at 809 tokens, 190 ms at 2,993. The line through both gives 50 ms a sample at batch 4 of
# one camera, where 49 ms were measured.
_LAUNCHES_S = 0.0461
_PREFILL_TOKEN_S = 48.1e-6

# int8, 4 cameras (2,975 tokens), 8 samples: 46.9 ms a step; in two micro-batches 64.2; of 4 draws 92.9. 1 camera
# (840 tokens), 16 samples: 52.9. Of each 13.2 ms are norm and optimizer. Four equations, these four unknowns:
_PART_S = 17.3e-3
"""Of a micro-batch, however small."""
_TOKEN_S = 17.88e-6
"""Of an action token."""
_PAIR_S = 4.057e-9
"""Of an action token and a prefix token that it attends to."""
_DECODED_S = 44.8e-9
"""Of a prefix token to decode."""
_OPTIMIZER_S = 13.2e-3
"""Norm and adamw8 over all of the released expert's parameters."""
_RECOMPUTED = 4 / 3
"""With checkpointing."""


def prefill_seconds(vlm_parameters: int, tokens: int, gpu: Gpu) -> float:
    """Of one pass over so many tokens, of one sample or of several; launching kernels takes as long on any GPU."""
    model = vlm_parameters / RELEASED_VLM
    return _LAUNCHES_S * min(1.0, model) + tokens * _PREFILL_TOKEN_S * model * _arithmetic(gpu)


def compute_seconds(work: "Workload", plan: "MemoryPlan", gpu: Gpu) -> float:
    """Forward and backward of a step. Adapters are taken to cost as much as training everything does."""
    model = work.parameters / RELEASED_EXPERT
    tokens = work.batch_size * plan.draws * FUTURE_STEPS
    arithmetic = tokens * (_TOKEN_S + _PAIR_S * work.longest) * _arithmetic(gpu)
    parts = math.ceil(work.batch_size / plan.micro_batch)
    traffic = (parts * _PART_S + work.batch_size * work.longest * _DECODED_S) * _traffic(gpu)
    return (arithmetic + traffic) * model * (_RECOMPUTED if plan.checkpointing else 1.0)


def optimizer_seconds(work: "Workload", gpu: Gpu) -> float:
    """Gradient norm and update of a step."""
    return _OPTIMIZER_S * work.trained / RELEASED_EXPERT * _traffic(gpu)


def _arithmetic(gpu: Gpu) -> float:
    return GPUS[MEASURED].tflops / gpu.tflops


def _traffic(gpu: Gpu) -> float:
    return GPUS[MEASURED].memory_gb_s / gpu.memory_gb_s
