"""Sum of the squares of many tensors, by one kernel on a GPU: what the gradient's norm is made of.

torch's `_foreach_norm` reads 4.6 GB of gradients in 409 pieces; numbers are in `docs/decisions/0008-adamw8.md`. The
order of the sum does not depend on anything but the tensors' sizes.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alpacache.gpu.many_tensors import LaunchTables, is_aligned, offsets

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only install
    triton = None

_TILE, _TILES, _WARPS = 4096, 16, 4
"""Elements that a program reads at a time, and how often."""


class PartialSums(NamedTuple):
    """Sums that add up to that of one tensor."""

    kind: tuple[torch.dtype, bool]
    sums: Tensor
    """`[programs]` float32."""


class SquareSum:
    """Sums of squares of lists of tensors that are mostly the same from call to call."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._has_kernel = device, device.type == "cuda" and triton is not None
        self._tables = LaunchTables(device)

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """The sum over all elements, a float32 scalar; no host synchronisation."""
        if not self._has_kernel:
            return total(self.of_each(tensors))
        return torch.cat([self.partial_sums(kind, alike) for kind, alike in by_kind(tensors).items()]).sum()

    def of_each(self, tensors: list[Tensor]) -> list[PartialSums]:
        """Partial sums of each tensor; of a list that is taken apart, `total` gives the sum of the whole to the bit."""
        if not self._has_kernel:
            norms = torch._foreach_norm(tensors, 2, torch.float32)
            return [PartialSums((torch.float32, False), norm.square()[None]) for norm in norms]
        apart = {}
        for kind, alike in by_kind(tensors).items():
            counts = [-(-tensor.numel() // (_TILE * _TILES)) for tensor in alike]
            apart[kind] = iter(torch.split(self.partial_sums(kind, alike), counts))
        return [PartialSums(kind, next(apart[kind])) for kind in map(_kind, tensors)]

    def partial_sums(self, kind: tuple[torch.dtype, bool], tensors: Sequence[Tensor]) -> Tensor:
        """Each program's sum `[programs]`, of tensors of one type that are all whole tiles, and aligned, or not."""
        sizes = [tensor.numel() for tensor in tensors]
        programs = self._tables.programs([-(-size // _TILE) for size in sizes], _TILES)
        table = self._tables.numbers(kind, np.stack([offsets(tensors), np.array(sizes)], axis=1))
        sums = torch.empty(len(programs), dtype=torch.float32, device=self._device)
        _squares_kernel[(len(programs),)](
            tensors[0], table, programs, sums, TILE=_TILE, TILES=_TILES, EVEN=kind[1], num_warps=_WARPS
        )
        return sums


def total(parts: Iterable[PartialSums]) -> Tensor:
    """What `SquareSum` gives of all tensors that these are of, in their order."""
    kinds: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part.sums)
    return torch.cat([sums for alike in kinds.values() for sums in alike]).sum()


def by_kind(tensors: Iterable[Tensor]) -> dict[tuple[torch.dtype, bool], list[Tensor]]:
    """The tensors, contiguous, by type and by whether all of a kind are whole tiles, and aligned."""
    kinds: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(_kind(tensor), []).append(tensor.contiguous())
    return kinds


def _kind(tensor: Tensor) -> tuple[torch.dtype, bool]:
    return tensor.dtype, tensor.is_contiguous() and tensor.numel() % _TILE == 0 and is_aligned(tensor)


if triton is not None:

    @triton.jit
    def _squares_kernel(  # type: ignore[no-untyped-def]
        tensor_ptr,  # [count] any floating type: the first tensor; the table says where others lie
        table_ptr,  # [tensors, 2] int64: offset and count
        stretches_ptr,  # [programs, 2] int32: tensor and first tile
        sums_ptr,  # [programs] float32
        TILE: tl.constexpr,  # noqa: N803  # elements
        TILES: tl.constexpr,  # noqa: N803  # most tiles a program
        EVEN: tl.constexpr,  # noqa: N803  # tensors are whole tiles, and aligned
    ):
        """Sum the squares of up to TILES tiles of one tensor."""
        stretch_ptr = stretches_ptr + 2 * tl.program_id(0)
        row_ptr = table_ptr + 2 * tl.load(stretch_ptr)
        begin = tl.load(stretch_ptr + 1).to(tl.int64)
        offset = tl.load(row_ptr)
        if EVEN:
            offset = tl.multiple_of(offset, 16)
        tensor_ptr += offset
        count = tl.load(row_ptr + 1)
        squares = tl.zeros([TILE], tl.float32)
        for tile in range(begin, tl.minimum(begin + TILES, tl.cdiv(count, TILE))):
            index = tile * TILE + tl.arange(0, TILE)
            value = tl.load(tensor_ptr + index, mask=(index < count) | EVEN, other=0.0).to(tl.float32)
            squares += value * value
        tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, axis=0))
