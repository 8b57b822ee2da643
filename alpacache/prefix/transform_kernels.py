"""Triton kernels of the codec `transform`, and what a GPU does around them with matrix products.

A thread decodes a stream, that of a token (or of a share of its components), so that all threads go through the
components, and through the tables of their classes, in step. Values in steps are written as float16 `[component,
token]`, as a matrix product takes them; a second kernel adds means, scales, turns keys and writes bfloat16. Encoding is
the same backwards, with products in float32, as a code must not depend on them where it can be helped.

Nothing is read beyond a sample's row whatever its bytes say. A stream that does not end as it was begun leaves NaN,
which the loss does not survive; what is read from a store has passed its checksums by then.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from alpacache.prefix.packed import PackedPrefixes
from cache_store.kv.layered import MAX_VALUE
from cache_store.kv.transform import (
    ALIGNED,
    LARGEST,
    MAX_POSITION,
    MIDDLE,
    ROUNDING,
    SIZES,
    SYMBOLS,
    TransformCodec,
    TransformTables,
    dequantised,
)

_LANES = 32
"""Streams of a program of one warp."""
_TOKENS = 16
"""Tokens of a head that a program of `finish_layers` writes."""
_ENCODED_AT_ONCE = 64 << 20
"""Bytes of codes and words that `encode` holds: streams of several groups are written at a time."""
_HEADS = 4
"""Heads that it writes, at most: their keys turn by the same angles."""


@triton.jit
def decode_streams(  # type: ignore[no-untyped-def]
    codes,  # float16 [group, K or some more, row of `columns`], written; up to 8 rows from K on become 0
    data,  # uint8 [rows, row_bytes], encoded samples
    rows,  # int64 [B], each sample's row
    lengths,  # int64 [B], each sample's tokens
    row_bytes,  # bytes of a row
    symbols,  # uint8 [class, 4096], the symbol of each slot
    entries,  # int64 [class, 256], of a symbol: frequency, frequencies before it and value, of 16 bits each
    runs,  # int32 [group, part, run, 4]: class, first and last step, low bits
    shift,  # float32 [class, 2]
    n_runs,  # runs of each part
    components,  # int32 [group], K of each
    padded,  # rows of `codes` of a group
    first_group,  # number of the first group that is decoded
    groups,  # groups of the codec
    layers,  # layers of the codec, all groups together
    longest,  # tokens that the output has room for
    columns,  # values from one row of `codes` to the next
    PARTS: tl.constexpr,  # streams of a token
    BLOCK: tl.constexpr,  # tokens of a program
):
    """Values in steps of some groups of every sample; tokens beyond a sample's own are left as they are.

    A warp has a scheduler to itself, so what counts is the way from one state to the next: a stream's next word has
    been loaded before it is known to be needed, words and tables have been touched before, and a value comes with the
    entry that the state needs anyway.
    """
    block, stream, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place, part = stream // PARTS, stream % PARTS
    tokens = tl.load(lengths + sample).to(tl.int32)
    if block * BLOCK < tokens:
        group = first_group + place
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
        begin = tl.where(live, begin, at)  # nothing is read for a token that has no stream
        near = _touched(words, tl.min(tl.where(real, begin, most), 0), tl.max(tl.where(real, at, 0), 0), BLOCK)
        word = tl.load(words + at - 1, mask=at > begin, other=0)
        target = codes + place.to(tl.int64) * padded * columns + sample.to(tl.int64) * longest + token
        for run in range(0, n_runs):
            about = runs + 4 * ((group * PARTS + part) * n_runs + run)
            of_class, first, last, low = tl.load(about), tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
            symbol_of, entry_of = symbols + of_class * 4096, entries + of_class * 256
            for i in tl.static_range(4096 // 32 // BLOCK):
                near += tl.load(symbol_of + (i * BLOCK + tl.arange(0, BLOCK)) * 32).to(tl.int32)
            one, more = tl.load(shift + 2 * of_class), tl.load(shift + 2 * of_class + 1)
            to = target + (first * PARTS + part).to(tl.int64) * columns
            for _ in range(first, last):
                slot = x & 4095
                symbol = tl.load(symbol_of + slot.to(tl.int32)).to(tl.int32)
                entry = tl.load(entry_of + symbol)
                counts = entry.to(tl.uint32)
                x = (counts & 0xFFFF) * (x >> 12) + (slot - (counts >> 16))
                value = (entry >> 32).to(tl.int16).to(tl.float16, bitcast=True)
                x, at, word = _refill(x, at, begin, words, word)
                if low > 0:
                    code = ((symbol - 127) << low) | (x & ((1 << low) - 1)).to(tl.int32)
                    x = x >> low.to(tl.uint32)
                    x, at, word = _refill(x, at, begin, words, word)
                    size = tl.abs(code).to(tl.float32)
                    size -= tl.where(size == 1.0, one, tl.where(size > 1.0, more, 0.0))
                    value = tl.where(code < 0, -size, size).to(tl.float16)
                tl.store(to, value, mask=real)
                to += PARTS * columns
        wrong = live & ((x != 65536) | (at != begin))
        tl.store(target + part * columns, float("nan"), mask=real & wrong)
        if part == 0:
            beyond = tl.load(components + group) + tl.arange(0, 8)
            empty = (beyond < padded)[:, None] & real[None, :]
            tl.store(target[None, :] + beyond.to(tl.int64)[:, None] * columns, 0.0, mask=empty)
        tl.store(target, near.to(tl.float16), mask=real & (longest < 0))  # never, but for the compiler


@triton.jit
def _touched(words, low, high, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a word of each sector of 32 bytes that the streams of a program have, so that later ones are near."""
    near = tl.zeros([BLOCK], tl.int32)
    for place in range(low // 16 * 16, high, 64 * BLOCK):
        for i in tl.static_range(4):
            at = place + (i * BLOCK + tl.arange(0, BLOCK)) * 16
            near += tl.load(words + at, mask=at < high, other=0).to(tl.int32)
    return near


@triton.jit
def _refill(x, at, begin, words, word):  # type: ignore[no-untyped-def]
    """States with the next word where they are below 65536, the places of the streams' words, and those before them."""
    need = x < 65536
    x = tl.where(need, (x << 16) | word.to(tl.uint32), x)
    at -= need.to(tl.int32)
    return x, at, tl.load(words + at - 1, mask=need & (at > begin), other=word)


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
    EACH: tl.constexpr,  # of which a program writes so many
    HALF: tl.constexpr,  # pairs of channels
    WIDE: tl.constexpr,  # the power of two from HALF on
    BLOCK: tl.constexpr,  # tokens of a program
):
    """Keys and values of some heads of a layer; those of tokens that are stored as they are from their words."""
    block, share, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, first_head = share // (HEADS // EACH), share % (HEADS // EACH) * EACH
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
        from_row = product + (sample.to(tl.int64) * longest + token)[:, None] * width
        places = row.to(tl.pointer_type(tl.int32))
        axis = tl.load(axes + pair, mask=pair < HALF, other=0)
        position = tl.load(places + axis[None, :] * tokens + token[:, None], mask=inside, other=0).to(tl.float32)
        cos, sin = _turn(position * tl.load(angles + pair, mask=pair < HALF, other=0.0)[None, :])
        size_at = row + 12 * tokens + 8 * lanes.to(tl.int64) + (first_layer + layer) * tokens
        size = tl.load(sizes + tl.load(size_at + token, mask=real, other=0).to(tl.int32))[:, None]
        to = (scratch + sample.to(tl.int64) * scratch_row).to(tl.pointer_type(tl.bfloat16)) + token[:, None] * (
            2 * HALF
        )
        for head in range(first_head, first_head + EACH):
            keys, values = (2 * layer * HEADS + head) * 2 * HALF, ((2 * layer + 1) * HEADS + head) * 2 * HALF
            a, b = _pair(from_row, keys, mean, scale, pair, inside, HALF)
            a, b = a * cos - b * sin, b * cos + a * sin
            _put(to + keys * longest, a, b, words, begin, keys, most, exact, pair, inside, HALF)
            a, b = _pair(from_row, values, mean, scale, pair, inside, HALF)
            _put(
                to + values * longest,
                a * size,
                b * size,
                words,
                begin,
                values,
                most,
                exact,
                pair,
                inside,
                HALF,
            )


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
def group_vectors(  # type: ignore[no-untyped-def]
    high,  # float16 [token, N], written: vectors in units of their channels' scales
    low,  # float16 [token, N], written: what `high` is short by
    sizes_of,  # uint8 [layer, token] of the sample, written: sizes of values
    kv,  # bfloat16 [layer, 2, head, token, channel] of the sample
    positions,  # int32 [3, token]
    mean,  # float32 [N]
    scale,  # float32 [N]
    sizes,  # float32 [256]
    angles,  # float32 [HALF]
    axes,  # int32 [HALF]
    first_layer,  # the group's first layer
    tokens,  # tokens of the sample
    width,  # N
    HEADS: tl.constexpr,  # KV heads
    HALF: tl.constexpr,  # pairs of channels
    WIDE: tl.constexpr,  # the power of two from HALF on
    BLOCK: tl.constexpr,  # tokens of a program
):
    """Keys turned back and values by their size, less their means, of one layer of a group."""
    block, layer = tl.program_id(0), tl.program_id(1)
    token, pair = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)
    real, known = token < tokens, pair < HALF
    inside = known[None, :] & real[:, None]
    of_layer = kv + (first_layer + layer).to(tl.int64) * (4 * HEADS * HALF) * tokens
    from_token = token[:, None] * (2 * HALF) + pair[None, :]
    square = tl.zeros([BLOCK], tl.float32)
    for head in range(HEADS):
        for half in tl.static_range(2):
            at = of_layer + (HEADS + head) * (2 * HALF) * tokens + half * HALF
            value = tl.load(at + from_token, mask=inside, other=0.0).to(tl.float32)
            square += tl.sum(value * value, 1)
    square = tl.maximum(square / (2 * HEADS * HALF), 2.3283064365386963e-10)
    byte = tl.minimum(tl.maximum(tl.floor(4 * tl.log2(square) + 0.5) + 128, 0.0), 255.0).to(tl.int32)
    tl.store(sizes_of + (first_layer + layer) * tokens + token, byte.to(tl.uint8), mask=real)
    size = tl.load(sizes + byte)[:, None]
    axis = tl.load(axes + pair, mask=known, other=0)
    position = tl.load(positions + axis[None, :] * tokens + token[:, None], mask=inside, other=0).to(tl.float32)
    cos, sin = _turn(position * tl.load(angles + pair, mask=known, other=0.0)[None, :])
    to = token.to(tl.int64)[:, None] * width + pair[None, :]
    for head in range(HEADS):
        for kind in tl.static_range(2):
            at = of_layer + (kind * HEADS + head) * (2 * HALF) * tokens
            a = tl.load(at + from_token, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(at + HALF + from_token, mask=inside, other=0.0).to(tl.float32)
            if kind == 0:
                a, b = a * cos + b * sin, b * cos - a * sin
            else:
                a, b = a / size, b / size
            channel = ((2 * layer + kind) * HEADS + head) * (2 * HALF)
            _split(high + channel, low + channel, to, a, mean + channel, scale + channel, pair, known, inside)
            channel += HALF
            _split(high + channel, low + channel, to, b, mean + channel, scale + channel, pair, known, inside)


@triton.jit
def _split(high, low, to, x, mean, scale, pair, known, inside):  # type: ignore[no-untyped-def]
    """Write channels as two float16, which matrix units multiply."""
    x -= tl.load(mean + pair, mask=known, other=0.0)[None, :]
    x /= tl.load(scale + pair, mask=known, other=1.0)[None, :]
    most = x.to(tl.float16)
    tl.store(high + to, most, mask=inside)
    tl.store(low + to, (x - most.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def _turn(angle):  # type: ignore[no-untyped-def]
    """Cosine and sine; the GPU's own are for angles of one turn."""
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    angle = (angle - turns * 6.28125) - turns * 0.0019353071795864769
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def quantise(  # type: ignore[no-untyped-def]
    codes,  # int16 [component, token], written
    values,  # float16 [token, padded], written: what codes stand for; 0 from `kept` on
    one,  # float32 [token, padded], components in steps
    other,  # float32 [token, padded], to be added to `one`
    classes,  # int64 [component]
    bounds,  # int32 [class, 2]
    shift,  # float32 [class, 2]
    kept,  # components of the group
    padded,
    tokens,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens, and components, of a program
):
    """Codes of components, moved to within what their classes can write."""
    token, component = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = component < kept
    inside = (token < tokens)[:, None] & (component < padded)[None, :]
    at = token.to(tl.int64)[:, None] * padded + component[None, :]
    y = tl.load(one + at, mask=inside, other=0.0) + tl.load(other + at, mask=inside, other=0.0)
    of_class = tl.load(classes + component, mask=known, other=0)
    least, most = tl.load(bounds + 2 * of_class)[None, :], tl.load(bounds + 2 * of_class + 1)[None, :]
    size = tl.where(y == y, tl.minimum(tl.abs(y), 1048576.0), 0.0)
    code = tl.floor(size + ROUNDING).to(tl.int32)
    code = tl.minimum(tl.maximum(tl.where(y < 0, -code, code), least), most)
    from_one, from_more = tl.load(shift + 2 * of_class)[None, :], tl.load(shift + 2 * of_class + 1)[None, :]
    size = tl.abs(code).to(tl.float32)
    size -= tl.where(size == 1.0, from_one, tl.where(size > 1.0, from_more, 0.0))
    value = tl.where(known[None, :], tl.where(code < 0, -size, size), 0.0)
    tl.store(values + at, value.to(tl.float16), mask=inside)
    to = component.to(tl.int64)[None, :] * tokens + token[:, None]
    tl.store(codes + to, code.to(tl.int16), mask=inside & known[None, :])


@triton.jit
def fitting(  # type: ignore[no-untyped-def]
    coded,  # bool [token], written: which tokens the basis fits
    high,  # float16 [token, N]
    low,  # float16 [token, N]
    back,  # float16 [token, N], what decoding makes of their codes
    limit,  # squared error of a channel, on average
    largest,  # of a value that decoding can hold
    width,  # N
    BLOCK: tl.constexpr,
):
    """Compare a token with what it will be decoded to."""
    token = tl.program_id(0)
    row, square, most = token.to(tl.int64) * width, tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < width
        x = tl.load(high + row + at, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(low + row + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(back + row + at, mask=mask, other=0.0).to(tl.float32)
        square += (x - y) * (x - y)
        most = tl.maximum(most, tl.abs(y))
    tl.store(coded + token, (tl.sum(square, 0) / width <= limit) & (tl.max(most, 0) < largest))


@triton.jit
def _room(x, full, used, words, CAPACITY):  # type: ignore[no-untyped-def]
    """States that have given a word where they are too full for what comes, and the words used."""
    tl.store(words + used, (x & 0xFFFF).to(tl.uint16), mask=full & (used < CAPACITY))
    return tl.where(full, x >> 16, x), used + full.to(tl.int32)


@triton.jit
def encode_streams(  # type: ignore[no-untyped-def]
    codes,  # int16 [group, row of `group_codes`]: [component, token] of each group
    states,  # int32 [group, part, token], written
    used,  # int32 [group, part, token], written: words, which may be more than there is room for
    words,  # uint16 [group, part, token, capacity], written
    entries,  # int64 [class, 256], from the lowest bits on: frequency, and frequencies before it, of 16 bits each
    runs,  # int32 [group, part, run, 4]
    n_runs,  # runs of each part
    group_codes,  # codes from one group to the next
    tokens,  # tokens of the sample
    capacity,  # words that a stream has room for
    PARTS: tl.constexpr,  # streams of a token
    BLOCK: tl.constexpr,  # tokens of a program
):
    """Write all streams of some groups of one sample, the last component first."""
    block, stream = tl.program_id(0), tl.program_id(1)
    part = stream % PARTS
    codes += (stream // PARTS).to(tl.int64) * group_codes
    token = block * BLOCK + tl.arange(0, BLOCK)
    real = token < tokens
    lane = stream.to(tl.int64) * tokens + token
    own = words + lane * capacity
    x = tl.full([BLOCK], 65536, tl.uint32)
    count = tl.zeros([BLOCK], tl.int32)
    for back in range(0, n_runs):
        about = runs + 4 * (stream * n_runs + n_runs - 1 - back)
        of_class, first, last, low = tl.load(about), tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
        for down in range(first, last):
            component = (first + last - 1 - down) * PARTS + part
            code = tl.load(codes + component.to(tl.int64) * tokens + token, mask=real, other=0).to(tl.int32)
            if low > 0:
                full = (x >> (32 - low).to(tl.uint32)) > 0
                x, count = _room(x, full & real, count, own, capacity)
                x = (x << low.to(tl.uint32)) | (code & ((1 << low) - 1)).to(tl.uint32)
            entry = tl.load(entries + of_class * 256 + (code >> low) + 127, mask=real, other=1).to(tl.uint32)
            frequency = entry & 0xFFFF
            x, count = _room(x, ((x >> 20) >= frequency) & real, count, own, capacity)
            x = ((x // frequency) << 12) + x % frequency + (entry >> 16)
    tl.store(states + lane, x.to(tl.int32, bitcast=True), mask=real)
    tl.store(used + lane, count, mask=real)


@triton.jit
def gather_words(  # type: ignore[no-untyped-def]
    out,  # uint16, the words of a sample, written
    words,  # uint16 [group, part, token, capacity]
    kv,  # int16 [row, token, channel], keys and values from the first group's first layer on
    states,  # int32 [group, part, token], 0: not coded
    begins,  # int64 [group, part, token]
    ends,  # int64 [group, part, token]
    tokens,  # tokens of the sample
    capacity,  # words that a stream has room for
    group_rows,  # rows of `kv` of a group
    channels,  # channels of a row
    PARTS: tl.constexpr,  # streams of a token
    BLOCK: tl.constexpr,
):
    """Put the words of each stream, or of a token that is stored as it is, where they belong."""
    lane = tl.program_id(0)
    begin, count = tl.load(begins + lane), tl.load(ends + lane) - tl.load(begins + lane)
    coded = tl.load(states + lane) != 0
    own = words + lane.to(tl.int64) * capacity
    token, first_row = lane % tokens, lane // (PARTS * tokens) * group_rows
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < count
        word = tl.load(own + at, mask=mask & coded, other=0)
        row = (first_row + at // channels).to(tl.int64) * tokens + token
        plain = tl.load(kv + row * channels + at % channels, mask=mask & (coded == 0), other=0)
        tl.store(out + begin + at, tl.where(coded, word, plain.to(tl.uint16, bitcast=True)), mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupOnDevice:
    """A group's basis on a device."""

    mean: Tensor
    scale: Tensor
    basis: Tensor
    """float16 `[N, components]`, with so many components of zeros that matrix units can load rows."""
    classes: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _TablesOnDevice:
    """`TransformTables` on a device."""

    symbols: Tensor
    """uint8 `[class, 4096]`: the symbol of each slot."""
    entries: Tensor
    """int64 `[class, 256]`: frequency, frequencies before it, and value of a symbol without low bits; 16 bits each."""
    shift: Tensor
    bounds: Tensor
    sizes: Tensor
    angles: Tensor
    axes: Tensor
    runs: Tensor
    """int32 `[group, part, run, 4]`."""
    widths: Tensor
    """int32 `[group]`: N of each."""
    components: Tensor
    """int32 `[group]`: how many of them each keeps."""
    groups: tuple[_GroupOnDevice, ...]


@cache
def _tables_on(codec: TransformCodec, device: torch.device) -> _TablesOnDevice:
    """The codec's tables on a device, for as long as the process lives: captured graphs read them."""
    tables = codec.calibrated
    symbol = np.arange(SYMBOLS, dtype=np.int32) - MIDDLE
    values = np.stack([dequantised(symbol, np.broadcast_to(shift, (SYMBOLS, 2))) for shift in tables.shift])
    entries = tables.frequency.astype(np.int64) | tables.starts.astype(np.int64) << 16
    entries |= values.view(np.uint16).astype(np.int64) << 32

    def put(array: Any) -> Tensor:
        return torch.from_numpy(np.array(array)).to(device)

    return _TablesOnDevice(
        symbols=put(tables.symbols),
        entries=put(entries),
        shift=put(tables.shift),
        bounds=put(tables.bounds),
        sizes=put(SIZES),
        angles=put(tables.angles),
        axes=put(tables.axes.astype(np.int32)),
        runs=put(_runs(tables)),
        widths=put(np.array([len(group.mean) for group in tables.groups], np.int32)),
        components=put(np.array([len(group.classes) for group in tables.groups], np.int32)),
        groups=tuple(
            _GroupOnDevice(
                mean=put(group.mean),
                scale=put(group.scale),
                basis=put(np.pad(group.basis, [(0, 0), (0, -group.basis.shape[1] % ALIGNED)])),
                classes=put(group.classes.astype(np.int64)),
            )
            for group in tables.groups
        ),
    )


def forget_tables() -> None:
    """Free the tables of all codecs; only where no captured graph reads them."""
    _tables_on.cache_clear()


def _runs(tables: TransformTables) -> "np.ndarray[Any, Any]":
    """Steps of each part of each group that share a table, one after the other; padded with runs of none."""
    found = []
    for group, part in itertools.product(tables.groups, range(tables.parts)):
        own = group.classes[part :: tables.parts].astype(np.int64)
        ends = [*(np.flatnonzero(np.diff(own)) + 1).tolist(), len(own)]
        firsts = [0, *ends[:-1]]
        found.append([[int(own[a]), a, b, int(tables.low[own[a]])] for a, b in zip(firsts, ends, strict=True) if b > a])
    most = max(1, *map(len, found))
    padded = np.array([runs + [[0, 0, 0, 0]] * (most - len(runs)) for runs in found], np.int32)
    return padded.reshape(len(tables.groups), tables.parts, most, 4)


def decode(codec: TransformCodec, prefixes: PackedPrefixes, first: int, scratch: Sequence[Tensor]) -> None:
    """`TensorCodec.decode_batch` of groups of layers from number `first` on, one into each scratch.

    Streams of several groups are read together where those of one would be too few to be fast.
    """
    tables, on_device = codec.calibrated, _tables_on(codec, scratch[0].device)
    samples, longest, data = len(prefixes.rows), prefixes.longest, prefixes.data
    columns = samples * longest
    most = max(group.basis.shape[1] for group in on_device.groups)
    shape = min(len(scratch), codec.groups_at_once(columns)), most, columns + -columns % ALIGNED
    codes = torch.empty(shape, dtype=torch.float16, device=data.device)
    for begin in range(0, len(scratch), len(codes)):
        some = scratch[begin : begin + len(codes)]
        decode_streams[triton.cdiv(longest, _LANES), len(some) * tables.parts, samples](
            codes, data, prefixes.rows, prefixes.lengths, data.stride(0), on_device.symbols, on_device.entries,
            on_device.runs, on_device.shift, on_device.runs.shape[2], on_device.components, most, first + begin,
            len(tables.groups), tables.layers, longest, codes.stride(1), PARTS=tables.parts, BLOCK=_LANES, num_warps=1,
        )  # fmt: skip
        for index, (of_group, place) in enumerate(zip(codes, some, strict=False), first + begin):
            _finish(tables, on_device, prefixes, index, of_group[:, :columns], place)


def _finish(
    tables: TransformTables,
    on_device: _TablesOnDevice,
    prefixes: PackedPrefixes,
    index: int,
    codes: Tensor,
    scratch: Tensor,
) -> None:
    """Keys and values of a group of layers from its components, float16 `[component, token]`."""
    group, layers, data, longest = on_device.groups[index], tables.layers_of(index), prefixes.data, prefixes.longest
    width, padded = group.basis.shape
    product = codes[:padded].T @ group.basis.T if padded else codes.new_zeros(codes.shape[1], width)
    half, each = tables.channels // 2, math.gcd(tables.heads, _HEADS)
    finish_layers[triton.cdiv(longest, _TOKENS), len(layers) * tables.heads // each, len(prefixes.rows)](
        scratch, scratch.stride(0), product, data, prefixes.rows, prefixes.lengths, data.stride(0), group.mean,
        group.scale, on_device.sizes, on_device.angles, on_device.axes, index, len(tables.groups), layers.start,
        tables.layers, longest, width,
        PARTS=tables.parts, HEADS=tables.heads, EACH=each, HALF=half, WIDE=triton.next_power_of_2(half), BLOCK=_TOKENS,
    )  # fmt: skip


def encode(codec: TransformCodec, kv: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """`TensorCodec.encode_at`, on a GPU."""
    tables, device, shape = codec.calibrated, kv.device, tuple(kv.shape)
    tables.check_shape(shape)
    on_device, tokens = _tables_on(codec, device), shape[3]
    if positions is None:
        positions = torch.arange(tokens).expand(3, -1)
    places = positions.to(device, torch.int32, non_blocking=True).clamp(0, MAX_POSITION - 1).contiguous()
    good = torch.stack(torch.aminmax(kv)).abs().lt(MAX_VALUE).all()
    sections, parts = codec.sections(shape), tables.parts
    data = torch.zeros(sections.words + 2 * kv.numel(), dtype=torch.uint8, device=device)
    data[: sections.states].view(torch.int32).copy_(places.flatten())
    lanes = (sections.groups, parts, tokens)
    states = data[sections.states : sections.ends].view(torch.int32).view(lanes)
    ends = data[sections.ends : sections.scales].view(torch.int32).view(lanes)
    sizes = data[sections.scales : sections.scales + tables.layers * tokens]
    out = data[sections.words :].view(torch.int16).view(torch.uint16)
    total = torch.zeros((), dtype=torch.int64, device=device)
    widest, most_kept = (max(group.basis.shape[side] for group in tables.groups) for side in range(2))
    capacity, n_runs = -(-widest // parts), on_device.runs.shape[2]
    together = max(1, _ENCODED_AT_ONCE // (2 * tokens * (most_kept + parts * capacity)))
    for first in range(0, sections.groups, together):
        groups = range(first, min(first + together, sections.groups))
        codes = torch.empty(len(groups), most_kept * tokens, dtype=torch.int16, device=device)
        coded = torch.empty(len(groups), tokens, dtype=torch.bool, device=device)
        for place, index in enumerate(groups):
            _put_codes(codes[place], coded[place], sizes, kv, places, tables, on_device, index)
        words = torch.empty(len(groups), parts, tokens, capacity, dtype=torch.uint16, device=device)
        state, used = (torch.empty(len(groups), parts, tokens, dtype=torch.int32, device=device) for _ in range(2))
        encode_streams[triton.cdiv(tokens, _LANES), len(groups) * parts](
            codes, state, used, words, on_device.entries, on_device.runs[first:], n_runs, codes.stride(0), tokens,
            capacity, PARTS=parts, BLOCK=_LANES, num_warps=1,
        )  # fmt: skip
        widths = on_device.widths[first : groups.stop]
        coded = coded & (used <= capacity).all(1) & (used.sum(1) < widths[:, None])
        plain = torch.zeros_like(used)
        plain[:, 0] = widths[:, None]
        end = total + torch.where(coded[:, None], used, plain).flatten().long().cumsum(0)
        begin, states[first : groups.stop] = torch.cat([total[None], end[:-1]]), torch.where(coded[:, None], state, 0)
        ends[first : groups.stop] = end.view(used.shape)
        gather_words[(used.numel(),)](
            out, words, kv.view(torch.int16)[tables.layers_of(first).start :], states[first:], begin, end, tokens,
            capacity, 2 * tables.together * tables.heads, tables.channels, PARTS=parts, BLOCK=128,
        )  # fmt: skip
        total = end[-1]
    return data, torch.where(good, sections.words + 2 * total, 0)


def _put_codes(
    codes: Tensor,
    coded: Tensor,
    sizes: Tensor,
    kv: Tensor,
    positions: Tensor,
    tables: TransformTables,
    on_device: _TablesOnDevice,
    index: int,
) -> None:
    """Write a group's codes, which tokens its basis fits, and the sizes of values of its layers."""
    group, layers, tokens, device = on_device.groups[index], tables.layers_of(index), kv.shape[3], kv.device
    (width, padded), kept, half = group.basis.shape, len(group.classes), tables.channels // 2
    high, low = (torch.empty(tokens, width, dtype=torch.float16, device=device) for _ in range(2))
    group_vectors[triton.cdiv(tokens, _TOKENS), len(layers)](
        high, low, sizes, kv, positions, group.mean, group.scale, on_device.sizes, on_device.angles, on_device.axes,
        layers.start, tokens, width,
        HEADS=tables.heads, HALF=half, WIDE=triton.next_power_of_2(half), BLOCK=_TOKENS,
    )  # fmt: skip
    values = torch.empty(tokens, padded, dtype=torch.float16, device=device)
    quantise[triton.cdiv(tokens, 32), triton.cdiv(max(padded, 1), 32)](
        codes, values, _product(high, group.basis), _product(low, group.basis), group.classes, on_device.bounds,
        on_device.shift, kept, padded, tokens, ROUNDING=float(ROUNDING), BLOCK=32,
    )  # fmt: skip
    back = values @ group.basis.T
    fitting[(tokens,)](coded, high, low, back, tables.groups[index].limit, float(LARGEST), width, BLOCK=1024)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """float32 product of two of float16; the sums are of float32 as well."""
    if one.device.type != "cuda":
        return one.float() @ other.float()
    return torch.mm(one, other, out_dtype=torch.float32)
