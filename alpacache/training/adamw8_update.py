"""One 8-bit AdamW update as a Triton kernel; `benchmarks/adamw8_reference.py` has its arithmetic in PyTorch."""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from alpacache.errors import UsageError

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only install
    triton = None

GROUP = 128
_ROWS, _WARPS = 4, 1
"""Groups and warps a program: 512 elements, 16 a thread, and no other warp to wait for. The best of seven shapes: on an
H200 an update of 2.28 B parameters takes 9.2 ms, with 8 groups and 4 warps 9.7."""
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


def update_triton(weight: Tensor, grad: Tensor, state: Moments, scalars: Scalars, hyper: Hyperparameters) -> None:
    """Update one parameter, or a shard of it, in place by one kernel."""
    beta1, beta2 = hyper.betas
    programs = triton.cdiv(weight.numel(), _ROWS * GROUP)
    _update_kernel[(programs,)](
        weight,
        grad.contiguous(),
        state.exp_avg,
        state.exp_avg_sq,
        state.scales,
        state.scales.stride(0),
        state.residual,
        scalars.lr,
        scalars.scale,
        scalars.skip,
        scalars.step,
        scalars.bias,
        state.seed,
        state.first,
        weight.numel(),
        1 - beta1,
        1 - beta2,
        beta1 / (1 - beta1),
        hyper.weight_decay,
        hyper.eps,
        GROUP=GROUP,
        ROWS=_ROWS,
        FLOOR=FLOOR,
        RANGE=RANGE,
        SHIFT=_SHIFT,
        EVEN=weight.numel() % (_ROWS * GROUP) == 0,
        num_warps=_WARPS,
    )


