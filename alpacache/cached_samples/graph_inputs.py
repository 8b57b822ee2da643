"""What differs from one training step to the next, in tensors at fixed addresses that a captured graph reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Of a tensor in the flat buffer, in bytes."""


class StepInputs:
    """The inputs of B samples and K draws, views of one flat buffer on the device.

    On a GPU `put` sends them ahead, on a stream of its own into one of two further buffers, and the step itself begins
    with a copy within the device: a copy from the host would wait in line behind the next batch's prefixes, which begin
    to be copied at the moment when the step before has ended.
    """

    def __init__(self, *, batch_size: int, draws: int, waypoints: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # The CPU's optimizer takes the Python number itself.
        real = torch.float32 if self._cuda else torch.float64
        self._parts: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int64, (3, batch_size)),
            (torch.float32, (batch_size, 1, waypoints, 2)),
            (torch.float32, (batch_size, draws, waypoints, 2)),
            (torch.float32, (batch_size, draws)),
            (real, ()),
            (torch.float32, ()),
        ]
        size = sum(_bytes(*part) for part in self._parts)
        self._flat = torch.zeros(size, dtype=torch.uint8, device=device)
        self.places, self.action, self.noise, self.t, self.lr, self.stop = self._views(self._flat)
        """int64 `[3, B]`: row, tokens and first position of each prefix; `[B, 1, 64, 2]`; `[B, K, 64, 2]`; `[B, K]`;
        learning rate; requests to stop."""
        self.places.fill_(1)
        if self._cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._ahead = [torch.empty_like(self._flat) for _ in range(2)]
            self._taken: list[torch.cuda.Event | None] = [None, None]
            self._next = 0

    def put(self, *, places: Tensor, action: Tensor, noise: Tensor, t: Tensor, lr: float, stop: bool) -> None:
        """Values on the CPU; whatever is enqueued on the current stream from here on reads them."""
        host = torch.empty(len(self._flat), dtype=torch.uint8, pin_memory=self._cuda)
        values = (places, action, noise, t, torch.tensor(lr, dtype=torch.float64), torch.tensor(float(stop)))
        for view, value in zip(self._views(host), values, strict=True):
            if view.shape != value.shape:
                raise ValueError(f"an input of the step has shape {list(value.shape)}, expected {list(view.shape)}.")
            view.copy_(value)
        if not self._cuda:
            self._flat.copy_(host)
            return
        ahead, taken = self._ahead[self._next], self._taken[self._next]
        with torch.cuda.stream(self._stream):
            if taken is not None:
                self._stream.wait_event(taken)
            ahead.copy_(host, non_blocking=True)
        current = torch.cuda.current_stream(self._flat.device)
        current.wait_stream(self._stream)
        self._flat.copy_(ahead)
        self._taken[self._next] = current.record_event()
        self._next = 1 - self._next

    def _views(self, flat: Tensor) -> Sequence[Tensor]:
        views, start = [], 0
        for dtype, shape in self._parts:
            size = _bytes(dtype, shape)
            count = torch.Size(shape).numel()
            views.append(flat[start : start + size].view(dtype)[:count].view(shape))
            start += size
        return views


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = torch.Size(shape).numel() * dtype.itemsize
    return size + -size % _ALIGNMENT
