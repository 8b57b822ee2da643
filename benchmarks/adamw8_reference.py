"""The arithmetic of adamw8's update in PyTorch, for any device; `alpacache.training.adamw8_update` is its kernel."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alpacache.training.adamw8 import AdamW8
from alpacache.training.adamw8_update import FLOOR, GROUP, RANGE, Hyperparameters, Moments, Part, Scalars
from alpacache.training.optimizers import Updated

_NAN_BITS = 0x7FC00000
_UINT32 = 0xFFFFFFFF


def update_reference(weight: Tensor, grad: Tensor, state: Moments, scalars: Scalars, hyper: Hyperparameters) -> None:
    """Update one parameter, or a shard of it, in place by torch operations."""
    if scalars.skip:
        return
    (beta1, beta2), count = hyper.betas, weight.numel()
    g = _grouped(grad.float() * scalars.scale)
    m_scale, low, high = state.scales.float()[..., None]
    code = _grouped(state.exp_avg.float())
    m = code * code.abs() * (m_scale / 16129)
    m += (1 - beta1) * (g - m)
    code, m_scale, rounded = _encode_first(m)
    state.exp_avg.copy_(code.flatten()[:count].view_as(weight))

    low, high = low.view(torch.int32), high.view(torch.int32)
    v = (low + _grouped(state.exp_avg_sq.int()) * _bits_a_code(low, high)).view(torch.float32)
    v += (1 - beta2) * (g * g - v)
    random = random_bits(state.seed, int(scalars.step), g.numel(), first=state.first).view_as(g)
    code, low, high = _encode_second(v, (random & 0x7FFFFF).float() / 2**23 - 0.5, count)
    state.exp_avg_sq.copy_(code.flatten()[:count].view_as(weight))
    state.scales.copy_(torch.cat([m_scale, low, high], dim=1).T)

    # Without bias correction the lost part counts too little in the first steps, which at worst makes them too careful.
    bias1, bias2 = scalars.bias.float()
    update = m * (scalars.lr / bias1) + (m - rounded) * (scalars.lr * (beta1 / (1 - beta1)))
    update /= v.sqrt() * (1 / bias2.sqrt()) + hyper.eps
    update, random = (x.flatten()[:count].view_as(weight) for x in (update, random))
    master = join(weight, state.residual) * (1 - scalars.lr * hyper.weight_decay) - update
    if state.residual is None:
        weight.copy_(master)
    else:
        split(master, random >> 24, weight, state.residual)


class ReferenceUpdates:
    """Updates parts without a kernel; synchronises with the device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """What `TritonUpdates` takes does not matter here."""

    def __call__(self, parts: Mapping[str, Part], scalars: Scalars, hyper: Hyperparameters, updated: Updated) -> None:
        for name, part in parts.items():
            update_reference(part.weight, part.grad, part.state, scalars, hyper)
            updated(name)


class ReferenceAdamW8(AdamW8):
    """The optimizer without its kernel."""

    updates = ReferenceUpdates


def join(weight: Tensor, residual: Tensor | None) -> Tensor:
    """Float32 master of a bf16 weight and its int8 residual; a float32 weight is its own master."""
    if residual is None:
        return weight
    return ((weight.view(torch.int16).int() << 16) + (residual.int() << 8)).view(torch.float32)


def split(master: Tensor, random: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Store a float32 master in its upper 24 bits, rounded up where its lower 8 and `random` (0 to 255) carry.

    The weight is the nearest bf16. A value beyond bf16's range becomes infinite; NaN stays NaN.
    """
    bits = torch.where(master.isnan(), _NAN_BITS, (master.view(torch.int32) + random.int()) & -0x100)
    upper = (bits + 0x8000) >> 16
    weight.copy_(upper.to(torch.int16).view(torch.bfloat16))
    residual.copy_((bits - (upper << 16)) >> 8)


def random_bits(seed: int, step: int, count: int, *, first: int = 0) -> Tensor:
    """32 random bits for each of `count` elements from number `first` on, as int64."""
    key = int(_mixed(torch.tensor((seed + step * 0x9E3779B9) & _UINT32)))
    x = (((torch.arange(first, first + count) & _UINT32) ^ key) * 0x9E3779B1) & _UINT32
    return ((x ^ (x >> 15)) * 0x846CA68B) & _UINT32


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _UINT32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def _encode_first(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode m `[groups, GROUP]`: codes -127 to 127, scales `[groups, 1]`, and the values that the codes stand for."""
    scale = _outward(m.abs().amax(dim=1, keepdim=True).clamp(min=FLOOR), up=True)
    y = m.abs() * (16129 / scale)
    root = (y - 0.25).clamp(min=0).sqrt()  # rounds at the middle of two squares, not of two roots
    code = torch.where(m < 0, -root, root).round()
    return code, scale, code * code.abs() * (scale / 16129)


def _encode_second(v: Tensor, random: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode v `[groups, GROUP]`: codes 0 to 255, least and greatest of each group `[groups, 1]`.

    `random` is in [-0.5, 0.5); `count` elements are not padding.
    """
    inside = torch.arange(v.numel()).view_as(v) < count
    greatest = torch.where(inside, v, 0.0).amax(dim=1, keepdim=True).clamp(min=FLOOR)
    least = torch.where(inside, v, greatest).amin(dim=1, keepdim=True)
    high = _outward(greatest, up=True)
    low = _outward(torch.maximum(least, high * RANGE).clamp(min=FLOOR), up=False)
    first = low.view(torch.int32)
    code_bits = _bits_a_code(first, high.view(torch.int32)).clamp(min=1).float()
    y = (v.view(torch.int32) - first).clamp(min=0).float() * (1 / code_bits)
    return (y + random).round().clamp(max=255), low, high


def _bits_a_code(low: Tensor, high: Tensor) -> Tensor:
    """Distance of two codes, given a group's extremes as int32; rounded up, so that 255 codes reach the greatest."""
    return (high - low + 254) // 255


def _outward(x: Tensor, *, up: bool) -> Tensor:
    """Round a positive float32 up or down to a bf16; the result is still float32."""
    return ((x.view(torch.int32) + (0xFFFF if up else 0)) & -0x10000).view(torch.float32)


def _grouped(x: Tensor) -> Tensor:
    """Reshape to `[groups, GROUP]`, padded with zeros."""
    return nn.functional.pad(x.flatten(), (0, -x.numel() % GROUP)).view(-1, GROUP)
