"""Copies from the GPU to page-locked RAM while the GPU goes on: a stream of its own, a bounded number at a time.

Whoever begins a copy waits until a buffer is free, which keeps a fast GPU from filling the RAM ahead of a slow disk. On
the CPU nothing is copied, only counted. `copied_to_host` is for a single copy of many tensors, such as a checkpoint.
Neither was timed apart; `extract` as a whole is in docs/decisions/0012 and `benchmarks/results/extract_*`.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, LifoQueue
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from alpacache.gpu.host_memory import Bytes, page_aligned, page_lock, page_rounded, page_unlock

_STAGE_BYTES = 2**26
_SLACK = 16
"""A buffer is a sixteenth larger than the sample that needed it first, because lengths vary a little."""


class HostCopy:
    """One sample's values on their way to the host; what `arrays` returns is valid until `release`."""

    def __init__(
        self, copies: "HostCopies", buffer: Bytes | None, values: Mapping[str, Any], event: torch.cuda.Event | None
    ) -> None:
        self._copies, self._buffer, self._values, self._event = copies, buffer, values, event

    def arrays(self) -> Mapping[str, Any]:
        """Wait for the copy; the values, tensors as numpy arrays. May be called in any thread."""
        if self._event is not None:
            with torch.cuda.device(self._event.device):  # a new thread's current GPU is the first one
                self._event.synchronize()
        return self._values

    def keep(self, values: Mapping[str, Any]) -> "HostCopy":
        """Replace the values, which may lie in the buffer; return this copy."""
        self._values = values
        return self

    def release(self) -> None:
        """Give the buffer back; the arrays must not be used any more."""
        self._values = {}
        self._copies._free.put(self._buffer)


class HostCopies:
    """Copies to the host of at most `count` samples that are not released yet."""

    def __init__(self, device: torch.device, count: int) -> None:
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._count = count
        self._free: LifoQueue[Bytes | None] = LifoQueue()  # last in, first out: no more are page-locked than are in use
        for _ in range(count):
            self._free.put(None)

    def begin(self, values: Mapping[str, Any], *, made: torch.cuda.Event | None = None) -> HostCopy:
        """Wait for a free buffer, then start copying the tensors among the values and return.

        `made`: the event after which the values are valid; by default, all work on the current stream so far.
        """
        buffer = self._free.get()
        try:
            return self._begin(values, buffer, made)
        except BaseException:
            self._free.put(buffer)
            raise

    def _begin(self, values: Mapping[str, Any], buffer: Bytes | None, made: torch.cuda.Event | None) -> HostCopy:
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if self._stream is None:
            arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
            return HostCopy(self, None, {**values, **arrays}, None)
        needed = sum(page_rounded(tensor.nbytes) for tensor in tensors.values())
        buffer = _locked(buffer, needed)
        self._stream.wait_event(made or torch.cuda.current_stream(self._stream.device).record_event())
        done, end = dict(values), 0
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                place = buffer[end : end + tensor.nbytes]
                flat = tensor.contiguous().view(-1).view(torch.uint8)
                torch.from_numpy(place).copy_(flat, non_blocking=True)
                tensor.record_stream(self._stream)  # keeps its memory until it is read
                done[name] = place.view(str(tensor.dtype).removeprefix("torch.")).reshape(tensor.shape)
                end += page_rounded(tensor.nbytes)
            # Blocking: a thread that waits for it sleeps and leaves the core to those that read.
            event = self._stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        return HostCopy(self, buffer, done, event)

    def reserve(self, sizes: Mapping[str, int]) -> "HostPlaces":
        """Wait for a free buffer with room for values of these sizes, in bytes, that come in pieces."""
        needed = sum(map(page_rounded, sizes.values()))
        buffer = self._free.get()
        try:
            buffer = np.empty(needed, np.uint8) if self._stream is None else _locked(buffer, needed)
        except BaseException:
            self._free.put(None)
            raise
        places, end = {}, 0
        for name, size in sizes.items():
            places[name] = buffer[end : end + size]
            end += page_rounded(size)
        return HostPlaces(self, buffer if self._stream is not None else None, places)

    @contextmanager
    def after_now(self) -> Iterator[None]:
        """Within it pieces are put as soon as the device is done with what was launched before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(torch.cuda.current_stream(self._stream.device).record_event())
        with torch.cuda.stream(self._stream):
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Unlock the buffers, once all copies are released; after an error those that are."""
        for _ in range(self._count):
            try:
                buffer = self._free.get(block=kind is None)
            except Empty:
                return
            if buffer is not None:
                page_unlock(buffer)


class HostPlaces:
    """Room for one sample's values, which the device sends in pieces within `HostCopies.after_now`."""

    def __init__(self, copies: HostCopies, buffer: Bytes | None, places: Mapping[str, Bytes]) -> None:
        self._copies, self._buffer, self.places = copies, buffer, places

    def put(self, name: str, first: int, piece: Tensor) -> None:
        """Begin to copy a piece, uint8 and flat, to these bytes of a value."""
        place = torch.from_numpy(self.places[name][first : first + piece.numel()])
        place.copy_(piece, non_blocking=True)
        if piece.device.type == "cuda":
            piece.record_stream(torch.cuda.current_stream(piece.device))

    def end(self) -> HostCopy:
        """The copy of which all pieces are put, its values still to be given."""
        stream = self._copies._stream
        # Blocking: a thread that waits for it sleeps and leaves the core to those that read.
        event = None if stream is None else stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        return HostCopy(self._copies, self._buffer, {}, event)


def _locked(buffer: Bytes | None, needed: int) -> Bytes:
    """A page-locked buffer of at least so many bytes, this one if it is large enough."""
    if buffer is None or buffer.size < needed:
        if buffer is not None:
            page_unlock(buffer)
        buffer = page_aligned(page_rounded(needed + needed // _SLACK))
        page_lock(buffer)
    return buffer


def copied_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in ordinary RAM that share no memory with the tensors.

    They pass through two page-locked buffers in turn: while one is filled, threads empty the other. A plain copy into
    memory that was never written is done by one thread of the driver, a page at a time.
    """
    cuda = [name for name, tensor in tensors.items() if tensor.device.type == "cuda"]
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in cuda}
    if not cuda:
        return copies
    stages = page_aligned(2 * _STAGE_BYTES)
    page_lock(stages)
    free = deque(torch.from_numpy(stages).view(2, _STAGE_BYTES))
    under_way: deque[tuple[torch.cuda.Event, Tensor, Tensor, Tensor]] = deque()

    def finish() -> None:
        copied, stage, place, target = under_way.popleft()
        copied.synchronize()
        target.copy_(place)
        free.append(stage)

    try:
        for name in cuda:
            source = tensors[name].detach().contiguous()
            copies[name] = torch.empty_like(source, device="cpu")
            bytes_from, bytes_to = (tensor.view(-1).view(torch.uint8) for tensor in (source, copies[name]))
            for start in range(0, len(bytes_from), _STAGE_BYTES):
                if not free:
                    finish()
                part, stage = bytes_from[start : start + _STAGE_BYTES], free.popleft()
                place = stage[: len(part)]
                place.copy_(part, non_blocking=True)
                copied = torch.cuda.current_stream(source.device).record_event()
                under_way.append((copied, stage, place, bytes_to[start : start + _STAGE_BYTES]))
    finally:
        while under_way:
            finish()
        page_unlock(stages)
    return {name: copies[name] for name in tensors}
