"""Quantising keys and values on the device that has them, bit-equal to the reference in `cache_store.kv_coding`.

Decoding goes layer by layer if the caller wishes, so that a quantised prefix never exists decoded as a whole. Encoding
takes several layers at a time: hundreds of operations each, which a GPU is through with before the next is launched.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cache_store.kv_codec import (
    ERROR_STEPS,
    MAX_VALUE,
    MAX_ZERO,
    TRIED,
    WEIGHT_STEPS,
    KVCodec,
    Segment,
    base_for,
    planes,
    scale_table,
)

_ENCODED_AT_ONCE = 2**24
"""Values, of keys or values; temporary memory is some 80 bytes for each."""
_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}


def encode(codec: KVCodec, kv: Tensor) -> Tensor:
    """Encoded bytes (uint8, flat, on the same device) of `[layer, 2, head, token, channel]`, as bfloat16.

    Raises `ValueError` unless all values are finite.
    """
    kv = kv.to(torch.bfloat16)
    if not bool((kv.abs() < MAX_VALUE).all()):
        raise ValueError("keys or values have NaN, infinity or a magnitude of 2^125, which cannot be quantised.")
    shape = tuple(kv.shape)
    data = torch.empty(codec.encoded_bytes(shape), dtype=torch.uint8, device=kv.device)
    end = 0
    for first, count in _alike(codec, shape):
        keys, values = codec.layer_bytes(first, shape)
        rows = data[end : end + count * (keys + values)].view(count, keys + values)
        x = kv[first : first + count]
        _encode_keys(codec, first, x[:, 0].float(), rows[:, :keys])
        _encode_values(codec, first, x[:, 1].float(), rows[:, keys:])
        end += count * (keys + values)
    return data


def _alike(codec: KVCodec, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First layer and number of layers that are encoded at once: of the same bits, and not too many."""
    most = max(1, _ENCODED_AT_ONCE // max(1, math.prod(shape[2:])))
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


def _encode_keys(codec: KVCodec, layer: int, x: Tensor, data: Tensor) -> None:
    """Keys `[layers, head, token, channel]` of layers like this one into their rows of bytes."""
    segments = codec.segments("key", layer, tuple(x.shape[1:]))
    if codec.kind == "fp8":
        _encode_fp8(segments, x, data)
        return
    classes = codec.key_classes(codec.bits_of(layer)[0], x.shape[-1])
    tokens = x.shape[2]
    padding = -tokens % codec.key_group
    last = x[:, :, -1:].expand(-1, -1, padding, -1)
    padded = torch.cat([x, last], 2)  # repeats change neither minimum nor maximum
    grouped = padded.reshape(*x.shape[:2], -1, codec.key_group, x.shape[-1])
    low, high = grouped.amin(3), grouped.amax(3)
    if len(classes) > 1:
        order = torch.argsort(-_weights(x, high - low), dim=-1, stable=True)
        _put(segments, data, "order", order)
        grouped = torch.gather(grouped, -1, order[:, :, None, None].expand_as(grouped))
        low, high = (torch.gather(extreme, -1, order[:, :, None].expand_as(extreme)) for extreme in (low, high))
    levels = torch.cat([torch.full((count,), 2.0**width - 1, device=x.device) for count, width in classes])
    least = torch.maximum(low.abs(), high.abs()) / float(MAX_ZERO)
    members = (torch.arange(tokens + padding, device=x.device) < tokens).view(-1, codec.key_group, 1)
    zero, codes = _fit(segments, data, grouped, -2, (low, high), levels, least, (-32767, 32767), members)
    _put(segments, data, "zero", zero)
    _put_codes(segments, data, classes, codes.flatten(2, 3)[:, :, :tokens])


def _weights(x: Tensor, spans: Tensor) -> Tensor:
    largest = x.abs().amax((1, 2, 3), keepdim=True).clamp(min=2.0**-100)
    energy = _energy(x / largest)
    energy = energy + torch.roll(energy, x.shape[-1] // 2, dims=-1)
    return energy.double() * _energy(spans / largest).double()


def _energy(x: Tensor) -> Tensor:
    steps = torch.round(x * WEIGHT_STEPS).long()
    return (steps * steps).sum(-2)


def _fit(
    segments: list[Segment],
    data: Tensor,
    x: Tensor,
    axis: int,
    extremes: tuple[Tensor, Tensor],
    levels: Tensor,
    least: Tensor,
    zeros: tuple[float, float],
    members: Tensor,
) -> tuple[Tensor, Tensor]:
    low, high = extremes
    table, first = _covering(segments, data, torch.maximum((high - low) / levels, least))
    lowest = _search(table, least.expand_as(low))
    unit = _scales(table, first).unsqueeze(axis)
    best: list[Tensor] = []
    for step in TRIED:
        index = torch.maximum(first + step, lowest).clamp(max=255)
        scale = _scales(table, index)
        zero = torch.round((levels - (low + high) / scale) / 2).clamp(*zeros)
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
    _put(segments, data, "scale", best[1])
    return best[2], best[3]


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


def _encode_values(codec: KVCodec, layer: int, x: Tensor, data: Tensor) -> None:
    """Values `[layers, head, token, channel]` of layers like this one into their rows of bytes."""
    segments = codec.segments("value", layer, tuple(x.shape[1:]))
    if codec.kind == "fp8":
        _encode_fp8(segments, x, data)
        return
    bits = codec.bits_of(layer)[1]
    grouped = x.reshape(*x.shape[:-1], -1, codec.value_group_of(x.shape[-1]))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    levels, least = torch.tensor(2.0**bits - 1, device=x.device), torch.zeros((), device=x.device)
    members, limits = torch.ones((), dtype=torch.bool, device=x.device), (0.0, 2.0**bits - 1)
    zero, codes = _fit(segments, data, grouped, -1, (low, high), levels, least, limits, members)
    _put(segments, data, "zero", zero)
    _put_codes(segments, data, [(x.shape[-1], bits)], codes.flatten(-2))


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
    table, first = _covering(segments, data, x.abs().amax(-1, keepdim=True) / 448.0)
    _put(segments, data, "scale", first)
    scale = _scales(table, first)
    _put(segments, data, "codes", (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def _decode_fp8(segments: list[Segment], data: Tensor) -> Tensor:
    codes = _get(segments, data, "codes").view(torch.float8_e4m3fn)
    return codes.float() * _get_scales(segments, data)


def _covering(segments: list[Segment], data: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """Each layer's scales `[layers, 256]`, and for each group the index of the first that is large enough."""
    bases = [base_for(largest) for largest in needed.flatten(1).amax(1).tolist()]
    table = torch.from_numpy(np.stack([scale_table(base) for base in bases])).to(data.device)
    _put(segments, data, "base", torch.tensor(bases, device=data.device)[:, None])
    return table, _search(table, needed)


def _search(table: Tensor, needed: Tensor) -> Tensor:
    return torch.searchsorted(table, needed.flatten(1).contiguous()).clamp(max=255).view(needed.shape)


def _scales(table: Tensor, index: Tensor) -> Tensor:
    return torch.gather(table, 1, index.flatten(1)).view(index.shape)


def _get_scales(segments: list[Segment], data: Tensor) -> Tensor:
    return _table(int(_get(segments, data, "base")[0]), data)[_get(segments, data, "scale").long()]


def _table(base: int, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(scale_table(base))).to(like.device)


def _put_codes(segments: list[Segment], data: Tensor, classes: list[tuple[int, int]], codes: Tensor) -> None:
    first = 0
    for index, (count, width) in enumerate(classes):
        rest = codes[..., first : first + count].to(torch.int16)
        first += count
        for plane in planes(width):
            parts = (rest & (2**plane - 1)).reshape(*rest.shape[:-1], -1, 8 // plane)
            packed = parts[..., 0].clone()
            for i in range(1, 8 // plane):
                packed |= parts[..., i] << (i * plane)
            _put(segments, data, f"codes.{index}.{plane}", packed)
            rest = rest >> plane


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


def _put(segments: list[Segment], data: Tensor, name: str, array: Tensor) -> None:
    """Into each layer's row of bytes its part of `[layers, ...]`."""
    segment = _segment(segments, name)
    assert tuple(array.shape[1:]) == segment.shape, name
    raw = array.to(_DTYPES[segment.dtype]).contiguous().flatten(1).view(torch.uint8)
    data[:, segment.offset : segment.offset + segment.size_bytes] = raw


def _get(segments: list[Segment], data: Tensor, name: str) -> Tensor:
    segment = _segment(segments, name)
    raw = data[segment.offset : segment.offset + segment.size_bytes].clone()
    return raw.view(_DTYPES[segment.dtype]).reshape(segment.shape)
