"""Work of the loop as a CUDA graph, so that a step of many small kernels is not bound by launching them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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


class TwoStreams:
    """The current stream and one beside it; on a CPU, or without a device, all stays where it is."""

    def __init__(self, device: torch.device | None) -> None:
        cuda = device is not None and device.type == "cuda"
        self._beside = torch.cuda.Stream(device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around work that is shared out: what came before is seen by both, and what comes after sees both."""
        if self._beside is None:
            yield
            return
        current = torch.cuda.current_stream()
        self._beside.wait_stream(current)
        yield
        current.wait_stream(self._beside)

    def turn(self, place: int) -> AbstractContextManager[object]:
        """Around the piece of work at that place, from 0 on: every other one goes to the stream beside."""
        return torch.cuda.stream(self._beside if place % 2 else None)
