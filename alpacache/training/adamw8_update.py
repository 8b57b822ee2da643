"""One 8-bit AdamW update as a Triton kernel; `benchmarks/adamw8_reference.py` has its arithmetic in PyTorch."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from alpacache.errors import UsageError
from alpacache.gpu.many_tensors import LaunchTables, is_aligned, offsets
from alpacache.training.optimizers import Updated

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only install
    triton = None

GROUP = 128
_ROWS, _WARPS, _TILES, _STAGES = 4, 1, 16, 3
"""Groups of a tile, 512 elements, of which each thread of the one warp has 16 and no other warp to wait for; tiles of a
program at most, and how many of them are on their way from memory at a time. The best of 15 shapes: on an H200 an
update of 2.28 B parameters takes 6.9 ms, without tiles on their way 7.6, a program a tile 8.5."""
FLOOR = 2.0**-100
"""Least scale of a group: far below eps^2, and its reciprocal is finite."""
RANGE = 2.0**-32
"""Least v of a group over its greatest: anything smaller is kept too large, which damps its updates."""
_SHIFT = 3.0 * 2**22
"""Adding this to a small float32 rounds it to the nearest integer, which then stands in the lowest bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """Numbers that never change during a run."""

    betas: tuple[float, float]
    weight_decay: float
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalars:
    """Numbers that change with each step, as 0-dim tensors on the parameters' device."""

    lr: Tensor
    scale: Tensor
    """Factor applied to the gradients, float32."""
    skip: Tensor
    """True: change nothing; bool."""
    step: Tensor
    """Number of applied steps, this one included; int64."""
    bias: Tensor
    """`1 - beta ** step` for both betas, `[2]` float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """State of one parameter, or of a shard of it."""

    seed: int
    first: int = 0
    """Number of the parameter's element that a shard begins with."""
    exp_avg: Tensor
    """First moment's codes, int8, the parameter's shape."""
    exp_avg_sq: Tensor
    """Second moment's codes, uint8, the parameter's shape."""
    scales: Tensor
    """max |m|, least v and greatest v of each group, bf16 `[3, groups]`."""
    residual: Tensor | None
    """Lowest 8 bits of the 24-bit master weight, int8, the parameter's shape; None for a float32 parameter."""

    @classmethod
    def empty(cls, name: str, parameter: Tensor) -> "Moments":
        """State before the first step."""
        if parameter.is_cuda and triton is None:
            raise UsageError("adamw8 needs triton on a GPU; install triton, or choose the optimizer adamw.")
        if parameter.dtype not in (torch.bfloat16, torch.float32) or not parameter.is_contiguous():
            raise UsageError(
                f"adamw8 cannot train {name} ({parameter.dtype}, strides {parameter.stride()}); expected contiguous "
                "bfloat16 or float32. Choose the optimizer adamw."
            )
        if parameter.numel() >= 2**31:
            raise UsageError(
                f"adamw8 cannot train {name}, which has {parameter.numel():,} numbers; at most 2,147,483,647 are "
                "possible. Choose the optimizer adamw."
            )
        groups = math.ceil(parameter.numel() / GROUP)
        bf16 = parameter.dtype == torch.bfloat16
        return cls(
            seed=zlib.crc32(name.encode()) >> 1,
            exp_avg=torch.zeros_like(parameter, dtype=torch.int8),
            exp_avg_sq=torch.zeros_like(parameter, dtype=torch.uint8),
            scales=torch.full((3, groups), FLOOR, dtype=torch.bfloat16, device=parameter.device),
            residual=torch.zeros_like(parameter, dtype=torch.int8) if bf16 else None,
        )

    def shard(self, elements: slice) -> "Moments":
        """Views of the state of these elements (flattened, whole groups) of a parameter."""
        return Moments(
            seed=self.seed,
            first=elements.start,
            exp_avg=self.exp_avg.view(-1)[elements],
            exp_avg_sq=self.exp_avg_sq.view(-1)[elements],
            scales=self.scales[:, elements.start // GROUP : elements.stop // GROUP],
            residual=None if self.residual is None else self.residual.view(-1)[elements],
        )

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "scales": self.scales}
        return tensors if self.residual is None else {**tensors, "residual": self.residual}


