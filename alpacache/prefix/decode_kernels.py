"""Triton kernels that decode one layer of a whole batch of encoded prefixes, bit-equal to `TensorCodec.decode_layer`.

Codes lie in bit planes at any byte address. A thread decodes eight channels of a token: it reads aligned words and
shifts them, because loading a byte costs as much as loading a word, and nothing passes between threads. A program
decodes the tokens of one key group of one head, so that it reads the scales of its keys once. That takes 1.5 ms for all
layers of 16 samples of 1 camera on an H200, where tiles of 32 tokens with codes of all widths at once took 2.65 (2.4
times the instructions, and barriers; both measured).
"""

from functools import lru_cache
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from alpacache.prefix.layered import scales_on
from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.packed import PackedPrefixes
from cache_store.kv.affine import AffineCodec
from cache_store.kv.fp8 import Fp8Codec
from cache_store.kv.layered import LayeredCodec

_OCTETS, _WARPS = 64, 2
"""Groups of eight channels that a program decodes at a time, and its warps; the best of seven settings on an H200."""
_FP8_BLOCK = 64
"""Tokens a program of `decode_fp8_layer`."""


@triton.jit
def _fp8(code):  # type: ignore[no-untyped-def]
    """E4M3 codes as float32, by hand, because only compute capability 8.9 and later convert them in hardware."""
    magnitude = ((code & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 128) != 0, -magnitude, magnitude)


