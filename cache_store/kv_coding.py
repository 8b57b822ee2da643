"""Encoding and decoding with a `KVCodec` in numpy: the reference that faster versions equal bit for bit.

Only operations that IEEE 754 defines to the bit are used, in float32, in a fixed order: difference, division, product,
maximum, rounding half to even. Sums, whose order differs between libraries, are of integers only.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.kv_codec import (
    MAX_VALUE,
    MAX_ZERO,
    WEIGHT_STEPS,
    KVCodec,
    Segment,
    base_for,
    fp8_values,
    planes,
    scale_table,
)

Floats = NDArray[np.float32]


def encode(codec: KVCodec, bits: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Encoded bytes of bfloat16 bits `[layer, 2, head, token, channel]`; `ValueError` unless all are finite."""
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    if not (np.abs(values) < MAX_VALUE).all():
        raise ValueError("keys or values have NaN, infinity or a magnitude of 2^125, which cannot be quantised.")
    data = np.empty(codec.encoded_bytes(bits.shape), np.uint8)
    end = 0
    for layer in range(len(bits)):
        sizes = codec.layer_bytes(layer, bits.shape)
        _encode_keys(codec, layer, values[layer, 0], data[end : end + sizes[0]])
        end += sizes[0]
        _encode_values(codec, layer, values[layer, 1], data[end : end + sizes[1]])
        end += sizes[1]
    return data