if triton is not None:

    @triton.jit
    def _mix(x):  # type: ignore[no-untyped-def]
        """lowbias32, a bijective hash of 32 bits."""
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

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

    @triton.jit(do_not_specialize=["seed", "first", "scales_stride"])
    def _update_kernel(  # type: ignore[no-untyped-def]
        weight_ptr,  # [count] bf16 or float32
        grad_ptr,  # [count] any floating type
        exp_avg_ptr,  # [count] int8 codes of m
        exp_avg_sq_ptr,  # [count] uint8 codes of v
        scales_ptr,  # [3, groups] bf16: max |m|, least v, greatest v
        scales_stride,  # elements between rows of scales
        residual_ptr,  # [count] int8; None for float32 weights
        lr_ptr,  # [] float32
        scale_ptr,  # [] float32 factor of the gradients
        skip_ptr,  # [] bool: change nothing
        step_ptr,  # [] int64 number of this step
        bias_ptr,  # [2] float64: 1 - beta ** step
        seed,  # hash of the parameter's name
        first,  # number of the parameter's element at index 0
        count,  # elements
        rate1,  # 1 - beta1
        rate2,  # 1 - beta2
        carry,  # beta1 / (1 - beta1)
        weight_decay,
        eps,
        GROUP: tl.constexpr,  # noqa: N803  # elements a group
        ROWS: tl.constexpr,  # noqa: N803  # groups a program
        FLOOR: tl.constexpr,  # noqa: N803
        RANGE: tl.constexpr,  # noqa: N803
        SHIFT: tl.constexpr,  # noqa: N803  # _SHIFT
        EVEN: tl.constexpr,  # noqa: N803  # count is a multiple of ROWS * GROUP
    ):
        """Update a tile `[ROWS, GROUP]`; comments on the arithmetic are in `benchmarks/adamw8_reference.py`."""
        if tl.load(skip_ptr):
            return
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        index = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (index < count) | EVEN
        row_inside = (row * GROUP < count) | EVEN
        m_scale_ptr = scales_ptr + row
        low_ptr, high_ptr = m_scale_ptr + scales_stride, m_scale_ptr + 2 * scales_stride

        # All loads come before the first store: loads may not pass it, and memory would idle.
        grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
        root = _byte_to_float(tl.load(exp_avg_ptr + index, mask=inside, other=0))
        second = tl.load(exp_avg_sq_ptr + index, mask=inside, other=0).to(tl.int32)
        stored = tl.load(weight_ptr + index, mask=inside, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + index, mask=inside, other=0).to(tl.int32)
        m_scale = tl.load(m_scale_ptr, mask=row_inside, other=1.0).to(tl.float32)
        low = tl.load(low_ptr, mask=row_inside, other=1.0).to(tl.float32).to(tl.int32, bitcast=True)
        high = tl.load(high_ptr, mask=row_inside, other=1.0).to(tl.float32).to(tl.int32, bitcast=True)
        bias1 = tl.load(bias_ptr).to(tl.float32)
        bias2 = tl.load(bias_ptr + 1).to(tl.float32)
        lr = tl.load(lr_ptr)
        step = tl.load(step_ptr).to(tl.uint32)

        m = root * tl.abs(root) * (m_scale / 16129)[:, None]
        m += rate1 * (grad - m)
        m_scale = _stored_scale(tl.maximum(tl.max(tl.abs(m), axis=1), FLOOR), True)
        y = tl.abs(m) * (16129 / m_scale)[:, None]
        root = tl.sqrt(tl.maximum(y - 0.25, 0.0))
        shifted = tl.where(m < 0, -root, root) + SHIFT
        code = shifted - SHIFT
        lost = m - code * tl.abs(code) * (m_scale / 16129)[:, None]
        tl.store(exp_avg_ptr + index, shifted.to(tl.int32, bitcast=True).to(tl.int8), mask=inside)
        tl.store(m_scale_ptr, m_scale.to(tl.bfloat16), mask=row_inside)

        v = (low[:, None] + second * _code_bits(low, high)[:, None]).to(tl.float32, bitcast=True)
        v += rate2 * (grad * grad - v)
        greatest = tl.maximum(tl.max(tl.where(inside, v, 0.0), axis=1), FLOOR)
        least = tl.min(tl.where(inside, v, greatest[:, None]), axis=1)
        v_high = _stored_scale(greatest, True)
        v_low = _stored_scale(tl.maximum(tl.maximum(least, v_high * RANGE), FLOOR), False)
        tl.store(low_ptr, v_low.to(tl.bfloat16), mask=row_inside)
        tl.store(high_ptr, v_high.to(tl.bfloat16), mask=row_inside)
        low = v_low.to(tl.int32, bitcast=True)
        code_bits = tl.maximum(_code_bits(low, v_high.to(tl.int32, bitcast=True)), 1).to(tl.float32)
        y = (tl.maximum(v, v_low[:, None]).to(tl.int32, bitcast=True) - low[:, None]).to(tl.float32)
        random = _mix((index + first).to(tl.uint32) ^ _mix(seed.to(tl.uint32) + step * 0x9E3779B9))
        fraction = ((random >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
        shifted = tl.minimum(y * (1 / code_bits)[:, None] + fraction + SHIFT, SHIFT + 255)
        tl.store(exp_avg_sq_ptr + index, shifted.to(tl.int32, bitcast=True).to(tl.uint8), mask=inside)

        deviation = tl.sqrt(v) * (1 / tl.sqrt(bias2)) + eps
        update = (m * (1 / bias1) + carry * lost) * tl.rsqrt(deviation * deviation)  # cheaper than a division
        if residual_ptr is None:
            master = stored * (1 - lr * weight_decay) - lr * update
            tl.store(weight_ptr + index, master, mask=inside)
        else:
            bits = (stored.to(tl.int16, bitcast=True).to(tl.int32) << 16) + (residual << 8)
            master = bits.to(tl.float32, bitcast=True) * (1 - lr * weight_decay) - lr * update
            bits = tl.minimum(tl.maximum(master, -3.3895313892515355e38), 3.3895313892515355e38)
            bits = (bits.to(tl.int32, bitcast=True) + (random & 0xFF).to(tl.int32)) & -0x100
            bits = tl.where(master == master, bits, 0x7FC00000)
            upper = (bits + 0x8000) >> 16
            tl.store(weight_ptr + index, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
            tl.store(residual_ptr + index, ((bits - (upper << 16)) >> 8).to(tl.int8), mask=inside)
