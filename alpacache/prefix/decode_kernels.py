"""Decoding one layer of encoded prefixes on the GPU: `codecs.decode_layer` for a whole batch, bit for bit.

Codes lie in bit planes at any byte address. A thread decodes eight channels of a token: it reads aligned words and
shifts them, because loading a byte costs as much as loading a word, and nothing passes between threads. A program
decodes the tokens of one key group of one head, so that it reads the scales of its keys once. That takes 1.5 ms for all
layers of 16 samples of 1 camera on an H200, where tiles of 32 tokens with codes of all widths at once took 2.65 (2.4
times the instructions, and barriers; both measured).
"""

import triton
import triton.language as tl
from torch import Tensor

from alpacache.prefix.codecs import scales_on
from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.packed import PackedPrefixes

_OCTETS, _WARPS = 64, 2
"""Eights of channels that a program decodes at a time, and its warps; the best of seven on an H200."""
_FP8_BLOCK = 64
"""Tokens a program, where there are no groups of them."""


@triton.jit
def _fp8(code):  # type: ignore[no-untyped-def]
    """E4M3 codes as float32, by hand, because only compute capability 8.9 converts them itself."""
    magnitude = ((code & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 128) != 0, -magnitude, magnitude)


@triton.jit
def _integer(code):  # type: ignore[no-untyped-def]
    """2^23 plus a code as float32: differences are exact, and converting is slower than any other operation."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _unit(at):  # type: ignore[no-untyped-def]
    """2 to the power of the int8 there, which all scales of a layer's keys or values are multiples of."""
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
    """`[..., 8]` from each address on."""
    pair = _two_words(at, where)
    found = (pair[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 255
    return tl.reshape(found, [where.shape[0], where.shape[1], 8])


@triton.jit
def _plane(  # type: ignore[no-untyped-def]
    code, at, row, octet, rows, COUNT: tl.constexpr, WIDTH: tl.constexpr, PLANE: tl.constexpr
):  # fmt: skip
    """`_codes` with one more of their planes, if they have one of this width."""
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
    target, unit, scale_at, group, groups, first, last, head, rows, scales,
    FROM: tl.constexpr, BEFORE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """One class of a group's key channels: `COUNT` from the place `FROM` on, with codes of `WIDTH` bits, behind
    `BEFORE` bits of a token. From `scale_at` on lie scales, zeros and codes of all heads; a scale counts in `unit`."""
    octet = tl.arange(0, COUNT // 8)
    place = (group * DIM + FROM + octet * 8)[None, :]
    scale = tl.load(scales + _bytes(scale_at, place)) * unit
    quad = tl.arange(0, COUNT // 4)
    zero_at = scale_at + groups * DIM
    pair = _two_words(zero_at, 2 * (group * DIM + FROM + quad * 4)[None, :])
    zero = tl.reshape(tl.join((pair << 16) >> 16, pair >> 16), [1, COUNT // 8, 8])
    zero = 8388608.0 + zero.to(tl.float32)  # as `_integer` has it
    codes_at = zero_at + 2 * groups * DIM + rows.to(tl.int64) * (BEFORE // 8)
    step: tl.constexpr = OCTETS * 8 // COUNT
    for start in range(0, BLOCK, step):
        token = tl.minimum(first + start + tl.arange(0, step), last)
        code = _codes(codes_at, head + token, octet, rows, COUNT, WIDTH)
        _store(target, (_integer(code) - zero) * scale, token, octet, FROM, DIM)


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    target, at, first, last, head, rows, scales,
    DIM: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """Values of a program's tokens; the layer's begin at `at`."""
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
    target, at, first, last, head, rows, scales, DIM: tl.constexpr, BLOCK: tl.constexpr, OCTETS: tl.constexpr
):  # fmt: skip
    """Keys or values of a program's tokens; the layer's begin at `at`."""
    unit, scale_at = _unit(at), at + 1
    octet = tl.arange(0, DIM // 8)
    step: tl.constexpr = OCTETS * 8 // DIM
    for start in range(0, BLOCK, step):
        token = tl.minimum(first + start + tl.arange(0, step), last)
        scale = tl.load(scales + tl.load(scale_at + head + token).to(tl.int32)) * unit
        code = _codes(scale_at + rows, head + token, octet, rows, DIM, 8)
        _store(target, _fp8(code) * scale[:, None, None], token, octet, 0, DIM)


@triton.jit
def decode_layer(  # type: ignore[no-untyped-def]
    scratch, scratch_row, data, rows, lengths, scales,
    row_bytes, layer_a, layer_b, layer_c, key_a, key_b, key_c, longest,
    IS_FP8: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, KEY_GROUP: tl.constexpr,
    KEY_CLASSES: tl.constexpr, VALUE_GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """One layer of every sample, decoded to `[2, kv_head, longest, channel]`; nothing beyond a sample's tokens.

    Channels of keys stay in stored order, which is kept behind it: it is the queries that are few. Threads without a
    token of their own decode the last one again.
    """
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tl.load(lengths + sample).to(tl.int32)
    groups = (tokens + KEY_GROUP - 1) // KEY_GROUP
    begin = layer_a + layer_b * tokens.to(tl.int64) + layer_c * groups.to(tl.int64)
    keys_at = data + tl.load(rows + sample) * row_bytes + begin
    values_at = keys_at + key_a + key_b * tokens.to(tl.int64) + key_c * groups.to(tl.int64)
    first = block * BLOCK
    last = tl.minimum(first + BLOCK, tokens) - 1
    if first < tokens:
        at = scratch + sample.to(tl.int64) * scratch_row
        keys = at.to(tl.pointer_type(tl.bfloat16)) + head * longest * DIM
        values = keys + HEADS * longest * DIM
        before, count = head * tokens, HEADS * tokens
        if IS_FP8:
            _fp8_tokens(keys, keys_at, first, last, before, count, scales, DIM, BLOCK, OCTETS)
            _fp8_tokens(values, values_at, first, last, before, count, scales, DIM, BLOCK, OCTETS)
        else:
            ordered: tl.constexpr = len(KEY_CLASSES) > 1
            unit, scale_at = _unit(keys_at), keys_at + 1 + (HEADS * DIM if ordered else 0)
            for index in tl.static_range(len(KEY_CLASSES)):
                _keys(
                    keys, unit, scale_at, head * groups + block, HEADS * groups, first, last, before, count, scales,
                    KEY_CLASSES[index][0], KEY_CLASSES[index][1], KEY_CLASSES[index][2], KEY_CLASSES[index][3],
                    DIM, BLOCK, OCTETS,
                )  # fmt: skip
            _values(values, values_at, first, last, before, count, scales, DIM, VALUE_GROUP, VALUE_BITS, BLOCK, OCTETS)
            if ordered and block == 0:
                channel = tl.arange(0, DIM)
                order = tl.load(keys_at + 1 + head * DIM + channel)
                tl.store(at + 4 * HEADS * longest * DIM + head * DIM + channel, order)


def decode(prefixes: PackedPrefixes, layer: int, scratch: Tensor | None = None) -> tuple[Tensor, int]:
    """One layer of every sample as rows of `[2, kv_head, longest, channel]` bfloat16, and where a row's order lies.

    The order is `[kv_head, channel]` uint8, the channel at each place of a key, where the codec permutes them.
    `scratch`, of `scratch_shape`, is what is written; None allocates it.
    """
    layout, codec, samples, longest = prefixes.layout, prefixes.layout.codec, len(prefixes.rows), prefixes.longest
    assert codec is not None
    is_fp8 = codec.kind == "fp8"
    key_bits, value_bits = codec.bits_of(layer)
    if scratch is None:
        scratch = prefixes.data.new_empty(scratch_shape(layout, samples, longest))
    block = _FP8_BLOCK if is_fp8 else codec.key_group
    decode_layer[(triton.cdiv(longest, block), layout.kv_heads, samples)](
        scratch, scratch.stride(0), prefixes.data, prefixes.rows, prefixes.lengths, scales_on(scratch.device, 0),
        prefixes.data.stride(0), *layout.starts[layer], *layout.key_bytes(layer), longest,
        IS_FP8=is_fp8, DIM=layout.head_dim, HEADS=layout.kv_heads, BLOCK=block, KEY_GROUP=codec.key_group,
        KEY_CLASSES=_classes(codec.key_classes(key_bits, layout.head_dim)),
        VALUE_GROUP=codec.value_group_of(layout.head_dim), VALUE_BITS=value_bits,
        OCTETS=_OCTETS, num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
    return scratch, order_at(layout, longest)


def scratch_shape(layout: PrefixLayout, samples: int, longest: int) -> tuple[int, int]:
    """Rows and bytes of what `decode` writes."""
    row = order_at(layout, longest) + layout.kv_heads * layout.head_dim
    return samples, row + -row % 256


def order_at(layout: PrefixLayout, longest: int) -> int:
    return 4 * layout.kv_heads * longest * layout.head_dim


def is_ordered(layout: PrefixLayout) -> bool:
    """Whether keys are stored with their channels permuted."""
    codec = layout.codec
    return codec is not None and codec.kind != "fp8" and len(codec.key_classes(8, layout.head_dim)) > 1


def _classes(classes: list[tuple[int, int]]) -> tuple[tuple[int, int, int, int], ...]:
    """Of each class of key channels: its first, the bits of a token's codes before it, channels, and bits of a code."""
    found, first, before = [], 0, 0
    for count, width in classes:
        found.append((first, before, count, width))
        first, before = first + count, before + count * width
    return tuple(found)
