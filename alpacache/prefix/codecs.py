"""Quantising keys and values on the device that has them, bit-equal to the reference in `cache_store.kv.reference`.

Decoding goes layer by layer if the caller wishes, so that a quantised prefix never exists decoded as a whole. Encoding
takes many layers at a time, and asks the device nothing before all of it is enqueued: else a GPU would be through with
the VLM by then, and wait for every launch. What passes over every value is in `codec_passes`, and for GPUs in
`codec_kernels`; here is what is done once a group or a sample.
"""

import math
from collections.abc import Iterator
from functools import cache, lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from alpacache.gpu.device import has_kernels
from alpacache.prefix import codec_passes
from alpacache.prefix.codec_passes import Groups
from cache_store.kv.codec import (
    MAX_VALUE,
    MAX_ZERO,
    KVCodec,
    Segment,
    planes,
    scale_table,
)

NOT_FINITE = "keys or values have NaN, infinity or a magnitude of 2^125, which cannot be quantised."
_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}


def encode(codec: KVCodec, kv: Tensor) -> Tensor:
    """Encoded bytes (uint8, flat, on the same device) of `[layer, 2, head, token, channel]`, as bfloat16.

    Raises `ValueError` unless all values are finite.
    """
    data, encodable = encode_unasked(codec, kv)
    if not bool(encodable):
        raise ValueError(NOT_FINITE)
    return data


