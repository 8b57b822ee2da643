"""Decoding one layer of encoded prefixes on the GPU: `alpacache.codecs.decode_layer` for a whole batch, bit for bit.

Codes lie in bit planes at any byte address. A thread reads the 32 bits that hold four channels' worth of a plane out of
two aligned words, because loading a byte costs as much as loading a word: that took 5 ms for all layers of 8 samples of
4 cameras on an H100, byte by byte it were 19 (measured).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpacache.alpamayo.packed_prefix import PackedPrefixes, PrefixLayout
from cache_store.kv_codec import MANTISSAS, planes

_BLOCK_N = 32
"""Tokens a program; not above a codec's key group, so that they fall into two groups at most."""


@triton.jit
def _scales(index, base, mantissas):  # type: ignore[no-untyped-def]
    """`MANTISSAS[i % 16] * 2^(i // 16 + base)` for scale bytes, exact as the codec defines it."""
    exponent = (index >> 4) + base + 127
    return tl.load(mantissas + (index & 15)) * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _fp8(code):  # type: ignore[no-untyped-def]
    """E4M3 codes as float32, by hand, because only compute capability 8.9 converts them itself."""
    magnitude = ((code & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 128) != 0, -magnitude, magnitude)


@triton.jit
def _key_tile(  # type: ignore[no-untyped-def]
    at, token, valid, head, channel, tokens, mantissas, tables,
    IS_FP8: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
    ORDERED: tl.constexpr,
):  # fmt: skip
    """Keys `[token, channel]` of one head, bfloat16, channels in stored order; `at` is where the layer begins."""
    base = tl.load(at.to(tl.pointer_type(tl.int8))).to(tl.int32)
    if IS_FP8:
        scale_byte = tl.load(at + 1 + head * tokens + token, mask=valid, other=0).to(tl.int32)
        scale = _scales(scale_byte, base, mantissas)
        where = 1 + HEADS * tokens + (head * tokens + token[:, None]) * DIM + channel[None, :]
        code = tl.load(at + where, mask=valid[:, None], other=0).to(tl.int32)
        tile = (_fp8(code) * scale[:, None]).to(tl.bfloat16)
    else:
        groups = (tokens + GROUP - 1) // GROUP
        scale_at = at + 1 + (HEADS * DIM if ORDERED else 0)
        zero_at = scale_at + HEADS * groups * DIM
        codes_at = zero_at + 2 * HEADS * groups * DIM
        quad = tl.arange(0, DIM // 4)
        member = tl.arange(0, 4)[None, None, :]
        place = (quad * 4)[None, :, None] + member
        # A tile is no longer than a group, so its tokens fall into two groups at most.
        first = tl.min(token, 0) // GROUP
        early = (head * groups + first) * DIM + place
        late = (head * groups + tl.minimum(first + 1, groups - 1)) * DIM + place
        early_scale = _scales(tl.load(scale_at + early).to(tl.int32), base, mantissas)
        late_scale = _scales(tl.load(scale_at + late).to(tl.int32), base, mantissas)
        is_early = (token < (first + 1) * GROUP)[:, None, None]
        zero = tl.where(is_early, _zeros(zero_at, early), _zeros(zero_at, late))
        scale = tl.where(is_early, early_scale, late_scale)
        code = tl.zeros([token.shape[0], DIM // 4, 4], tl.int32)
        for slot in tl.static_range(SLOTS):
            table = tables + slot * 5 * (DIM // 4) + quad
            before, per_token, byte = tl.load(table), tl.load(table + DIM // 4), tl.load(table + 2 * (DIM // 4))
            shift, width = tl.load(table + 3 * (DIM // 4)), tl.load(table + 4 * (DIM // 4))
            where = (HEADS * tokens * before + byte)[None, :] + (head * tokens + token[:, None]) * per_token[None, :]
            bits = _word(codes_at, where, (shift & 15)[None, :], valid[:, None] & (width > 0)[None, :])
            part = (bits[:, :, None] >> (member * width[None, :, None])) & ((1 << width) - 1)[None, :, None]
            code |= part << (shift >> 4)[None, :, None]
        tile = tl.reshape(((code.to(tl.float32) - zero) * scale).to(tl.bfloat16), [token.shape[0], DIM])
    return tile


@triton.jit
def _word(at, where, shift, mask):  # type: ignore[no-untyped-def]
    """32 bits from a byte on, less `shift` low bits, at any address: of two aligned words, because a byte's load costs
    as much as a word's. Reads up to 7 bytes further."""
    address = at.to(tl.int64) + where
    word = (address & -4).to(tl.pointer_type(tl.uint32))
    low = tl.load(word, mask=mask, other=0).to(tl.uint64)
    high = tl.load(word + 1, mask=mask, other=0).to(tl.uint64)
    return ((low | (high << 32)) >> ((address & 3) * 8 + shift).to(tl.uint64)).to(tl.int32)


@triton.jit
def _zeros(at, index):  # type: ignore[no-untyped-def]
    """Little-endian int16 at any address, as float32."""
    low = tl.load(at + 2 * index).to(tl.int32)
    high = tl.load(at.to(tl.pointer_type(tl.int8)) + 2 * index + 1).to(tl.int32)
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _value_plane(  # type: ignore[no-untyped-def]
    code, codes_at, row, quad, valid, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Codes `[token, quad, 4]` with one more bit plane, if codes of `BITS` bits have one of this width."""
    if (BITS & WIDTH) != 0:
        done: tl.constexpr = BITS - BITS % (2 * WIDTH)
        where = HEADS * tokens * (DIM * done // 8) + row[:, None] * (DIM * WIDTH // 8) + quad * WIDTH // 2
        bits = _word(codes_at, where, quad * WIDTH % 2 * 4, valid[:, None])
        member = tl.arange(0, 4)[None, None, :]
        code |= ((bits[:, :, None] >> (member * WIDTH)) & ((1 << WIDTH) - 1)) << done
    return code


@triton.jit
def _value_tile(  # type: ignore[no-untyped-def]
    at, token, valid, head, tokens, mantissas,
    IS_FP8: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Values `[token, channel]` of one head, bfloat16; `at` is where the layer's values begin."""
    channel = tl.arange(0, DIM)
    base = tl.load(at.to(tl.pointer_type(tl.int8))).to(tl.int32)
    row = head * tokens + token
    if IS_FP8:
        scale = _scales(tl.load(at + 1 + row, mask=valid, other=0).to(tl.int32), base, mantissas)
        where = 1 + HEADS * tokens + row[:, None] * DIM + channel[None, :]
        code = tl.load(at + where, mask=valid[:, None], other=0).to(tl.int32)
        tile = (_fp8(code) * scale[:, None]).to(tl.bfloat16)
    else:
        groups: tl.constexpr = DIM // GROUP
        quad = tl.arange(0, DIM // 4)[None, :]
        here = row[:, None] * groups + quad // (GROUP // 4)
        scale_byte = tl.load(at + 1 + here, mask=valid[:, None], other=0).to(tl.int32)
        scale = _scales(scale_byte, base, mantissas)
        zero_at = at + 1 + HEADS * tokens * groups
        zero = tl.load(zero_at + here, mask=valid[:, None], other=0).to(tl.float32)
        codes_at = zero_at + HEADS * tokens * groups
        code = tl.zeros([token.shape[0], DIM // 4, 4], tl.int32)
        code = _value_plane(code, codes_at, row, quad, valid, tokens, HEADS, DIM, BITS, 8)
        code = _value_plane(code, codes_at, row, quad, valid, tokens, HEADS, DIM, BITS, 4)
        code = _value_plane(code, codes_at, row, quad, valid, tokens, HEADS, DIM, BITS, 2)
        code = _value_plane(code, codes_at, row, quad, valid, tokens, HEADS, DIM, BITS, 1)
        value = (code.to(tl.float32) - zero[:, :, None]) * scale[:, :, None]
        tile = tl.reshape(value.to(tl.bfloat16), [token.shape[0], DIM])
    return tile


@triton.jit
def decode_layer(  # type: ignore[no-untyped-def]
    scratch, scratch_row, data, rows, lengths, mantissas, tables,
    row_bytes, layer_a, layer_b, layer_c, key_a, key_b, key_c, longest,
    IS_FP8: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, KEY_GROUP: tl.constexpr, SLOTS: tl.constexpr,
    ORDERED: tl.constexpr, VALUE_GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One layer of every sample, decoded to `[2, kv_head, longest, channel]`; nothing beyond a sample's tokens.

    Channels of keys stay in stored order, which is kept behind it: it is the queries that are few.
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    tokens = tl.load(lengths + sample).to(tl.int32)
    groups = (tokens + KEY_GROUP - 1) // KEY_GROUP
    begin = layer_a + layer_b * tokens.to(tl.int64) + layer_c * groups.to(tl.int64)
    keys_at = data + tl.load(rows + sample) * row_bytes + begin
    values_at = keys_at + key_a + key_b * tokens.to(tl.int64) + key_c * groups.to(tl.int64)
    token, channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    valid = token < tokens
    if tl.program_id(0) * BLOCK_N < tokens:
        keys = _key_tile(
            keys_at,
            token,
            valid,
            head,
            channel,
            tokens,
            mantissas,
            tables,
            IS_FP8,
            HEADS,
            DIM,
            KEY_GROUP,
            SLOTS,
            ORDERED,
        )
        values = _value_tile(
            values_at, token, valid, head, tokens, mantissas, IS_FP8, HEADS, DIM, VALUE_GROUP, VALUE_BITS
        )
        at = scratch + sample.to(tl.int64) * scratch_row
        where = (head * longest + token[:, None]) * DIM + channel[None, :]
        plain = at.to(tl.pointer_type(tl.bfloat16))
        tl.store(plain + where, keys, mask=valid[:, None])
        tl.store(plain + HEADS * longest * DIM + where, values, mask=valid[:, None])
        if ORDERED and tl.program_id(0) == 0:
            order = tl.load(keys_at + 1 + head * DIM + channel)
            tl.store(at + 4 * HEADS * longest * DIM + head * DIM + channel, order)


def decode(prefixes: PackedPrefixes, layer: int, scratch: Tensor | None = None) -> tuple[Tensor, int]:
    """One layer of every sample as rows of `[2, kv_head, longest, channel]` bfloat16, and where a row's order lies.

    The order is `[kv_head, channel]` uint8, the channel at each place of a key, where the codec permutes them.
    `scratch`, of `scratch_shape`, is what is written; None allocates it.
    """
    layout, codec, samples, longest = prefixes.layout, prefixes.layout.codec, len(prefixes.rows), prefixes.longest
    assert codec is not None
    if codec.kind != "fp8" and codec.key_group < _BLOCK_N:
        raise ValueError(f"key_group is {codec.key_group}; the GPU decodes groups of {_BLOCK_N} tokens or more.")
    key_bits, value_bits = codec.bits_of(layer)
    classes = codec.key_classes(key_bits, layout.head_dim)
    if scratch is None:
        scratch = prefixes.data.new_empty(scratch_shape(layout, samples, longest))
    decode_layer[(triton.cdiv(longest, _BLOCK_N), layout.kv_heads, samples)](
        scratch, scratch.stride(0), prefixes.data, prefixes.rows, prefixes.lengths,
        _mantissas(scratch.device), _tables(tuple(classes), scratch.device),
        prefixes.data.stride(0), *layout.starts[layer], *layout.key_bytes(layer), longest,
        IS_FP8=codec.kind == "fp8", DIM=layout.head_dim, HEADS=layout.kv_heads, KEY_GROUP=codec.key_group,
        SLOTS=max(len(planes(width)) for _, width in classes), ORDERED=is_ordered(layout),
        VALUE_GROUP=codec.value_group_of(layout.head_dim), VALUE_BITS=value_bits,
        BLOCK_N=_BLOCK_N, num_warps=4, num_stages=1,
    )  # fmt: skip
    return scratch, _order_at(layout, longest)


def scratch_shape(layout: PrefixLayout, samples: int, longest: int) -> tuple[int, int]:
    """Rows and bytes of what `decode` writes."""
    row = _order_at(layout, longest) + layout.kv_heads * layout.head_dim
    return samples, row + -row % 256


def _order_at(layout: PrefixLayout, longest: int) -> int:
    return 4 * layout.kv_heads * longest * layout.head_dim


def make_places(layout: PrefixLayout, samples: int, longest: int, device: torch.device, *, layers: int = 2) -> Tensor:
    """Memory of `LayersAhead`, or for all layers of `LayersKept`, for batches of at most so many samples."""
    return torch.empty(layers, *scratch_shape(layout, samples, longest), dtype=torch.uint8, device=device)


class LayersAhead:
    """Decoded layers of one batch for one forward and its backward: while a layer is attended to, the next is decoded.

    Decoding takes little of what a GPU has and would otherwise stand in the way of everything else. A stream of its own
    fills two places in turn. They hold the last two layers when the forward ends, which are the backward's first two,
    and with activation checkpointing each layer's second forward finds it still there.
    """

    def __init__(self, places: Tensor, stream: torch.cuda.Stream | None) -> None:
        """`places`: `[2, *scratch_shape]` uint8, which nothing else uses until the backward is over; without a stream
        a layer is decoded when it is asked for."""
        self._places, self._stream = places, stream
        self._held: list[int | None] = [None, None]
        self._ready: list[torch.cuda.Event | None] = [None, None]

    def layer(self, prefixes: PackedPrefixes, layer: int, *, then: int) -> tuple[Tensor, int]:
        """What `decode` returns, on the current stream; `then`: what will be asked for next, if it exists."""
        self._fill(prefixes, layer, None)
        place = layer % 2
        self._await(place)
        if self._stream is not None and 0 <= then < prefixes.layout.layers:
            self._fill(prefixes, then, self._stream)
        return self._places[place], _order_at(prefixes.layout, prefixes.longest)

    def _fill(self, prefixes: PackedPrefixes, layer: int, stream: torch.cuda.Stream | None) -> None:
        place = layer % 2
        if self._held[place] == layer:
            return
        self._held[place] = layer
        self._await(place)
        if stream is None:
            decode(prefixes, layer, self._places[place])
            return
        stream.wait_stream(torch.cuda.current_stream())  # whoever reads what the place holds now is enqueued there
        with torch.cuda.stream(stream):
            decode(prefixes, layer, self._places[place])
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(stream)
        self._ready[place] = ready

    def _await(self, place: int) -> None:
        if (ready := self._ready[place]) is not None:
            torch.cuda.current_stream().wait_event(ready)
            self._ready[place] = None


class LayersKept:
    """Decoded layers of one batch for several forwards: each is decoded when it is first asked for, and stays."""

    def __init__(self, places: Tensor) -> None:
        """`places`: `[layers, *scratch_shape]` uint8, which nothing else uses until the last forward is over."""
        self._places = places
        self._held: set[int] = set()

    def layer(self, prefixes: PackedPrefixes, layer: int, *, then: int) -> tuple[Tensor, int]:
        """What `decode` returns; `then` as of `LayersAhead`, not of use here."""
        if layer not in self._held:
            decode(prefixes, layer, self._places[layer])
            self._held.add(layer)
        return self._places[layer], _order_at(prefixes.layout, prefixes.longest)


def is_ordered(layout: PrefixLayout) -> bool:
    """Whether keys are stored with their channels permuted."""
    codec = layout.codec
    return codec is not None and codec.kind != "fp8" and len(codec.key_classes(8, layout.head_dim)) > 1


@lru_cache(maxsize=8)
def _mantissas(device: torch.device) -> Tensor:
    return torch.from_numpy(MANTISSAS).to(device)


@lru_cache(maxsize=8)
def _tables(classes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """For each plane of keys' codes and each four stored channels where their bits are, int32 `[slot, 5, channel / 4]`.

    The five: bytes of a token in all planes before, bytes of a token in this plane, the byte in the latter, shifts
    (down within the byte, plus 16 times up within the code), and the plane's bits (0: these have no such plane).
    """
    slots = max(len(planes(width)) for _, width in classes)
    table = torch.zeros(slots, 5, sum(count for count, _ in classes) // 4, dtype=torch.int32)
    before = first = 0
    for count, width in classes:
        done = 0
        for slot, plane in enumerate(planes(width)):
            for quad in range(count // 4):
                byte, low = divmod(quad * 4 * plane, 8)
                entry = (before, count * plane // 8, byte, low + 16 * done, plane)
                table[slot, :, first + quad] = torch.tensor(entry, dtype=torch.int32)
            before += count * plane // 8
            done += plane
        first += count // 4
    return table.to(device)