@triton.jit
def _integer(code):  # type: ignore[no-untyped-def]
    """2^23 plus a code as float32: differences are exact, and a conversion is slower than any other operation."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _unit(at):  # type: ignore[no-untyped-def]
    """2 to the power of the int8 at `at`: all scales of a layer's keys or values are multiples of it."""
    return ((tl.load(at.to(tl.pointer_type(tl.int8))).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _words(at, where):  # type: ignore[no-untyped-def]
    """The aligned address at or below each, and how many bits further the wanted bytes begin."""
    address = at.to(tl.int64) + where
    return (address & -4).to(tl.pointer_type(tl.uint32)), ((address & 3) * 8).to(tl.uint64)


@triton.jit
def _shifted(low, high, shift):  # type: ignore[no-untyped-def]
    return ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift).to(tl.int32)


@triton.jit
def _one_word(at, where):  # type: ignore[no-untyped-def]
    """32 bits from each address on; reads up to 4 bytes further."""
    word, shift = _words(at, where)
    return _shifted(tl.load(word), tl.load(word + 1), shift)


@triton.jit
def _two_words(at, where):  # type: ignore[no-untyped-def]
    """`[..., 2]`, 64 bits from each address on; reads up to 4 bytes further."""
    word, shift = _words(at, where)
    low, middle, high = tl.load(word), tl.load(word + 1), tl.load(word + 2)
    return tl.join(_shifted(low, middle, shift), _shifted(middle, high, shift))


@triton.jit
def _bytes(at, where):  # type: ignore[no-untyped-def]
    """`[..., 8]`, eight bytes from each address on."""
    pair = _two_words(at, where)
    each = (pair[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 255
    return tl.reshape(each, [where.shape[0], where.shape[1], 8])


@triton.jit
def _plane(  # type: ignore[no-untyped-def]
    code,  # int32 [token, octet, 8], the planes before this one
    at,  # address of the class's first plane
    row,  # [token], rows of the planes: head * tokens + token
    octet,  # [octet], which eight of the class's channels
    rows,  # rows of each plane: heads * tokens
    COUNT: tl.constexpr,  # channels of the class
    WIDTH: tl.constexpr,  # bits of a code
    PLANE: tl.constexpr,  # bits of a code in this plane
):
    """`code` with one more plane of bits, if codes have one of this width."""
    if (WIDTH & PLANE) != 0:
        done: tl.constexpr = WIDTH - WIDTH % (2 * PLANE)
        where = rows * (COUNT * done // 8) + (row * (COUNT * PLANE // 8))[:, None] + (octet * PLANE)[None, :]
        if PLANE == 8:
            code |= _bytes(at, where) << done
        else:
            if PLANE == 4:
                bits = _one_word(at, where)
            else:
                bits = tl.load(at + where).to(tl.int32)
                if PLANE == 2:
                    bits |= tl.load(at + where + 1).to(tl.int32) << 8
            code |= ((bits[:, :, None] >> (tl.arange(0, 8) * PLANE)[None, None, :]) & ((1 << PLANE) - 1)) << done
    return code


@triton.jit
def _codes(at, row, octet, rows, COUNT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes `[token, octet, 8]` of a class of `COUNT` channels, whose planes begin at `at` and have `rows` rows."""
    code = tl.zeros([row.shape[0], octet.shape[0], 8], tl.int32)
    code = _plane(code, at, row, octet, rows, COUNT, WIDTH, 8)
    code = _plane(code, at, row, octet, rows, COUNT, WIDTH, 4)
    code = _plane(code, at, row, octet, rows, COUNT, WIDTH, 2)
    return _plane(code, at, row, octet, rows, COUNT, WIDTH, 1)


@triton.jit
def _store(target, value, token, octet, first_channel, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = first_channel + octet[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(target + (token * DIM)[:, None, None] + channel[None, :, :], value.to(tl.bfloat16))


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    target,  # bfloat16 [token, DIM], the head's decoded keys, written
    unit,  # float32, what scales are multiples of
    scale_at,  # address of the layer's key scales; zeros and codes of all heads follow
    group,  # number of the group among those of all heads
    groups,  # groups of all heads
    first,  # first token of the group
    last,  # last token of the group
    head,  # rows of the planes before this head's
    rows,  # rows of each plane: heads * tokens
    scales,  # float32 [256]
    FROM: tl.constexpr,  # place of the class's first channel
    BEFORE: tl.constexpr,  # bits of a token's codes in the classes before
    COUNT: tl.constexpr,  # channels of the class
    WIDTH: tl.constexpr,  # bits of a code
    DIM: tl.constexpr,  # channels of a head
    BLOCK: tl.constexpr,  # tokens of a group
    OCTETS: tl.constexpr,  # eights of channels decoded at a time
):
    """Decode one class of a group's key channels."""
    octet = tl.arange(0, COUNT // 8)
    place = (group * DIM + FROM + octet * 8)[None, :]
    scale = tl.load(scales + _bytes(scale_at, place)) * unit
    quad = tl.arange(0, COUNT // 4)
    zero_at = scale_at + groups * DIM
    pair = _two_words(zero_at, 2 * (group * DIM + FROM + quad * 4)[None, :])
    zero = tl.reshape(tl.join((pair << 16) >> 16, pair >> 16), [1, COUNT // 8, 8])
    zero = 8388608.0 + zero.to(tl.float32)  # 2^23 more, as in `_integer`
    codes_at = zero_at + 2 * groups * DIM + rows.to(tl.int64) * (BEFORE // 8)
    step: tl.constexpr = OCTETS * 8 // COUNT
    for start in range(0, BLOCK, step):
        token = tl.minimum(first + start + tl.arange(0, step), last)
        code = _codes(codes_at, head + token, octet, rows, COUNT, WIDTH)
        _store(target, (_integer(code) - zero) * scale, token, octet, FROM, DIM)


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    target,  # bfloat16 [token, DIM], the head's decoded values, written
    at,  # address of the layer's values
    first,  # first token
    last,  # last token
    head,  # rows of the planes before this head's
    rows,  # rows of each plane: heads * tokens
    scales,  # float32 [256]
    DIM: tl.constexpr,  # channels of a head
    GROUP: tl.constexpr,  # channels that share a scale
    WIDTH: tl.constexpr,  # bits of a code
    BLOCK: tl.constexpr,  # tokens of the program
    OCTETS: tl.constexpr,  # eights of channels decoded at a time
):
    """Decode the values of a program's tokens."""
    unit, scale_at = _unit(at), at + 1
    zero_at = scale_at + rows * (DIM // GROUP)
    codes_at = zero_at + rows * (DIM // GROUP)
    octet = tl.arange(0, DIM // 8)
    parts: tl.constexpr = 8 // GROUP if GROUP < 8 else 1  # groups that eight channels fall into
    part = (octet[:, None] * 8 + tl.arange(0, parts)[None, :] * GROUP) // GROUP
    step: tl.constexpr = OCTETS * 8 // DIM
    for start in range(0, BLOCK, step):
        token = tl.minimum(first + start + tl.arange(0, step), last)
        code = _codes(codes_at, head + token, octet, rows, DIM, WIDTH)
        index = ((head + token) * (DIM // GROUP))[:, None, None] + part[None, :, :]
        scale = tl.load(scales + tl.load(scale_at + index).to(tl.int32)) * unit
        zero = _integer(tl.load(zero_at + index).to(tl.int32))
        value = _integer(tl.reshape(code, [step, DIM // 8, parts, 8 // parts]))
        value = tl.reshape((value - zero[:, :, :, None]) * scale[:, :, :, None], [step, DIM // 8, 8])
        _store(target, value, token, octet, 0, DIM)


@triton.jit
def _fp8_tokens(  # type: ignore[no-untyped-def]
    target,  # bfloat16 [token, DIM], the head's decoded keys or values, written
    at,  # address of the layer's keys or values
    first,  # first token
    last,  # last token
    head,  # rows of the codes before this head's
    rows,  # rows of the codes: heads * tokens
    scales,  # float32 [256]
    DIM: tl.constexpr,  # channels of a head
    BLOCK: tl.constexpr,  # tokens of the program
    OCTETS: tl.constexpr,  # eights of channels decoded at a time
):
    """Decode the keys or values of a program's tokens."""
    unit, scale_at = _unit(at), at + 1
    octet = tl.arange(0, DIM // 8)
    step: tl.constexpr = OCTETS * 8 // DIM
    for start in range(0, BLOCK, step):
        token = tl.minimum(first + start + tl.arange(0, step), last)
        scale = tl.load(scales + tl.load(scale_at + head + token).to(tl.int32)) * unit
        code = _codes(scale_at + rows, head + token, octet, rows, DIM, 8)
        _store(target, _fp8(code) * scale[:, None, None], token, octet, 0, DIM)


@triton.jit
def decode_affine_layer(  # type: ignore[no-untyped-def]
    scratch,  # uint8 [B, scratch_row], written: `[2, kv_head, longest, channel]` bfloat16 and the order of key channels
    scratch_row,  # bytes of a row of scratch
    data,  # uint8 [rows, row_bytes], encoded samples
    rows,  # int64 [B], each sample's row
    lengths,  # int64 [B], each sample's tokens
    scales,  # float32 [256], the scales of base 0
    row_bytes,  # bytes of a row of data
    layer_a,  # the layer begins at byte `layer_a + layer_b * tokens + layer_c * key groups`
    layer_b,
    layer_c,
    key_a,  # its keys take `key_a + key_b * tokens + key_c * key groups` bytes
    key_b,
    key_c,
    longest,  # tokens that scratch has room for
    DIM: tl.constexpr,  # channels of a head
    HEADS: tl.constexpr,  # KV heads
    KEY_GROUP: tl.constexpr,  # tokens of a key group, which a program decodes
    KEY_CLASSES: tl.constexpr,  # of each class of key channels: first place, bits before, channels, bits of a code
    VALUE_GROUP: tl.constexpr,  # channels of a value group
    VALUE_BITS: tl.constexpr,  # bits of a value's code
    OCTETS: tl.constexpr,  # eights of channels decoded at a time
):
    """Decode one layer of every sample; nothing beyond a sample's tokens is written.

    Key channels stay in stored order, and that order is written behind the values: there are fewer queries than keys to
    put in order. Threads without a token of their own decode the last one again.
    """
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tl.load(lengths + sample).to(tl.int32)
    groups = (tokens + KEY_GROUP - 1) // KEY_GROUP
    begin = layer_a + layer_b * tokens.to(tl.int64) + layer_c * groups.to(tl.int64)
    keys_at = data + tl.load(rows + sample) * row_bytes + begin
    values_at = keys_at + key_a + key_b * tokens.to(tl.int64) + key_c * groups.to(tl.int64)
    first = block * KEY_GROUP
    last = tl.minimum(first + KEY_GROUP, tokens) - 1
    if first < tokens:
        at = scratch + sample.to(tl.int64) * scratch_row
        keys = at.to(tl.pointer_type(tl.bfloat16)) + head * longest * DIM
        values = keys + HEADS * longest * DIM
        before, count = head * tokens, HEADS * tokens
        ordered: tl.constexpr = len(KEY_CLASSES) > 1
        unit, scale_at = _unit(keys_at), keys_at + 1 + (HEADS * DIM if ordered else 0)
        for index in tl.static_range(len(KEY_CLASSES)):
            _keys(
                keys,
                unit,
                scale_at,
                head * groups + block,
                HEADS * groups,
                first,
                last,
                before,
                count,
                scales,
                KEY_CLASSES[index][0],
                KEY_CLASSES[index][1],
                KEY_CLASSES[index][2],
                KEY_CLASSES[index][3],
                DIM,
                KEY_GROUP,
                OCTETS,
            )
        _values(values, values_at, first, last, before, count, scales, DIM, VALUE_GROUP, VALUE_BITS, KEY_GROUP, OCTETS)
        if ordered and block == 0:
            channel = tl.arange(0, DIM)
            order = tl.load(keys_at + 1 + head * DIM + channel)
            tl.store(at + 4 * HEADS * longest * DIM + head * DIM + channel, order)


@triton.jit
def decode_fp8_layer(  # type: ignore[no-untyped-def]
    scratch,  # uint8 [B, scratch_row], written: `[2, kv_head, longest, channel]` bfloat16
    scratch_row,  # bytes of a row of scratch
    data,  # uint8 [rows, row_bytes], encoded samples
    rows,  # int64 [B], each sample's row
    lengths,  # int64 [B], each sample's tokens
    scales,  # float32 [256], the scales of base 0
    row_bytes,  # bytes of a row of data
    layer_a,  # the layer begins at byte `layer_a + layer_b * tokens`
    layer_b,
    key_a,  # its keys take `key_a + key_b * tokens` bytes
    key_b,
    longest,  # tokens that scratch has room for
    DIM: tl.constexpr,  # channels of a head
    HEADS: tl.constexpr,  # KV heads
    BLOCK: tl.constexpr,  # tokens of a program
    OCTETS: tl.constexpr,  # eights of channels decoded at a time
):
    """Decode one layer of every sample; nothing beyond a sample's tokens is written."""
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tl.load(lengths + sample).to(tl.int32)
    keys_at = data + tl.load(rows + sample) * row_bytes + layer_a + layer_b * tokens.to(tl.int64)
    values_at = keys_at + key_a + key_b * tokens.to(tl.int64)
    first = block * BLOCK
    last = tl.minimum(first + BLOCK, tokens) - 1
    if first < tokens:
        at = scratch + sample.to(tl.int64) * scratch_row
        keys = at.to(tl.pointer_type(tl.bfloat16)) + head * longest * DIM
        values = keys + HEADS * longest * DIM
        before, count = head * tokens, HEADS * tokens
        _fp8_tokens(keys, keys_at, first, last, before, count, scales, DIM, BLOCK, OCTETS)
        _fp8_tokens(values, values_at, first, last, before, count, scales, DIM, BLOCK, OCTETS)


def decode_affine(codec: AffineCodec, prefixes: PackedPrefixes, layer: int, scratch: Tensor) -> None:
    """`TensorCodec.decode_batch` of affine codecs."""
    channels = prefixes.layout.head_dim
    key_bits, value_bits = codec.bits_of(layer)
    classes, first, before = [], 0, 0
    for count, width in codec.key_classes(key_bits, channels):
        classes.append((first, before, count, width))
        first, before = first + count, before + count * width
    begin, keys = _linear_places(codec, prefixes.layout, codec.key_group)[layer]
    constants: dict[str, Any] = {"KEY_GROUP": codec.key_group, "KEY_CLASSES": tuple(classes)}
    constants |= {"VALUE_GROUP": codec.value_group_of(channels), "VALUE_BITS": value_bits}
    _launch(decode_affine_layer, codec.key_group, prefixes, scratch, begin + keys, constants)


def decode_fp8(codec: Fp8Codec, prefixes: PackedPrefixes, layer: int, scratch: Tensor) -> None:
    """`TensorCodec.decode_batch` of fp8."""
    begin, keys = _linear_places(codec, prefixes.layout, 1)[layer]
    _launch(decode_fp8_layer, _FP8_BLOCK, prefixes, scratch, begin[:2] + keys[:2], {"BLOCK": _FP8_BLOCK})


def _launch(
    kernel: Any, block: int, prefixes: PackedPrefixes, scratch: Tensor, places: list[int], constants: dict[str, Any]
) -> None:
    """Decode by programs of `block` tokens of a head; `places` says where layer and keys lie, as `_linear_places`."""
    layout, data, scales = prefixes.layout, prefixes.data, scales_on(scratch.device, 0)
    kernel[triton.cdiv(prefixes.longest, block), layout.kv_heads, len(prefixes.rows)](
        scratch, scratch.stride(0), data, prefixes.rows, prefixes.lengths, scales, data.stride(0),
        *places, prefixes.longest,
        DIM=layout.head_dim, HEADS=layout.kv_heads, OCTETS=_OCTETS, num_warps=_WARPS, num_stages=1, **constants,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _linear_places(codec: LayeredCodec, layout: PrefixLayout, group: int) -> list[list[list[int]]]:
    """Start of each layer and length of its keys, in a form that a kernel evaluates for each sample.

    `[layer, 2, 3]`: a, b and c of `a + b * tokens + c * key groups` bytes, found from three points of that plane, 1 and
    2 tokens in a group and `group + 1` tokens in two groups. `group`: tokens of a key group; 1 for a codec without.
    """
    shapes = [layout.shape(tokens) for tokens in (1, 2, group + 1)]
    starts = [codec.layer_starts(shape)[: layout.layers] for shape in shapes]
    keys = [[codec.layer_bytes(layer, shape)[0] for layer in range(layout.layers)] for shape in shapes]
    one, two, more = np.stack([starts, keys], axis=-1)
    per_token = two - one
    per_group = more - one - group * per_token
    places: list[list[list[int]]] = np.stack([one - per_token - per_group, per_token, per_group], axis=-1).tolist()
    return places
