"""Independent kernels on two CUDA streams in turn: while one ends and leaves most of the GPU idle, another runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


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
