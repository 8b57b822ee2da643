"""The passes of encoding that touch every value, in torch operations: what a CPU runs.

`encode_kernels` has the same functions for GPUs, tested against these. Keys and values are bfloat16 `[layer, head,
token, channel]`, of layers that are encoded at once; groups are `[layer, head, token group, channel]` of keys and
`[layer, head, token, channel group]` of values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cache_store.kv.affine import ERROR_STEPS, TRIED, WEIGHT_STEPS

AT_ONCE = 2**24
"""Elements of keys, or of values, encoded at once; each takes about 80 bytes of temporary memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Bounds that decide the scales and zeros of groups; float32, of the groups' shape or broadcast to it.

    Zeros of keys are within 32767 of 0, those of values are codes.
    """

    sums: Tensor
    """Least plus greatest member."""
    needed: Tensor
    """Smallest scale that covers a group."""
    least: Tensor | None
    """Lower bound of the scales of keys, as far as the table goes; None for values."""
    levels: Tensor
    """Greatest code, `[channel]` of keys in stored order or `[1]`."""
    table: Tensor
    """`[layer, 256]` scales, rising."""


def key_extremes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Least and greatest member of each group of keys, float32."""
    grouped = _by_tokens(x, group)
    return grouped.amin(3).float(), grouped.amax(3).float()


def value_extremes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Least and greatest member of each group of values, float32."""
    grouped = x.reshape(*x.shape[:-1], -1, group)
    return grouped.amin(-1).float(), grouped.amax(-1).float()


def energy(x: Tensor, largest: Tensor) -> Tensor:
    """`[layer, head, channel]`: sum over tokens of squares in fixed point, int64; `largest` is float32 `[layer]`."""
    steps = torch.round(x / largest.view(-1, 1, 1, 1) * WEIGHT_STEPS).long()
    return (steps * steps).sum(-2)


def fit_keys(x: Tensor, order: Tensor | None, groups: Groups, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of each group's scale (uint8), its zero (int16), and codes (int16, the shape of x) in stored order.

    `order` is the channel at each place, `[layer, head, channel]`; None leaves channels where they are.
    """
    grouped, tokens = _by_tokens(x, group), x.shape[2]
    if order is not None:
        grouped = torch.gather(grouped, -1, order[:, :, None, None].expand_as(grouped))
    places = torch.arange(grouped.shape[2] * group, device=x.device)
    index, zero, codes = _fit(grouped.float(), -2, groups, (places < tokens).view(-1, group, 1))
    return index, zero, codes.flatten(2, 3)[:, :, :tokens]


def fit_values(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Index of each group's scale (uint8), its zero (uint8), and codes (int16, the shape of x)."""
    grouped = x.reshape(*groups.needed.shape, -1)
    index, zero, codes = _fit(grouped.float(), -1, groups, torch.ones((), dtype=torch.bool, device=x.device))
    return index, zero.to(torch.uint8), codes.flatten(-2)


def pack(codes: Tensor, first: int, count: int, done: int, plane: int, out: Tensor) -> None:
    """Pack a bit plane of `count` channels from `first` on into `out`, `[layer, bytes]` uint8 with any stride.

    `done`: bits of a code in the planes before; `plane`: bits in this one, a divisor of 8.
    """
    bits = (codes[..., first : first + count] >> done) & (2**plane - 1)
    parts = bits.reshape(*bits.shape[:-1], -1, 8 // plane)
    packed = parts[..., 0].clone()
    for i in range(1, 8 // plane):
        packed |= parts[..., i] << (i * plane)
    out.copy_(packed.flatten(1))


def search(table: Tensor, needed: Tensor) -> Tensor:
    """Index of the first scale in each layer's table that is as large, or the last; int64."""
    return torch.searchsorted(table, needed.flatten(1).contiguous()).clamp(max=255).view(needed.shape)


def scales(table: Tensor, index: Tensor) -> Tensor:
    """Scales `[layer, ...]` by their indices in each layer's table."""
    return torch.gather(table, 1, index.flatten(1)).view(index.shape)


def _by_tokens(x: Tensor, group: int) -> Tensor:
    """`[layer, head, token group, member, channel]`."""
    last = x[:, :, -1:].expand(-1, -1, -x.shape[2] % group, -1)
    padded = torch.cat([x, last], 2)  # repeats change neither minimum nor maximum
    return padded.reshape(*x.shape[:2], -1, group, x.shape[3])


def _fit(x: Tensor, axis: int, groups: Groups, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    table, levels, first = groups.table, groups.levels, search(groups.table, groups.needed)
    lowest = torch.zeros_like(first) if groups.least is None else search(table, groups.least)
    unit = scales(table, first).unsqueeze(axis)
    best: list[Tensor] = []
    for step in TRIED:
        index = torch.maximum(first + step, lowest).clamp(max=255)
        scale = scales(table, index)
        zero = torch.round((levels - groups.sums / scale) / 2)
        zero = zero.clamp(min=0).minimum(levels) if groups.least is None else zero.clamp(-32767, 32767)
        wide_scale, wide_zero = scale.unsqueeze(axis), zero.unsqueeze(axis)
        codes = torch.minimum((torch.round(x / wide_scale) + wide_zero).clamp(min=0), levels)
        back = ((codes - wide_zero) * wide_scale).to(torch.bfloat16).float()
        error = torch.round((x - back) / unit * ERROR_STEPS).long() * members
        tried = [(error * error).sum(axis), index, zero, codes]
        if best:
            better = tried[0] < best[0]
            wide = better.unsqueeze(axis)
            tried = [torch.where(wide if a.ndim == x.ndim else better, a, b) for a, b in zip(tried, best, strict=True)]
        best = tried
    return best[1].to(torch.uint8), best[2].to(torch.int16), best[3].to(torch.int16)