def encode_unasked(codec: KVCodec, kv: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes, and as a boolean on the same device whether they are good; nothing waits for the device."""
    kv, passes = kv.to(torch.bfloat16).contiguous(), _passes(kv.device)
    shape = tuple(kv.shape)
    data = torch.empty(codec.encoded_bytes(shape), dtype=torch.uint8, device=kv.device)
    end = 0
    for first, count in _alike(codec, shape, passes.AT_ONCE):
        keys, values = codec.layer_bytes(first, shape)
        rows = data[end : end + count * (keys + values)].view(count, keys + values)
        x = kv[first : first + count]
        _encode_keys(passes, codec, first, x[:, 0], rows[:, :keys])
        _encode_values(passes, codec, first, x[:, 1], rows[:, keys:])
        end += count * (keys + values)
    return data, torch.stack(torch.aminmax(kv)).abs().lt(MAX_VALUE).all()


def _passes(device: torch.device) -> ModuleType:
    """The module of what passes over every value: kernels on a GPU, if triton is installed."""
    if has_kernels(device):
        from alpacache.prefix import encode_kernels

        return encode_kernels
    return codec_passes


def _alike(codec: KVCodec, shape: tuple[int, ...], at_once: int) -> Iterator[tuple[int, int]]:
    """First layer and number of layers that are encoded at once: of the same bits, and not too many values."""
    most = max(1, at_once // max(1, math.prod(shape[2:])))
    first = 0
    for layer in range(1, shape[0] + 1):
        end = layer == shape[0]
        if end or layer - first == most or codec.bits_of(layer) != codec.bits_of(first):
            yield first, layer - first
            first = layer


def decode(codec: KVCodec, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """bfloat16 `[layer, 2, head, token, channel]` of encoded bytes."""
    if tuple(data.shape) != (codec.encoded_bytes(shape),):
        raise ValueError(
            f"{list(shape)} takes {codec.encoded_bytes(shape)} bytes in this codec, got {list(data.shape)}."
        )
    kv = torch.empty(shape, dtype=torch.bfloat16, device=data.device)
    end = 0
    for layer in range(shape[0]):
        size = sum(codec.layer_bytes(layer, shape))
        kv[layer] = decode_layer(codec, layer, data[end : end + size], shape)
        end += size
    return kv


def decode_layer(codec: KVCodec, layer: int, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """bfloat16 `[2, head, token, channel]` of one layer's bytes; `shape` is the whole sample's."""
    keys, _ = codec.layer_bytes(layer, shape)
    return torch.stack(
        [
            _decode_keys(codec, layer, data[:keys], shape[2:]).to(torch.bfloat16),
            _decode_values(codec, layer, data[keys:], shape[2:]).to(torch.bfloat16),
        ]
    )


def _encode_keys(passes: ModuleType, codec: KVCodec, layer: int, x: Tensor, data: Tensor) -> None:
    """Keys `[layers, head, token, channel]` of layers like this one into their rows of bytes."""
    segments = codec.segments("key", layer, tuple(x.shape[1:]))
    if codec.kind == "fp8":
        _encode_fp8(segments, x, data)
        return
    classes = codec.key_classes(codec.bits_of(layer)[0], x.shape[-1])
    low, high = passes.key_extremes(x, codec.key_group)
    largest, order = torch.maximum(low.abs(), high.abs()), None
    if len(classes) > 1:
        order = torch.argsort(-_weights(passes, x, high - low, largest), dim=-1, stable=True)
        _put(segments, data, "order", order)
        low, high, largest = (torch.gather(a, -1, order[:, :, None].expand_as(a)) for a in (low, high, largest))
    levels, least = _levels(tuple(classes), x.device), largest / float(MAX_ZERO)
    needed = torch.maximum((high - low) / levels, least)
    table = _covering(segments, data, needed)
    groups = Groups(sums=low + high, needed=needed, least=least, levels=levels, table=table)
    index, zero, codes = passes.fit_keys(x, order, groups, codec.key_group)
    _put(segments, data, "scale", index)
    _put(segments, data, "zero", zero)
    _put_codes(passes, segments, data, classes, codes)


def _weights(passes: ModuleType, x: Tensor, spans: Tensor, largest: Tensor) -> Tensor:
    most = largest.flatten(1).amax(1).clamp(min=2.0**-100)
    energy: Tensor = passes.energy(x, most)
    energy = energy + torch.roll(energy, x.shape[-1] // 2, dims=-1)
    return energy.double() * codec_passes.energy(spans, most).double()


@lru_cache(maxsize=16)
def _levels(classes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Greatest code of each channel, float32."""
    widths = [width for count, width in classes for _ in range(count)]
    return torch.tensor([2.0**width - 1 for width in widths], device=device)


def _decode_keys(codec: KVCodec, layer: int, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    segments = codec.segments("key", layer, shape)
    if codec.kind == "fp8":
        return _decode_fp8(segments, data)
    classes = codec.key_classes(codec.bits_of(layer)[0], shape[2])
    groups = torch.arange(shape[1], device=data.device) // codec.key_group
    zero = _get(segments, data, "zero").float()
    x = (_get_codes(segments, data, classes) - zero[:, groups]) * _get_scales(segments, data)[:, groups]
    if len(classes) > 1:
        order = _get(segments, data, "order").long()
        return torch.empty_like(x).scatter_(2, order[:, None].expand_as(x), x)
    return x


def _encode_values(passes: ModuleType, codec: KVCodec, layer: int, x: Tensor, data: Tensor) -> None:
    """Values `[layers, head, token, channel]` of layers like this one into their rows of bytes."""
    segments = codec.segments("value", layer, tuple(x.shape[1:]))
    if codec.kind == "fp8":
        _encode_fp8(segments, x, data)
        return
    bits = codec.bits_of(layer)[1]
    low, high = passes.value_extremes(x, codec.value_group_of(x.shape[-1]))
    low, high, levels = low.clamp(max=0), high.clamp(min=0), _levels(((1, bits),), x.device)
    needed = (high - low) / levels
    table = _covering(segments, data, needed)
    groups = Groups(sums=low + high, needed=needed, least=None, levels=levels, table=table)
    index, zero, codes = passes.fit_values(x, groups)
    _put(segments, data, "scale", index)
    _put(segments, data, "zero", zero)
    _put_codes(passes, segments, data, [(x.shape[-1], bits)], codes)


def _decode_values(codec: KVCodec, layer: int, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    segments = codec.segments("value", layer, shape)
    if codec.kind == "fp8":
        return _decode_fp8(segments, data)
    codes = _get_codes(segments, data, [(shape[2], codec.bits_of(layer)[1])])
    grouped = codes.reshape(*shape[:2], -1, codec.value_group_of(shape[2]))
    zero = _get(segments, data, "zero").float()
    x = (grouped - zero[..., None]) * _get_scales(segments, data)[..., None]
    return x.flatten(2)


def _encode_fp8(segments: list[Segment], x: Tensor, data: Tensor) -> None:
    needed = x.abs().amax(-1, keepdim=True).float() / 448.0
    table = _covering(segments, data, needed)
    index = codec_passes.search(table, needed)
    _put(segments, data, "scale", index)
    scaled = (x / codec_passes.scales(table, index)).clamp(-448, 448)
    _put(segments, data, "codes", scaled.to(torch.float8_e4m3fn).view(torch.uint8))


def _decode_fp8(segments: list[Segment], data: Tensor) -> Tensor:
    codes = _get(segments, data, "codes").view(torch.float8_e4m3fn)
    return codes.float() * _get_scales(segments, data)


def _covering(segments: list[Segment], data: Tensor, needed: Tensor) -> Tensor:
    """Each layer's scales `[layers, 256]`, which reach its largest needed one; store their bases.

    `base_for` and `scale_table` by the bits of float32, so that the device need not be asked. The exponents of all
    scales are normal; of a number that is not, any exponent is below the least base.
    """
    largest = needed.flatten(1).amax(1, keepdim=True)
    exponent = (largest.view(torch.int32) >> 23) - 126
    base = torch.where(largest > 0, (exponent - 15).clamp(-100, 112), 0)
    _put(segments, data, "base", base)
    return (scales_on(data.device, 0).view(torch.int32) + (base << 23)).view(torch.float32)


def _get_scales(segments: list[Segment], data: Tensor) -> Tensor:
    base = int(_get(segments, data, "base")[0])
    return scales_on(data.device, base)[_get(segments, data, "scale").long()]


@cache
def scales_on(device: torch.device, base: int) -> Tensor:
    """`scale_table` on a device, float32 `[256]`, for as long as the process lives: captured graphs read it."""
    return torch.from_numpy(np.ascontiguousarray(scale_table(base))).to(device)


def _put_codes(
    passes: ModuleType, segments: list[Segment], data: Tensor, classes: list[tuple[int, int]], codes: Tensor
) -> None:
    first = 0
    for index, (count, width) in enumerate(classes):
        done = 0
        for plane in planes(width):
            passes.pack(codes, first, count, done, plane, _row_bytes(segments, data, f"codes.{index}.{plane}"))
            done += plane
        first += count


def _get_codes(segments: list[Segment], data: Tensor, classes: list[tuple[int, int]]) -> Tensor:
    found = []
    for index, (_, width) in enumerate(classes):
        codes: Tensor | None = None
        shift = 0
        for plane in planes(width):
            packed = _get(segments, data, f"codes.{index}.{plane}")
            parts = [(packed >> (i * plane)) & (2**plane - 1) for i in range(8 // plane)]
            values = torch.stack(parts, -1).flatten(-2).to(torch.int16) << shift
            codes = values if codes is None else codes | values
            shift += plane
        assert codes is not None
        found.append(codes.float())
    return torch.cat(found, -1)


def _segment(segments: list[Segment], name: str) -> Segment:
    return next(segment for segment in segments if segment.name == name)


def _row_bytes(segments: list[Segment], data: Tensor, name: str) -> Tensor:
    """Where a segment lies in each layer's row of bytes, `[layers, bytes]`."""
    segment = _segment(segments, name)
    return data[:, segment.offset : segment.offset + segment.size_bytes]


def _put(segments: list[Segment], data: Tensor, name: str, array: Tensor) -> None:
    """Into each layer's row of bytes its part of `[layers, ...]`."""
    segment = _segment(segments, name)
    assert tuple(array.shape[1:]) == segment.shape, name
    raw = array.to(_DTYPES[segment.dtype]).contiguous().flatten(1).view(torch.uint8)
    _row_bytes(segments, data, name).copy_(raw)


def _get(segments: list[Segment], data: Tensor, name: str) -> Tensor:
    segment = _segment(segments, name)
    raw = data[segment.offset : segment.offset + segment.size_bytes].clone()
    return raw.view(_DTYPES[segment.dtype]).reshape(segment.shape)