def decode(codec: KVCodec, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """bfloat16 bits `[layer, 2, head, token, channel]` of encoded bytes."""
    if data.shape != (codec.encoded_bytes(shape),):
        raise ValueError(
            f"{list(shape)} takes {codec.encoded_bytes(shape)} bytes in this codec, got {list(data.shape)}."
        )
    values = np.empty(shape, np.float32)
    end = 0
    for layer in range(shape[0]):
        sizes = codec.layer_bytes(layer, shape)
        values[layer, 0] = _decode_keys(codec, layer, data[end : end + sizes[0]], shape[2:])
        end += sizes[0]
        values[layer, 1] = _decode_values(codec, layer, data[end : end + sizes[1]], shape[2:])
        end += sizes[1]
    return to_bfloat16(values)


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    raw = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _encode_keys(codec: KVCodec, layer: int, x: Floats, data: NDArray[np.uint8]) -> None:
    if codec.kind == "fp8":
        return _encode_fp8(codec.segments("key", layer, x.shape), x, data)
    segments = codec.segments("key", layer, x.shape)
    classes = codec.key_classes(codec.bits_of(layer)[0], x.shape[2])
    if len(classes) > 1:
        order = np.argsort(-_weights(x), axis=1, kind="stable").astype(np.uint8)
        _put(segments, data, "order", order)
        x = np.take_along_axis(x, order[:, None].astype(np.int64), 2)
    levels = np.concatenate([np.full(count, 2**width - 1, np.float32) for count, width in classes])
    starts = np.arange(0, x.shape[1], codec.key_group)
    low, high = np.minimum.reduceat(x, starts, axis=1), np.maximum.reduceat(x, starts, axis=1)
    needed = np.maximum((high - low) / levels, np.maximum(np.abs(low), np.abs(high)) / np.float32(MAX_ZERO))
    scale = _put_scales(segments, data, needed)
    zero = np.rint(-low / scale)
    _put(segments, data, "zero", zero.astype("<i2"))
    groups = np.arange(x.shape[1]) // codec.key_group
    _put_codes(segments, data, classes, np.clip(np.rint(x / scale[:, groups]) + zero[:, groups], 0, levels))
    return None


def _weights(x: Floats) -> NDArray[np.int64]:
    """Energy of each key channel with its partner half the channels away, as rotary embedding pairs them."""
    largest = np.maximum(np.abs(x).max(), np.float32(2.0**-100))
    steps = np.rint(x / largest * np.float32(WEIGHT_STEPS)).astype(np.int64)
    energy: NDArray[np.int64] = (steps * steps).sum(1)
    energy += np.roll(energy, x.shape[2] // 2, axis=1)
    return energy


def _decode_keys(codec: KVCodec, layer: int, data: NDArray[np.uint8], shape: tuple[int, ...]) -> Floats:
    segments = codec.segments("key", layer, shape)
    if codec.kind == "fp8":
        return _decode_fp8(segments, data)
    classes = codec.key_classes(codec.bits_of(layer)[0], shape[2])
    groups = np.arange(shape[1]) // codec.key_group
    zero = _get(segments, data, "zero").astype(np.float32)
    x = (_get_codes(segments, data, classes) - zero[:, groups]) * _get_scales(segments, data)[:, groups]
    if len(classes) > 1:
        order = _get(segments, data, "order").astype(np.int64)
        if (np.sort(order, axis=1) != np.arange(shape[2])).any():
            raise ValueError("the order of key channels is not a permutation.")
        unsorted = np.empty_like(x)
        np.put_along_axis(unsorted, np.broadcast_to(order[:, None], x.shape), x, 2)
        return unsorted
    return x


def _encode_values(codec: KVCodec, layer: int, x: Floats, data: NDArray[np.uint8]) -> None:
    segments = codec.segments("value", layer, x.shape)
    if codec.kind == "fp8":
        return _encode_fp8(segments, x, data)
    bits = codec.bits_of(layer)[1]
    levels = np.float32(2**bits - 1)
    grouped = x.reshape(*x.shape[:2], -1, codec.value_group_of(x.shape[2]))
    low = np.minimum(grouped.min(-1), np.float32(0))
    high = np.maximum(grouped.max(-1), np.float32(0))
    scale = _put_scales(segments, data, (high - low) / levels)
    zero = np.clip(np.rint(-low / scale), 0, levels)
    _put(segments, data, "zero", zero.astype(np.uint8))
    codes = np.clip(np.rint(grouped / scale[..., None]) + zero[..., None], 0, levels)
    _put_codes(segments, data, [(x.shape[2], bits)], codes.reshape(x.shape))
    return None


def _decode_values(codec: KVCodec, layer: int, data: NDArray[np.uint8], shape: tuple[int, ...]) -> Floats:
    segments = codec.segments("value", layer, shape)
    if codec.kind == "fp8":
        return _decode_fp8(segments, data)
    codes = _get_codes(segments, data, [(shape[2], codec.bits_of(layer)[1])])
    grouped = codes.reshape(*shape[:2], -1, codec.value_group_of(shape[2]))
    zero = _get(segments, data, "zero").astype(np.float32)
    x: Floats = (grouped - zero[..., None]) * _get_scales(segments, data)[..., None]
    return x.reshape(shape)


def _encode_fp8(segments: list[Segment], x: Floats, data: NDArray[np.uint8]) -> None:
    scale = _put_scales(segments, data, np.abs(x).max(-1, keepdims=True) / np.float32(448))
    values = fp8_values()
    middles = (values[1:] + values[:-1]) / 2
    size = np.minimum(np.abs(x / scale), np.float32(448))
    code = np.searchsorted(middles, size, side="left")
    tie = size == middles[np.minimum(code, len(middles) - 1)]
    code += tie & (code % 2 == 1)
    _put(segments, data, "codes", (code + 128 * np.signbit(x)).astype(np.uint8))


def _decode_fp8(segments: list[Segment], data: NDArray[np.uint8]) -> Floats:
    values = np.append(fp8_values(), np.float32(np.nan))
    x: Floats = np.concatenate([values, -values])[_get(segments, data, "codes")] * _get_scales(segments, data)
    return x


def _put_scales(segments: list[Segment], data: NDArray[np.uint8], needed: Floats) -> Floats:
    """Store and return the smallest scales of the table that are as large as needed."""
    base = base_for(float(needed.max()))
    table = scale_table(base)
    index = np.minimum(np.searchsorted(table, needed, side="left"), 255)
    _put(segments, data, "base", np.array([base], np.int8))
    _put(segments, data, "scale", index.astype(np.uint8))
    return table[index]


def _get_scales(segments: list[Segment], data: NDArray[np.uint8]) -> Floats:
    scales: Floats = scale_table(int(_get(segments, data, "base")[0]))[_get(segments, data, "scale")]
    return scales


def _put_codes(segments: list[Segment], data: NDArray[np.uint8], classes: list[tuple[int, int]], codes: Floats) -> None:
    first = 0
    for index, (count, width) in enumerate(classes):
        rest: NDArray[Any] = codes[..., first : first + count].astype(np.uint16)
        first += count
        for plane in planes(width):
            parts = (rest & (2**plane - 1)).astype(np.uint8).reshape(*rest.shape[:-1], -1, 8 // plane)
            packed = parts[..., 0].copy()
            for i in range(1, 8 // plane):
                packed |= parts[..., i] << np.uint8(i * plane)
            _put(segments, data, f"codes.{index}.{plane}", packed)
            rest = rest >> np.uint16(plane)


def _get_codes(segments: list[Segment], data: NDArray[np.uint8], classes: list[tuple[int, int]]) -> Floats:
    found = []
    for index, (_, width) in enumerate(classes):
        codes: NDArray[Any] | None = None
        shift = 0
        for plane in planes(width):
            packed = _get(segments, data, f"codes.{index}.{plane}")
            parts = [(packed >> np.uint8(i * plane)) & np.uint8(2**plane - 1) for i in range(8 // plane)]
            values = np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.uint16) << np.uint16(shift)
            codes = values if codes is None else codes | values
            shift += plane
        assert codes is not None
        found.append(codes.astype(np.float32))
    return np.concatenate(found, -1)


def _segment(segments: list[Segment], name: str) -> Segment:
    return next(segment for segment in segments if segment.name == name)


def _put(segments: list[Segment], data: NDArray[np.uint8], name: str, array: NDArray[Any]) -> None:
    segment = _segment(segments, name)
    assert array.shape == segment.shape, name
    raw = np.ascontiguousarray(array, np.dtype(segment.dtype).newbyteorder("<")).reshape(-1).view(np.uint8)
    data[segment.offset : segment.offset + segment.size_bytes] = raw


def _get(segments: list[Segment], data: NDArray[np.uint8], name: str) -> NDArray[Any]:
    segment = _segment(segments, name)
    raw = data[segment.offset : segment.offset + segment.size_bytes].copy()
    return raw.view(np.dtype(segment.dtype).newbyteorder("<")).reshape(segment.shape)
