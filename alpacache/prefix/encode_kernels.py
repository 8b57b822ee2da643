"""The functions of `codec_passes` as Triton kernels, bit-equal to them.

In torch each operation of the search for a scale reads and writes every value, about 780 bytes of traffic for each in
all; here it is about 16. Keys and values are read once for extremes, once for weights (keys) and once for codes, which
go through memory as int16, because their bit planes run along channels and groups of keys do not. Encoding a sample of
850 tokens in int8 takes 4.8 ms instead of 25.6, on an H100 (`benchmarks/results/encode_nvidia-h100-80gb-hbm3_*`).

Results do not depend on the hardware: division is IEEE's (Triton's `/` is not), rounding is exact integer or float
arithmetic, squares are summed as int64, and products are not fused with sums.

A lane is a group. Lanes of keys are channels of the same tokens, neighbours in memory; of values, the members of a lane
are. The last axis of a tile is the one along which memory is contiguous. Compile-time constants are in capitals.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpacache.prefix.codec_passes import Groups
from cache_store.kv.affine import ERROR_STEPS, TRIED, WEIGHT_STEPS

AT_ONCE = 2**28
"""Elements of keys, or of values, encoded at once; each takes about 4 bytes of temporary memory."""
_KEY_LANES = 128
_KEY_MEMBERS, _FITTED_MEMBERS = 8, 4
"""Tokens of a tile of keys, and of one where scales are tried; a program steps through its groups by these."""
_TILE = 1024
"""Elements of a tile of values, which holds its lanes whole."""
_ENERGY_TOKENS = 64
_PACKED = 1024
"""Codes that a program packs."""


@triton.jit
def _rint(x):  # type: ignore[no-untyped-def]
    """Nearest integer, half to even, of magnitudes below 2^22. Codes and zeros are below 2^16, errors below 2^18."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _as_bfloat16(x):  # type: ignore[no-untyped-def]
    """The nearest bfloat16, ties to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x, scale, zero, level):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(_rint(tl.div_rn(x, scale)) + zero, 0.0), level)


@triton.jit
def _search(table, needed):  # type: ignore[no-untyped-def]
    """Index of the first of 256 rising scales that is as large, or the last."""
    index = tl.zeros(needed.shape, tl.int32)
    for power in tl.static_range(7, -1, -1):
        below = tl.load(table + index + (1 << power) - 1) < needed
        index += tl.where(below, 1 << power, 0)
    return index


@triton.jit
def _places(lane, lanes, tokens, KEYS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets in a layer of the lanes' groups, for keys their channel and head, and the number of their members.

    Lanes beyond the last have no members; keys find that out by rows, or the compiler could not use wide loads.
    """
    if KEYS:
        row, channel = lane // CHANNELS, lane % CHANNELS
        groups = (tokens + GROUP - 1) // GROUP
        head, first = row // groups, row % groups * GROUP
        begin = (head * tokens + first) * CHANNELS
        members = tl.where(row < lanes // CHANNELS, tl.minimum(tokens - first, GROUP), 0)
    else:
        begin, channel, head = lane * GROUP, lane * 0, lane * 0
        members = tl.where(lane < lanes, GROUP, 0)
    return begin, channel, head, members


@triton.jit
def _wide(lane_at, member, KEYS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of a tile: `[member, lane]` of keys, `[lane, member]` of values."""
    if KEYS:
        at = lane_at[None, :] + member[:, None] * CHANNELS
    else:
        at = lane_at[:, None] + member[None, :]
    return at


@triton.jit
def _loaded(x, at, valid):  # type: ignore[no-untyped-def]
    """Load bits of bfloat16 as float32."""
    return (tl.load(x + at, mask=valid, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["layer_stride", "tokens", "lanes"])
def group_extremes(  # type: ignore[no-untyped-def]
    x,  # bits of bfloat16 as int16 [layers, head, token, channel], layers with a stride of their own
    low,  # float32 [layers, lane], written
    high,  # float32 [layers, lane], written
    layer_stride,  # elements from one layer of x to the next
    tokens,  # tokens of the sample
    lanes,  # groups of a layer
    KEYS: tl.constexpr,  # keys, grouped by tokens; else values, grouped by channels
    CHANNELS: tl.constexpr,  # channels of a head
    GROUP: tl.constexpr,  # members of a group
    LANES: tl.constexpr,  # groups of a program
    MEMBERS: tl.constexpr,  # members of each group that are processed at a time
):
    """Least and greatest member of each group, float32 `[layer, lane]`."""
    axis: tl.constexpr = 0 if KEYS else 1
    layer = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    begin, channel, _, members = _places(lane, lanes, tokens, KEYS, CHANNELS, GROUP)
    x += tl.multiple_of(layer * layer_stride, 8)
    member = tl.arange(0, MEMBERS)
    infinite = _wide(lane * 0, member * 0, KEYS, CHANNELS) + float("inf")
    least, greatest = infinite, -infinite
    for start in range(0, GROUP, MEMBERS):
        valid = _wide(lane * 0, start + member, KEYS, 1) < tl.expand_dims(members, axis)
        value = _loaded(x, _wide(begin + channel, start + member, KEYS, CHANNELS), valid)
        least = tl.minimum(least, tl.where(valid, value, float("inf")))
        greatest = tl.maximum(greatest, tl.where(valid, value, -float("inf")))
    tl.store(low + layer * lanes + lane, tl.min(least, axis), mask=lane < lanes)
    tl.store(high + layer * lanes + lane, tl.max(greatest, axis), mask=lane < lanes)


@triton.jit(do_not_specialize=["layer_stride", "tokens", "lanes"])
def group_energy(  # type: ignore[no-untyped-def]
    x,  # bits of bfloat16 as int16 [layers, head, token, channel], layers with a stride of their own
    largest,  # float32 [layers], the largest magnitude
    sums,  # int64 [layers, lane], written
    layer_stride,  # elements from one layer of x to the next
    tokens,  # tokens of the sample
    lanes,  # groups of a layer
    STEPS: tl.constexpr,  # fixed-point resolution
    CHANNELS: tl.constexpr,  # channels of a head
    GROUP: tl.constexpr,  # members of a group
    LANES: tl.constexpr,  # groups of a program
    MEMBERS: tl.constexpr,  # members of each group that are processed at a time
):
    """Sum of squares of each group of keys in fixed point, int64 `[layer, lane]`."""
    layer = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    begin, channel, _, members = _places(lane, lanes, tokens, True, CHANNELS, GROUP)
    x += tl.multiple_of(layer * layer_stride, 8)
    most = tl.load(largest + layer)
    member = tl.arange(0, MEMBERS)
    total = tl.zeros([MEMBERS, LANES], tl.int64)
    for start in range(0, GROUP, MEMBERS):
        valid = _wide(lane * 0, start + member, True, 1) < members[None, :]
        value = _loaded(x, _wide(begin + channel, start + member, True, CHANNELS), valid)
        steps = _rint(tl.div_rn(value, most) * STEPS).to(tl.int64)
        total += steps * steps
    tl.store(sums + layer * lanes + lane, tl.sum(total, 0), mask=lane < lanes)


@triton.jit(do_not_specialize=["layer_stride", "tokens", "lanes"])
def fit(  # type: ignore[no-untyped-def]
    x,  # bits of bfloat16 as int16 [layers, head, token, channel], layers with a stride of their own
    order,  # int64 [layers, head, channel], the channel at each place, if ORDERED
    group_sums,  # float32 [layers, lane], least plus greatest member
    needed,  # float32 [layers, lane], the scale that covers the group
    least,  # float32 [layers, lane], lower bound of the scale; None for values
    levels,  # float32 [LEVELS], greatest code
    table,  # float32 [layers, 256], rising scales
    indices,  # uint8 [layers, lane], index of the chosen scale, written
    zeros,  # int16 (keys) or uint8 [layers, lane], written
    codes,  # int16 like x, in stored order, written
    layer_stride,  # elements from one layer of x to the next
    tokens,  # tokens of the sample
    lanes,  # groups of a layer
    KEYS: tl.constexpr,  # keys, grouped by tokens; else values, grouped by channels
    ORDERED: tl.constexpr,  # whether keys are reordered
    LEVELS: tl.constexpr,  # channels with levels of their own, or 1
    TRIED: tl.constexpr,  # steps of the table from the covering scale to try
    STEPS: tl.constexpr,  # fixed-point resolution
    CHANNELS: tl.constexpr,  # channels of a head
    GROUP: tl.constexpr,  # members of a group
    LANES: tl.constexpr,  # groups of a program
    MEMBERS: tl.constexpr,  # members of each group that are processed at a time
):
    """The scale of least squared error among `TRIED`, the first of several, and its zero and codes.

    Members are read again for every scale, from the cache, and codes of the best are computed once more: that is
    cheaper than keeping them. Nothing is stored for lanes or members that do not exist.
    """
    axis: tl.constexpr = 0 if KEYS else 1
    layer = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < lanes
    begin, channel, head, members = _places(lane, lanes, tokens, KEYS, CHANNELS, GROUP)
    members = tl.expand_dims(members, axis)
    source = begin + channel
    if ORDERED:
        heads = lanes // (CHANNELS * ((tokens + GROUP - 1) // GROUP))
        source = begin + tl.load(order + (layer * heads + head) * CHANNELS + channel, mask=inside, other=0).to(tl.int32)
    x += tl.multiple_of(layer * layer_stride, 8)
    table += layer * 256
    here = layer * lanes + lane
    middle = tl.load(group_sums + here, mask=inside, other=0.0)
    first = _search(table, tl.load(needed + here, mask=inside, other=0.0))
    lowest = first * 0
    if KEYS:
        lowest = _search(table, tl.load(least + here, mask=inside, other=0.0))
    level = tl.load(levels + lane % LEVELS)
    wide_level = tl.expand_dims(level, axis)
    unit = tl.expand_dims(tl.load(table + first), axis)
    member = tl.arange(0, MEMBERS)

    best_error = tl.zeros([LANES], tl.int64)
    best_index, best_scale, best_zero = first, level, level
    for attempt in tl.static_range(len(TRIED)):
        index = tl.minimum(tl.maximum(first + TRIED[attempt], lowest), 255)
        scale = tl.load(table + index)
        zero = _rint((level - tl.div_rn(middle, scale)) * 0.5)
        if KEYS:
            zero = tl.minimum(tl.maximum(zero, -32767.0), 32767.0)
        else:
            zero = tl.minimum(tl.maximum(zero, 0.0), level)
        wide_scale, wide_zero = tl.expand_dims(scale, axis), tl.expand_dims(zero, axis)
        total = tl.zeros([MEMBERS, LANES] if KEYS else [LANES, MEMBERS], tl.int64)
        for start in range(0, GROUP, MEMBERS):
            valid = _wide(lane * 0, start + member, KEYS, 1) < members
            value = _loaded(x, _wide(source, start + member, KEYS, CHANNELS), valid)
            back = _as_bfloat16((_codes(value, wide_scale, wide_zero, wide_level) - wide_zero) * wide_scale)
            error = _rint(tl.div_rn(value - back, unit) * STEPS).to(tl.int64)
            total += tl.where(valid, error * error, 0)
        error_sum = tl.sum(total, axis)
        better = (error_sum < best_error) if attempt > 0 else (error_sum == error_sum)
        best_error = tl.where(better, error_sum, best_error)
        best_index = tl.where(better, index, best_index)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)

    tl.store(indices + here, best_index.to(tl.uint8), mask=inside)
    tl.store(zeros + here, best_zero.to(tl.int32).to(zeros.dtype.element_ty), mask=inside)
    codes += layer * (lanes // ((tokens + GROUP - 1) // GROUP) * tokens if KEYS else lanes * GROUP)
    wide_scale, wide_zero = tl.expand_dims(best_scale, axis), tl.expand_dims(best_zero, axis)
    for start in range(0, GROUP, MEMBERS):
        valid = _wide(lane * 0, start + member, KEYS, 1) < members
        value = _loaded(x, _wide(source, start + member, KEYS, CHANNELS), valid)
        code = _codes(value, wide_scale, wide_zero, wide_level).to(tl.int32)
        tl.store(codes + _wide(begin + channel, start + member, KEYS, CHANNELS), code.to(tl.int16), mask=valid)


@triton.jit(
    do_not_specialize=["out_stride", "size", "row_bytes", "first", "done"], do_not_specialize_on_alignment=["out"]
)
def pack_plane(  # type: ignore[no-untyped-def]
    codes,  # int16 [layers, head, token, channel]
    out,  # uint8 [layers, size] with a stride, written
    out_stride,  # bytes from one layer of out to the next
    size,  # bytes of a layer's plane
    row_bytes,  # bytes of a token's plane
    first,  # first channel of the class
    done,  # bits in the planes before
    CHANNELS: tl.constexpr,  # channels of a head
    PLANE: tl.constexpr,  # bits in this plane, a divisor of 8
    PARTS: tl.constexpr,  # codes in a byte
    BYTES: tl.constexpr,  # bytes that a program writes
):
    """Bits `done` to `done + PLANE` of codes from channel `first` on, `row_bytes` of each row of channels."""
    layer = tl.program_id(1).to(tl.int64)
    byte, part = tl.program_id(0) * BYTES + tl.arange(0, BYTES), tl.arange(0, PARTS)
    inside = byte < size
    at = tl.multiple_of(byte // row_bytes * CHANNELS + first + byte % row_bytes * PARTS, PARTS)
    codes += layer * (size // row_bytes) * CHANNELS
    code = tl.load(codes + at[:, None] + part[None, :], mask=inside[:, None], other=0).to(tl.int32)
    bits = ((code >> done) & ((1 << PLANE) - 1)) << (part * PLANE)[None, :]
    tl.store(out + layer * out_stride + byte, tl.sum(bits, 1).to(tl.uint8), mask=inside)


def key_extremes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """See `codec_passes`, like the functions that follow."""
    shape = (*x.shape[:2], triton.cdiv(x.shape[2], group), x.shape[3])
    return _extremes(x, shape, _key_tile(x, group))


def value_extremes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return _extremes(x, (*x.shape[:3], x.shape[3] // group), _value_tile(x, group))


def energy(x: Tensor, largest: Tensor) -> Tensor:
    tile = _key_tile(x, _ENERGY_TOKENS)
    del tile["KEYS"]
    shape = (*x.shape[:2], triton.cdiv(x.shape[2], _ENERGY_TOKENS), x.shape[3])
    sums = torch.empty(shape, dtype=torch.int64, device=x.device)
    _launch(group_energy, x, (largest, sums), sums, tile | {"STEPS": WEIGHT_STEPS, "enable_fp_fusion": False})
    return sums.sum(2)


def fit_keys(x: Tensor, order: Tensor | None, groups: Groups, group: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fit(x, order, groups, torch.int16, _key_tile(x, group) | {"MEMBERS": _FITTED_MEMBERS})


def fit_values(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    return _fit(x, None, groups, torch.uint8, _value_tile(x, x.shape[3] // groups.needed.shape[3]))


def pack(codes: Tensor, first: int, count: int, done: int, plane: int, out: Tensor) -> None:
    layers, size = out.shape
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        pack_plane[triton.cdiv(size, _PACKED * plane // 8), layers](
            codes, out, out.stride(0), size, count * plane // 8, first, done,
            CHANNELS=codes.shape[3], PLANE=plane, PARTS=8 // plane, BYTES=_PACKED * plane // 8, num_warps=4,
        )  # fmt: skip


def _extremes(x: Tensor, shape: tuple[int, ...], tile: dict[str, Any]) -> tuple[Tensor, Tensor]:
    low, high = (torch.empty(shape, device=x.device) for _ in range(2))
    _launch(group_extremes, x, (low, high), low, tile)
    return low, high


def _fit(
    x: Tensor, order: Tensor | None, groups: Groups, zero: torch.dtype, tile: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    shape, device = groups.needed.shape, x.device
    indices, zeros = (torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.uint8, zero))
    codes = torch.empty(x.shape, dtype=torch.int16, device=device)
    tensors = (order, groups.sums, groups.needed, groups.least, groups.levels, groups.table, indices, zeros, codes)
    settings = {"ORDERED": order is not None, "LEVELS": len(groups.levels), "TRIED": TRIED, "STEPS": ERROR_STEPS}
    _launch(fit, x, tensors, indices, tile | settings | {"enable_fp_fusion": False})
    return indices, zeros, codes


def _key_tile(x: Tensor, group: int) -> dict[str, Any]:
    lanes = {"LANES": _KEY_LANES, "MEMBERS": _KEY_MEMBERS, "num_warps": 4}
    return {"KEYS": True, "CHANNELS": x.shape[3], "GROUP": group, **lanes}


def _value_tile(x: Tensor, group: int) -> dict[str, Any]:
    members = triton.next_power_of_2(group)
    lanes = {"LANES": _TILE // members, "MEMBERS": members, "num_warps": 4}
    return {"KEYS": False, "CHANNELS": x.shape[3], "GROUP": group, **lanes}


def _launch(kernel: Any, x: Tensor, tensors: tuple[Any, ...], each: Tensor, options: dict[str, Any]) -> None:
    """Launch over the lanes of `each`, which has one number a group of `x`; layers may have any stride.

    Kernels get bfloat16 as bits, since the interpreter does not round its conversions. Triton launches on the current
    device, wherever the arguments lie.
    """
    if not x[0].is_contiguous():
        raise ValueError(f"keys or values have strides {x.stride()}; expected contiguous layers.")
    lanes = each[0].numel()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[triton.cdiv(lanes, options["LANES"]), len(x)](
            x.view(torch.int16), *tensors, x.stride(0), x.shape[2], lanes, **options
        )
