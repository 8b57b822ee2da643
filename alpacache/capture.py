"""Work of the loop as a CUDA graph, so that a step of many small kernels is not bound by launching them."""

from collections.abc import Callable

import torch

_WARM_UPS = 2


def captured(work: Callable[[], None], *, after_warm_up: Callable[[], None] = lambda: None) -> torch.cuda.CUDAGraph:
    """Run the work a few times, then capture it, both on a stream of its own; `after_warm_up` is called in between.

    Kernels of this stream go before those of one that decodes layers ahead. Warming up on it too leaves one workspace
    of cuBLAS less in memory.
    """
    stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    after_warm_up()
    graph = torch.cuda.CUDAGraph()
    # Threads read samples meanwhile; they do not call CUDA, but a library of theirs may.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph
