"""CUDA graphs of the training or sampling loop's work, which would otherwise be bound by launching small kernels.

Measured on an H100, bf16 of 4 cameras, batch 8: a training step takes 61.8 ms captured and 177 ms launched kernel by
kernel (benchmarks/results/train_step_nvidia-h100-80gb-hbm3_2026-11-24.md).
"""

from collections.abc import Callable

import torch

_WARM_UPS = 2


def captured(work: Callable[[], None], *, after_warm_up: Callable[[], None] = lambda: None) -> torch.cuda.CUDAGraph:
    """Warm the work up and capture it, on a stream of its own; `after_warm_up` is called in between.

    Kernels of this stream have priority over those that decode layers ahead. Warming up on the same stream saves one
    workspace of cuBLAS.
    """
    stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    after_warm_up()
    graph = torch.cuda.CUDAGraph()
    # Threads read samples meanwhile. They do not call CUDA themselves, but a library may.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph
