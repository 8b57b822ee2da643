"""Triton kernels of the codec `transform`, and what a GPU does around them with matrix products.

A thread decodes a stream, that of a token (or of a share of its components), so that all threads go through the
components, and through the tables of their classes, in step. Values in steps are written as float16 `[component,
token]`, as a matrix product takes them; a second kernel adds means, scales, turns keys and writes bfloat16. Encoding is
the same backwards, with products in float32, as a code must not depend on them where it can be helped.

Nothing is read beyond a sample's row whatever its bytes say. A stream that does not end as it was begun leaves NaN,
which the loss does not survive; what is read from a store has passed its checksums by then.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from alpacache.prefix.calibration import angles_of, turned, value_sizes
from alpacache.prefix.packed import PackedPrefixes
from cache_store.kv.layered import MAX_VALUE
from cache_store.kv.transform import LARGEST, MAX_POSITION, ROUNDING, SIZES, TOTAL, TransformCodec, TransformTables

_LANES = 32
"""Streams of a program of one warp."""
_TOKENS = 16
"""Tokens of a head that a program of `finish_layers` writes."""


@triton.jit
def _refill(x, at, begin, live, words):  # type: ignore[no-untyped-def]
    """States with a word more where they are below 65536, and the places of the streams' next words."""
    need = (x < 65536) & live
    at -= need.to(tl.int32)
    word = tl.load(words + tl.maximum(at, 0), mask=need & (at >= begin), other=0)
    return tl.where(need, (x << 16) | word.to(tl.uint32), x), at


@triton.jit
def decode_streams(  # type: ignore[no-untyped-def]
    codes,  # float16 [component, sample, longest], written
    data,  # uint8 [rows, row_bytes], encoded samples
    rows,  # int64 [B], each sample's row
    lengths,  # int64 [B], each sample's tokens
    row_bytes,  # bytes of a row
    tables,  # int32 [class, 4096]: symbol, frequency less 1 and place in it, of 8, 12 and 12 bits
    runs,  # int32 [part, run, 4] of the group: class, first and last step, low bits
    shift,  # float32 [class, 2]
    n_runs,  # runs of each part
    group,  # number of the group that is decoded
    groups,  # groups of the codec
    layers,  # layers of the codec, all groups together
    longest,  # tokens that the output has room for
    columns,  # B * longest
    PARTS: tl.constexpr,  # streams of a token
    BLOCK: tl.constexpr,  # tokens of a program
):
    """Values in steps of one group of every sample; tokens beyond a sample's own are left as they are."""
    block, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tl.load(lengths + sample).to(tl.int32)
    if block * BLOCK < tokens:
        token = block * BLOCK + tl.arange(0, BLOCK)
        real = token < tokens
        row = data + tl.load(rows + sample) * row_bytes
        lanes = groups * PARTS * tokens
        lane = (group * PARTS + part) * tokens + token
        states = (row + 12 * tokens).to(tl.pointer_type(tl.uint32))
        ends = (row + 12 * tokens + 4 * lanes.to(tl.int64)).to(tl.pointer_type(tl.int32))
        first_word = ((12 + layers) * tokens + 8 * lanes.to(tl.int64) + 3) // 4 * 4
        words = (row + first_word).to(tl.pointer_type(tl.uint16))
        most = ((row_bytes - first_word) // 2).to(tl.int32)
        x = tl.load(states + lane, mask=real, other=0)
        live = x >= 65536
        x = tl.where(live, x, 65536)
        at = tl.maximum(tl.minimum(tl.load(ends + lane, mask=real, other=0), most), 0)
        begin = tl.maximum(tl.minimum(tl.load(ends + lane - 1, mask=real & (lane > 0), other=0), at), 0)
        target = codes + sample.to(tl.int64) * longest + token
        for run in range(0, n_runs):
            about = runs + 4 * (part * n_runs + run)
            of_class, first, last, low = tl.load(about), tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
            table, mask = tables + of_class * 4096, (1 << low) - 1
            one, more = tl.load(shift + 2 * of_class), tl.load(shift + 2 * of_class + 1)
            for step in range(first, last):
                entry = tl.load(table + (x & 4095).to(tl.int32)).to(tl.uint32, bitcast=True)
                x = (((entry >> 12) & 4095) + 1) * (x >> 12) + (entry & 4095)
                x, at = _refill(x, at, begin, live, words)
                code = (entry >> 24).to(tl.int32) - 127
                if low > 0:
                    code = (code << low) | (x.to(tl.int32, bitcast=True) & mask)
                    x = x >> low.to(tl.uint32)
                    x, at = _refill(x, at, begin, live, words)
                size = tl.abs(code).to(tl.float32)
                size -= tl.where(size == 1.0, one, tl.where(size > 1.0, more, 0.0))
                value = tl.where(code < 0, -size, size)
                component = step * PARTS + part
                tl.store(target + component.to(tl.int64) * columns, value.to(tl.float16), mask=real)
        wrong = live & ((x != 65536) | (at != begin))
        tl.store(target + part * columns, float("nan"), mask=real & wrong)


@triton.jit
def finish_layers(  # type: ignore[no-untyped-def]
    scratch,  # uint8 [B, scratch_row], written: bfloat16 [layer of the group, 2, head, longest, channel]
    scratch_row,  # bytes of a row of `scratch`
    product,  # float16 [B * longest, N], values in units of their channels' scales
    data,  # uint8 [rows, row_bytes], encoded samples
    rows,  # int64 [B]
    lengths,  # int64 [B]
    row_bytes,  # bytes of a row
    mean,  # float32 [N]
    scale,  # float32 [N]
    sizes,  # float32 [256]
    angles,  # float32 [HALF]
    axes,  # int32 [HALF]
    group,  # number of the group that is decoded
    groups,  # groups of the codec
    first_layer,  # the group's first layer
    layers,  # layers of the codec, all groups together
    longest,  # tokens that the output has room for
    width,  # N
    PARTS: tl.constexpr,  # streams of a token
    HEADS: tl.constexpr,  # KV heads
    HALF: tl.constexpr,  # pairs of channels
    WIDE: tl.constexpr,  # the power of two from HALF on
    BLOCK: tl.constexpr,  # tokens of a program
):
    """Keys and values of one head and layer; those of tokens that are stored as they are from their words."""
    block, of_head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, head = of_head // HEADS, of_head % HEADS
    tokens = tl.load(lengths + sample).to(tl.int32)
    if block * BLOCK < tokens:
        token = block * BLOCK + tl.arange(0, BLOCK)
        real = token < tokens
        row = data + tl.load(rows + sample) * row_bytes
        lanes = groups * PARTS * tokens
        lane = group * PARTS * tokens + token
        states = (row + 12 * tokens).to(tl.pointer_type(tl.uint32))
        ends = (row + 12 * tokens + 4 * lanes.to(tl.int64)).to(tl.pointer_type(tl.int32))
        first_word = ((12 + layers) * tokens + 8 * lanes.to(tl.int64) + 3) // 4 * 4
        words = (row + first_word).to(tl.pointer_type(tl.uint16))
        most = ((row_bytes - first_word) // 2).to(tl.int32)
        exact = (tl.load(states + lane, mask=real, other=65536) == 0) & real
        begin = tl.load(ends + lane - 1, mask=exact & (lane > 0), other=0)
        pair = tl.arange(0, WIDE)
        inside = (pair < HALF)[None, :] & real[:, None]
        keys, values = (2 * layer * HEADS + head) * 2 * HALF, ((2 * layer + 1) * HEADS + head) * 2 * HALF
        from_row = product + (sample.to(tl.int64) * longest + token)[:, None] * width
        places = row.to(tl.pointer_type(tl.int32))
        axis = tl.load(axes + pair, mask=pair < HALF, other=0)
        position = tl.load(places + axis[None, :] * tokens + token[:, None], mask=inside, other=0).to(tl.float32)
        angle = position * tl.load(angles + pair, mask=pair < HALF, other=0.0)[None, :]
        turns = tl.floor(angle * 0.15915494309189535 + 0.5)  # the GPU's own cosine is for angles of one turn
        angle = (angle - turns * 6.28125) - turns * 0.0019353071795864769
        cos, sin = tl.cos(angle), tl.sin(angle)
        size_at = row + 12 * tokens + 8 * lanes.to(tl.int64) + (first_layer + layer) * tokens
        size = tl.load(sizes + tl.load(size_at + token, mask=real, other=0).to(tl.int32))[:, None]
        a, b = _pair(from_row, keys, mean, scale, pair, inside, HALF)
        a, b = a * cos - b * sin, b * cos + a * sin
        to = (scratch + sample.to(tl.int64) * scratch_row).to(tl.pointer_type(tl.bfloat16))
        to_keys = to + keys.to(tl.int64) * longest + token[:, None] * (2 * HALF)
        _put(to_keys, a, b, words, begin, keys, most, exact, pair, inside, HALF)
        a, b = _pair(from_row, values, mean, scale, pair, inside, HALF)
        to_values = to + values.to(tl.int64) * longest + token[:, None] * (2 * HALF)
        _put(to_values, a * size, b * size, words, begin, values, most, exact, pair, inside, HALF)


@triton.jit
def _pair(from_row, at, mean, scale, pair, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of a head's channels, float32 `[token, HALF]`."""
    here, there = at + pair, at + HALF + pair
    known = pair < HALF
    a = tl.load(from_row + here[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(from_row + there[None, :], mask=inside, other=0.0).to(tl.float32)
    a *= tl.load(scale + here, mask=known, other=0.0)[None, :]
    b *= tl.load(scale + there, mask=known, other=0.0)[None, :]
    a += tl.load(mean + here, mask=known, other=0.0)[None, :]
    b += tl.load(mean + there, mask=known, other=0.0)[None, :]
    return a, b


@triton.jit
def _put(to, a, b, words, begin, at, most, exact, pair, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write both halves as bfloat16, or the words of tokens that are stored as they are."""
    for half in tl.static_range(2):
        channel = half * HALF + pair
        place = begin[:, None] + (at + channel)[None, :]
        readable = exact[:, None] & inside & (place >= 0) & (place < most)
        stored = tl.load(words + place, mask=readable, other=0).to(tl.bfloat16, bitcast=True)
        coded = a.to(tl.bfloat16) if half == 0 else b.to(tl.bfloat16)
        tl.store(to + channel[None, :], tl.where(exact[:, None], stored, coded), mask=inside)


@triton.jit
def _room(x, full, used, words, CAPACITY):  # type: ignore[no-untyped-def]
    """States that have given a word where they are too full for what comes, and the words used."""
    tl.store(words + used, (x & 0xFFFF).to(tl.uint16), mask=full & (used < CAPACITY))
    return tl.where(full, x >> 16, x), used + full.to(tl.int32)


@triton.jit
def encode_streams(  # type: ignore[no-untyped-def]
    codes,  # int32 [component, token]
    states,  # int32 [part, token], written
    used,  # int32 [part, token], written: words, which may be more than there is room for
    words,  # uint16 [part, token, capacity], written
    tables,  # int32 [class, 256]: frequency, and from bit 16 on the frequencies before it
    runs,  # int32 [part, run, 4] of the group
    n_runs,  # runs of each part
    tokens,  # tokens of the sample
    capacity,  # words that a stream has room for
    PARTS: tl.constexpr,  # streams of a token
    BLOCK: tl.constexpr,  # tokens of a program
):
    """Write all streams of a group of one sample, the last component first."""
    block, part = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    real = token < tokens
    lane = part * tokens + token
    own = words + lane.to(tl.int64) * capacity
    x = tl.full([BLOCK], 65536, tl.uint32)
    count = tl.zeros([BLOCK], tl.int32)
    for back in range(0, n_runs):
        about = runs + 4 * (part * n_runs + n_runs - 1 - back)
        of_class, first, last, low = tl.load(about), tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
        for down in range(first, last):
            component = (first + last - 1 - down) * PARTS + part
            code = tl.load(codes + component.to(tl.int64) * tokens + token, mask=real, other=0)
            if low > 0:
                full = (x >> (32 - low).to(tl.uint32)) > 0
                x, count = _room(x, full & real, count, own, capacity)
                x = (x << low.to(tl.uint32)) | (code & ((1 << low) - 1)).to(tl.uint32)
            entry = tl.load(tables + of_class * 256 + (code >> low) + 127, mask=real, other=1).to(tl.uint32)
            frequency = entry & 0xFFFF
            x, count = _room(x, ((x >> 20) >= frequency) & real, count, own, capacity)
            x = ((x // frequency) << 12) + x % frequency + (entry >> 16)
    tl.store(states + lane, x.to(tl.int32, bitcast=True), mask=real)
    tl.store(used + lane, count, mask=real)


@triton.jit
def gather_words(  # type: ignore[no-untyped-def]
    out,  # uint16, the words of a sample, written
    words,  # uint16 [part * token, capacity]
    exact,  # int16 [token, N], what tokens are stored as where they are not coded
    states,  # int32 [part * token], 0: not coded
    begins,  # int64 [part * token]
    ends,  # int64 [part * token]
    tokens,  # tokens of the sample
    capacity,  # words that a stream has room for
    width,  # N
    BLOCK: tl.constexpr,
):
    """Put the words of each stream, or of a token that is stored as it is, where they belong."""
    lane = tl.program_id(0)
    begin, count = tl.load(begins + lane), tl.load(ends + lane) - tl.load(begins + lane)
    coded = tl.load(states + lane) != 0
    own = words + lane.to(tl.int64) * capacity
    raw = exact + (lane % tokens).to(tl.int64) * width
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < count
        word = tl.load(own + at, mask=mask & coded, other=0)
        plain = tl.load(raw + at, mask=mask & (coded == 0), other=0).to(tl.uint16, bitcast=True)
        tl.store(out + begin + at, tl.where(coded, word, plain), mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupOnDevice:
    """A group's basis on a device."""

    mean: Tensor
    scale: Tensor
    basis: Tensor
    classes: Tensor
    runs: Tensor
    """int32 `[part, run, 4]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _TablesOnDevice:
    """`TransformTables` on a device."""

    decoding: Tensor
    encoding: Tensor
    shift: Tensor
    bounds: Tensor
    sizes: Tensor
    angles: Tensor
    axes: Tensor
    groups: tuple[_GroupOnDevice, ...]


@cache
def _tables_on(codec: TransformCodec, device: torch.device) -> _TablesOnDevice:
    """The codec's tables on a device, for as long as the process lives: captured graphs read them."""
    tables = codec.calibrated
    frequency, starts, symbols = tables.frequency.astype(np.int64), tables.starts.astype(np.int64), tables.symbols
    rows = np.arange(len(frequency))[:, None]
    entry = (
        symbols.astype(np.int64) << 24 | (frequency[rows, symbols] - 1) << 12 | np.arange(TOTAL) - starts[rows, symbols]
    )

    def put(array: Any) -> Tensor:
        return torch.from_numpy(np.array(array)).to(device)

    return _TablesOnDevice(
        decoding=put(entry.astype(np.uint32).view(np.int32)),
        encoding=put((frequency | starts << 16).astype(np.uint32).view(np.int32)),
        shift=put(tables.shift),
        bounds=put(tables.bounds),
        sizes=put(SIZES),
        angles=put(tables.angles),
        axes=put(tables.axes.astype(np.int32)),
        groups=tuple(
            _GroupOnDevice(
                mean=put(group.mean),
                scale=put(group.scale),
                basis=put(group.basis),
                classes=put(group.classes.astype(np.int64)),
                runs=put(_runs(tables, group.classes)),
            )
            for group in tables.groups
        ),
    )


def forget_tables() -> None:
    """Free the tables of all codecs; only where no captured graph reads them."""
    _tables_on.cache_clear()


def _runs(tables: TransformTables, classes: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Steps of each part that share a table, one after the other; padded with runs of none."""
    of_parts = []
    for part in range(tables.parts):
        own = classes[part :: tables.parts].astype(np.int64)
        ends = [*(np.flatnonzero(np.diff(own)) + 1).tolist(), len(own)]
        firsts = [0, *ends[:-1]]
        of_parts.append(
            [[int(own[a]), a, b, int(tables.low[own[a]])] for a, b in zip(firsts, ends, strict=True) if b > a]
        )
    most = max(1, *map(len, of_parts))
    return np.array([runs + [[0, 0, 0, 0]] * (most - len(runs)) for runs in of_parts], np.int32)


def decode(codec: TransformCodec, prefixes: PackedPrefixes, index: int, scratch: Tensor) -> None:
    """`TensorCodec.decode_batch` of a group of layers."""
    tables, on_device = codec.calibrated, _tables_on(codec, scratch.device)
    group, layers, data = on_device.groups[index], tables.layers_of(index), prefixes.data
    samples, longest, width = len(prefixes.rows), prefixes.longest, len(group.mean)
    columns, kept = samples * longest, len(group.classes)
    codes = torch.empty(kept, columns, dtype=torch.float16, device=scratch.device)
    decode_streams[triton.cdiv(longest, _LANES), tables.parts, samples](
        codes, data, prefixes.rows, prefixes.lengths, data.stride(0), on_device.decoding, group.runs, on_device.shift,
        group.runs.shape[1], index, len(tables.groups), tables.layers, longest, columns,
        PARTS=tables.parts, BLOCK=_LANES, num_warps=1,
    )  # fmt: skip
    product = codes.T @ group.basis.T if kept else codes.new_zeros(columns, width)
    half = tables.channels // 2
    finish_layers[triton.cdiv(longest, _TOKENS), len(layers) * tables.heads, samples](
        scratch, scratch.stride(0), product, data, prefixes.rows, prefixes.lengths, data.stride(0), group.mean,
        group.scale, on_device.sizes, on_device.angles, on_device.axes, index, len(tables.groups), layers.start,
        tables.layers, longest, width,
        PARTS=tables.parts, HEADS=tables.heads, HALF=half, WIDE=triton.next_power_of_2(half), BLOCK=_TOKENS,
    )  # fmt: skip


def encode(codec: TransformCodec, kv: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """`TensorCodec.encode_at`, on a GPU."""
    tables, device, shape = codec.calibrated, kv.device, tuple(kv.shape)
    tables.check_shape(shape)
    on_device, tokens = _tables_on(codec, device), shape[3]
    if positions is None:
        positions = torch.arange(tokens).expand(3, -1)
    places = positions.to(device, torch.int32, non_blocking=True).clamp(0, MAX_POSITION - 1)
    good = torch.stack(torch.aminmax(kv)).abs().lt(MAX_VALUE).all()
    sections = codec.sections(shape)
    data = torch.zeros(sections.words + 2 * kv.numel(), dtype=torch.uint8, device=device)
    data[: sections.states].view(torch.int32).copy_(places.flatten())
    lanes = (sections.groups, tables.parts, tokens)
    states = data[sections.states : sections.ends].view(torch.int32).view(lanes)
    ends = data[sections.ends : sections.scales].view(torch.int32).view(lanes)
    sizes = data[sections.scales : sections.scales + tables.layers * tokens].view(tables.layers, tokens)
    out = data[sections.words :].view(torch.int16).view(torch.uint16)
    angle = angles_of(places, on_device.angles, on_device.axes)
    cos, sin, total = angle.cos(), -angle.sin(), torch.zeros((), dtype=torch.int64, device=device)
    for index, group in enumerate(on_device.groups):
        layers, width = tables.layers_of(index), len(group.mean)
        part = kv[layers.start : layers.stop]
        exact = part.permute(3, 0, 1, 2, 4).reshape(tokens, width).contiguous()
        values = part.float()
        values[:, 0] = turned(values[:, 0], cos, sin)
        sizes[layers.start : layers.stop] = value_sizes(values[:, 1])
        values[:, 1] /= on_device.sizes[sizes[layers.start : layers.stop].long()][:, None, :, None]
        coded, codes = _codes(codec.calibrated.groups[index].limit, group, on_device, values)
        capacity = -(-width // tables.parts)
        words = torch.empty(tables.parts, tokens, capacity, dtype=torch.uint16, device=device)
        state, used = (torch.empty(tables.parts, tokens, dtype=torch.int32, device=device) for _ in range(2))
        encode_streams[triton.cdiv(tokens, _LANES), tables.parts](
            codes, state, used, words, on_device.encoding, group.runs, group.runs.shape[1], tokens, capacity,
            PARTS=tables.parts, BLOCK=_LANES, num_warps=1,
        )  # fmt: skip
        coded &= (used <= capacity).all(0) & (used.sum(0) < width)
        states[index] = torch.where(coded, state, 0)
        plain = torch.zeros_like(used)
        plain[0] = width
        end = total + torch.where(coded, used, plain).flatten().long().cumsum(0)
        begin = torch.cat([total[None], end[:-1]])
        ends[index] = end.view(tables.parts, tokens).to(torch.int32)
        gather_words[(tables.parts * tokens,)](
            out, words, exact.view(torch.int16), states[index], begin, end, tokens, capacity, width, BLOCK=128
        )
        total = end[-1]
    return data, torch.where(good, sections.words + 2 * total, 0)


def _codes(limit: float, group: _GroupOnDevice, tables: _TablesOnDevice, values: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens the basis fits, and codes int32 `[component, token]`."""
    basis = group.basis.float()
    x = (values.permute(3, 0, 1, 2, 4).flatten(1) - group.mean) / group.scale
    y = torch.nan_to_num(x @ basis)
    bounds, shift = tables.bounds[group.classes], tables.shift[group.classes]
    codes = (y.sign() * torch.floor(y.abs().clamp(max=2.0**20) + float(ROUNDING))).to(torch.int32)
    codes = torch.minimum(torch.maximum(codes, bounds[:, 0]), bounds[:, 1])
    size = codes.abs().float()
    size -= torch.where(size == 1, shift[:, 0], torch.where(size > 1, shift[:, 1], 0.0))
    back = (codes.sign() * size).to(torch.float16).float() @ basis.T
    coded = ((x - back).square().mean(1) <= limit) & (back.abs().amax(1) < float(LARGEST))
    return coded, codes.T.contiguous()