Kind: TypeAlias = tuple[torch.dtype, torch.dtype, bool]
"""Parts of one kind are updated by the same compiled kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A parameter with its gradient and state, or a shard of it."""

    weight: Tensor
    grad: Tensor
    """Contiguous."""
    state: Moments

    @property
    def operands(self) -> list[Tensor]:
        """What the kernel reads and writes, in the order of its arguments."""
        state = self.state
        residual = state.exp_avg if state.residual is None else state.residual
        return [self.weight, self.grad, state.exp_avg, state.exp_avg_sq, residual, state.scales]

    @property
    def numbers(self) -> list[int]:
        """What else the kernel has to know of it, in the order of the table's columns."""
        return [self.weight.numel(), self.state.scales.stride(0), self.state.seed, self.state.first]

    @property
    def kind(self) -> Kind:
        """Types of weight and gradient, and whether it is whole tiles, and aligned."""
        whole_tiles = self.weight.numel() % (_ROWS * GROUP) == 0
        return self.weight.dtype, self.grad.dtype, whole_tiles and all(map(is_aligned, self.operands[:-1]))


class TritonUpdates:
    """Updates parts in place, all of a kind by one kernel."""

    def __init__(self, device: torch.device, *, one_by_one: bool) -> None:
        """`one_by_one`: a kernel for each part, so that others' work on it can begin while the rest is updated."""
        self._tables, self._one_by_one = LaunchTables(device), one_by_one

    def __call__(self, parts: Mapping[str, Part], scalars: Scalars, hyper: Hyperparameters, updated: Updated) -> None:
        """Enqueue the updates, by kinds; `updated` is called with a part's name when its own is."""
        kinds: dict[Kind, dict[str, Part]] = {}
        for name, part in parts.items():
            kinds.setdefault(part.kind, {})[name] = part
        for kind, alike in kinds.items():
            self._update(kind, alike, scalars, hyper, updated)

    def _update(
        self, kind: Kind, parts: Mapping[str, Part], scalars: Scalars, hyper: Hyperparameters, updated: Updated
    ) -> None:
        first = next(iter(parts.values()))
        places = [offsets(column) for column in zip(*(part.operands for part in parts.values()), strict=True)]
        rows = np.concatenate([np.stack(places, axis=1), [part.numbers for part in parts.values()]], axis=1)
        table = self._tables.numbers(kind, rows)
        tiles = [-(-part.weight.numel() // (_ROWS * GROUP)) for part in parts.values()]
        programs = self._tables.programs(tiles, _TILES)
        firsts = [0, *accumulate(-(-count // _TILES) for count in tiles)]
        launches, bounds = [list(parts)], [0, firsts[-1]]
        if self._one_by_one:
            launches, bounds = [[name] for name in parts], firsts
        beta1, beta2 = hyper.betas
        for names, begin, end in zip(launches, bounds[:-1], bounds[1:], strict=True):
            _update_kernel[(end - begin,)](
                *first.operands[:4],
                first.state.residual,
                first.state.scales,
                table,
                programs,
                begin,
                scalars.lr,
                scalars.scale,
                scalars.skip,
                scalars.step,
                scalars.bias,
                1 - beta1,
                1 - beta2,
                beta1 / (1 - beta1),
                hyper.weight_decay,
                hyper.eps,
                GROUP=GROUP,
                ROWS=_ROWS,
                TILES=_TILES,
                STAGES=_STAGES,
                FLOOR=FLOOR,
                RANGE=RANGE,
                SHIFT=_SHIFT,
                EVEN=kind[-1],
                num_warps=_WARPS,
            )
            for name in names:
                updated(name)


if triton is not None:

    @triton.jit
    def _mix(x):  # type: ignore[no-untyped-def]
        """lowbias32, a bijective hash of 32 bits."""
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _few_mixed(x):  # type: ignore[no-untyped-def]
        """A bijective hash in four instructions; over the steps of a run x takes all values, whatever the element."""
        x *= 0x9E3779B1
        return (x ^ (x >> 15)) * 0x846CA68B

    @triton.jit
    def _offset(ptr, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
        """Read an offset that is a multiple of 16 elements if `aligned`."""
        offset = tl.load(ptr)
        if aligned:
            offset = tl.multiple_of(offset, 16)
        return offset

    @triton.jit
    def _byte_to_float(x):  # type: ignore[no-untyped-def]
        """Convert int8 to float32 by the bits of 2 ** 23 + 128 + x: conversions run at an eighth of the usual rate."""
        bits = (x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388736.0

    @triton.jit
    def _code_bits(low, high):  # type: ignore[no-untyped-def]
        """Distance of two codes in float32 bits, rounded up, so that 255 codes reach `high`."""
        return (high - low + 254) // 255

    @triton.jit
    def _stored_scale(x, up: tl.constexpr):  # type: ignore[no-untyped-def]
        """Round a positive float32 up or down to a bf16; the result is still float32."""
        bits = x.to(tl.int32, bitcast=True)
        if up:
            bits += 0xFFFF
        return (bits & -0x10000).to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["first"])
    def _update_kernel(  # type: ignore[no-untyped-def]
        weight_ptr,  # [count] bf16 or float32: of the first part, as the next five; the table says where others lie
        grad_ptr,  # [count] any floating type
        exp_avg_ptr,  # [count] int8 codes of m
        exp_avg_sq_ptr,  # [count] uint8 codes of v
        residual_ptr,  # [count] int8; None for float32 weights
        scales_ptr,  # [3, groups] bf16: max |m|, least v, greatest v
        table_ptr,  # [parts, 10] int64: offsets of those six, then count, elements between rows of scales, seed, first
        stretches_ptr,  # [programs, 2] int32: part and first tile
        first,  # number of the first program
        lr_ptr,  # [] float32
        scale_ptr,  # [] float32 factor of the gradients
        skip_ptr,  # [] bool: change nothing
        step_ptr,  # [] int64 number of this step
        bias_ptr,  # [2] float64: 1 - beta ** step
        rate1,  # 1 - beta1
        rate2,  # 1 - beta2
        carry,  # beta1 / (1 - beta1)
        weight_decay,
        eps,
        GROUP: tl.constexpr,  # noqa: N803  # elements a group
        ROWS: tl.constexpr,  # noqa: N803  # groups a tile
        TILES: tl.constexpr,  # noqa: N803  # most tiles a program
        STAGES: tl.constexpr,  # noqa: N803  # tiles that are on their way at a time
        FLOOR: tl.constexpr,  # noqa: N803
        RANGE: tl.constexpr,  # noqa: N803
        SHIFT: tl.constexpr,  # noqa: N803  # _SHIFT
        EVEN: tl.constexpr,  # noqa: N803  # parts are whole tiles, and aligned
    ):
        """Update tiles `[ROWS, GROUP]` of a part; `benchmarks/adamw8_reference.py` comments on the arithmetic."""
        if tl.load(skip_ptr):
            return
        stretch_ptr = stretches_ptr + 2 * (first + tl.program_id(0))
        row_ptr = table_ptr + 10 * tl.load(stretch_ptr)
        begin = tl.load(stretch_ptr + 1)
        weight_ptr += _offset(row_ptr, EVEN)
        grad_ptr += _offset(row_ptr + 1, EVEN)
        exp_avg_ptr += _offset(row_ptr + 2, EVEN)
        exp_avg_sq_ptr += _offset(row_ptr + 3, EVEN)
        if residual_ptr is not None:
            residual_ptr += _offset(row_ptr + 4, EVEN)
        scales_ptr += tl.load(row_ptr + 5)
        count = tl.load(row_ptr + 6).to(tl.int32)
        stride = tl.load(row_ptr + 7)
        low_ptr, high_ptr = scales_ptr + stride, scales_ptr + 2 * stride
        number = tl.load(row_ptr + 9).to(tl.uint32)  # of the part's first element in its parameter
        key = _mix(tl.load(row_ptr + 8).to(tl.uint32) + tl.load(step_ptr).to(tl.uint32) * 0x9E3779B9)
        lr = tl.load(lr_ptr)
        factor = tl.load(scale_ptr)
        keep = 1 - lr * weight_decay
        root_bias2 = 1 / tl.sqrt(tl.load(bias_ptr + 1).to(tl.float32))
        by_m = lr / tl.load(bias_ptr).to(tl.float32)
        by_lost = lr * carry

        for tile in tl.range(begin, tl.minimum(begin + TILES, tl.cdiv(count, ROWS * GROUP)), num_stages=STAGES):
            row = tile * ROWS + tl.arange(0, ROWS)
            index = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            inside = (index < count) | EVEN
            row_inside = (row * GROUP < count) | EVEN

            # All loads come before the first store: loads may not pass it, and memory would idle.
            grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32) * factor
            root = _byte_to_float(tl.load(exp_avg_ptr + index, mask=inside, other=0))
            second = tl.load(exp_avg_sq_ptr + index, mask=inside, other=0).to(tl.int32)
            stored = tl.load(weight_ptr + index, mask=inside, other=0.0)
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + index, mask=inside, other=0).to(tl.int32)
            m_scale = tl.load(scales_ptr + row, mask=row_inside, other=1.0).to(tl.float32)
            low = tl.load(low_ptr + row, mask=row_inside, other=1.0).to(tl.float32).to(tl.int32, bitcast=True)
            high = tl.load(high_ptr + row, mask=row_inside, other=1.0).to(tl.float32).to(tl.int32, bitcast=True)

            m = root * tl.abs(root) * (m_scale / 16129)[:, None]
            m += rate1 * (grad - m)
            m_scale = _stored_scale(tl.maximum(tl.max(tl.abs(m), axis=1), FLOOR), True)
            y = tl.abs(m) * (16129 / m_scale)[:, None]
            root = tl.sqrt(tl.maximum(y - 0.25, 0.0)).to(tl.int32, bitcast=True)
            sign = m.to(tl.int32, bitcast=True) & -0x80000000
            shifted = (root | sign).to(tl.float32, bitcast=True) + SHIFT
            code = shifted - SHIFT
            lost = m - code * tl.abs(code) * (m_scale / 16129)[:, None]
            tl.store(exp_avg_ptr + index, shifted.to(tl.int32, bitcast=True).to(tl.int8), mask=inside)
            tl.store(scales_ptr + row, m_scale.to(tl.bfloat16), mask=row_inside)

            v = (low[:, None] + second * _code_bits(low, high)[:, None]).to(tl.float32, bitcast=True)
            v += rate2 * (grad * grad - v)
            greatest = tl.maximum(tl.max(tl.where(inside, v, 0.0), axis=1), FLOOR)
            least = tl.min(tl.where(inside, v, greatest[:, None]), axis=1)
            v_high = _stored_scale(greatest, True)
            v_low = _stored_scale(tl.maximum(tl.maximum(least, v_high * RANGE), FLOOR), False)
            tl.store(low_ptr + row, v_low.to(tl.bfloat16), mask=row_inside)
            tl.store(high_ptr + row, v_high.to(tl.bfloat16), mask=row_inside)
            low = v_low.to(tl.int32, bitcast=True)
            code_bits = tl.maximum(_code_bits(low, v_high.to(tl.int32, bitcast=True)), 1).to(tl.float32)
            y = tl.maximum(v.to(tl.int32, bitcast=True) - low[:, None], 0).to(tl.float32)  # v is not negative
            random = _few_mixed((index.to(tl.uint32) + number) ^ key)
            fraction = ((random & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
            shifted = tl.minimum(y * (1 / code_bits)[:, None] + fraction + SHIFT, SHIFT + 255)
            tl.store(exp_avg_sq_ptr + index, shifted.to(tl.int32, bitcast=True).to(tl.uint8), mask=inside)

            deviation = tl.sqrt(v) * root_bias2 + eps
            update = (m * by_m + lost * by_lost) * tl.rsqrt(deviation * deviation)  # cheaper than a division
            if residual_ptr is None:
                tl.store(weight_ptr + index, stored * keep - update, mask=inside)
            else:
                bits = (stored.to(tl.int16, bitcast=True).to(tl.int32) << 16) + (residual << 8)
                master = bits.to(tl.float32, bitcast=True) * keep - update
                # NaN, whose bits the GPU makes the greatest number, would run over
                bits = tl.minimum(master.to(tl.int32, bitcast=True), 0x7FC00000) + (random >> 24).to(tl.int32)
                upper = (bits + 0x8000) >> 16
                tl.store(weight_ptr + index, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
                tl.store(residual_ptr + index, (bits >> 8).to(tl.int8), mask=inside)
