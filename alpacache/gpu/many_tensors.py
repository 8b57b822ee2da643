"""Many tensors as the operands of one kernel: where each begins, and which stretch of which one a program works on.

A kernel for each of 409 parameters leaves a gap when it ends; one for all of them leaves one gap. Addresses go to the
GPU as numbers, in multiples of the element's size from the first tensor's address, so that a kernel gets an ordinary
pointer and adds to it.
"""

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.gpu.host_memory import page_aligned, page_lock, page_rounded, page_unlock

ALIGNED = 16
"""Elements: offsets that are multiples of it can be read 16 bytes at a time, whatever their type."""


def offsets(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    """Where each tensor begins, in elements from the first one's beginning; all have one dtype."""
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    places: NDArray[np.int64] = (addresses - addresses[0]) // tensors[0].element_size()
    return places


def is_aligned(tensor: Tensor) -> bool:
    """Whether a kernel may read it 16 bytes at a time, and offsets between such tensors are multiples of `ALIGNED`."""
    return tensor.data_ptr() % (ALIGNED * tensor.element_size()) == 0


def stretches(sizes: Sequence[int], most: int) -> NDArray[np.int32]:
    """`[stretches, 2]`: number and first unit of pieces of at most so many units, of things that have so many units."""
    firsts = [np.arange(0, size, most, dtype=np.int32) for size in sizes]
    numbers = np.repeat(np.arange(len(sizes), dtype=np.int32), [len(first) for first in firsts])
    return np.stack([numbers, np.concatenate(firsts)], axis=1)


class AddressTable:
    """Numbers in device memory that are set without waiting for the device, in a graph's capture, too.

    A replayed graph finds what it was captured with; of several graphs only the one captured last does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._there = torch.empty(0, dtype=torch.int64, device=device)
        self._given: NDArray[np.int64] | None = None
        """What is there; None where a graph may have put its own."""
        self._host: NDArray[np.int64] | None = None
        """Page-locked: a captured graph copies from it."""
        self._unlock: weakref.finalize[Any, Any] | None = None
        self._captured = False

    def put(self, rows: NDArray[np.int64]) -> Tensor:
        """The numbers on the device.

        Raises `RuntimeError` for another shape in a graph's capture, or behind one: the graph would copy to memory that
        is no more.
        """
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._there.shape != rows.shape:
            if capturing or self._captured:
                raise RuntimeError(
                    f"a graph has a table {list(self._there.shape)}; it cannot become {list(rows.shape)}."
                )
            self._take_memory(rows.shape)
        if capturing and self._host is not None:
            self._host[:], self._captured = rows, True
            self._there.copy_(torch.from_numpy(self._host), non_blocking=True)
        elif self._captured or self._given is None or not np.array_equal(self._given, rows):
            # from ordinary memory: so few bytes are taken before the call returns
            self._there.copy_(torch.from_numpy(rows), non_blocking=True)
            self._given = rows
        return self._there

    def _take_memory(self, shape: tuple[int, ...]) -> None:
        self._there, self._given = torch.empty(shape, dtype=torch.int64, device=self._device), None
        if self._device.type != "cuda":
            return
        if self._unlock is not None:
            self._unlock()
        size_bytes = self._there.nbytes
        memory = page_aligned(page_rounded(size_bytes))
        page_lock(memory)
        self._unlock = weakref.finalize(self, page_unlock, memory)
        self._unlock.atexit = False
        self._host = memory[:size_bytes].view(np.int64).reshape(shape)


class LaunchTables:
    """What one kernel over many tensors reads of them, kept from call to call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers: dict[Hashable, AddressTable] = {}
        self._programs: dict[tuple[tuple[int, ...], int], Tensor] = {}

    def numbers(self, kind: Hashable, rows: NDArray[np.int64]) -> Tensor:
        """A row of numbers for each tensor of a kind, on the device; see `AddressTable.put`."""
        if kind not in self._numbers:
            self._numbers[kind] = AddressTable(self._device)
        return self._numbers[kind].put(rows)

    def programs(self, units: Sequence[int], most: int) -> Tensor:
        """`stretches` of tensors that have so many units, on the device."""
        key = tuple(units), most
        if key not in self._programs:
            self._programs[key] = torch.from_numpy(stretches(units, most)).to(self._device)
        return self._programs[key]
