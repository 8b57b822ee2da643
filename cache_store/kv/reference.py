"""Encoding and decoding with a `KVCodec` in numpy: the reference that faster versions equal bit for bit.

Only operations that IEEE 754 defines to the bit are used, in float32, in a fixed order: difference, division, product,
maximum, rounding half to even. Sums, whose order differs between libraries, are of integers only.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.kv.codec import (
    ERROR_STEPS,
    MAX_VALUE,
    MAX_ZERO,
    TRIED,
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
    values = from_bfloat16(bits)
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


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    """The float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


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
    starts = np.arange(0, x.shape[1], codec.key_group)
    low: Floats = np.minimum.reduceat(x, starts, axis=1)
    high: Floats = np.maximum.reduceat(x, starts, axis=1)
    if len(classes) > 1:
        order = np.argsort(-_weights(x, high - low), axis=1, kind="stable")
        _put(segments, data, "order", order.astype(np.uint8))
        x, low, high = (np.take_along_axis(array, order[:, None], 2) for array in (x, low, high))
    levels = np.concatenate([np.full(count, 2**width - 1, np.float32) for count, width in classes])
    largest: Floats = np.maximum(np.abs(low), np.abs(high))
    least = largest / np.float32(MAX_ZERO)
    padding = -x.shape[1] % codec.key_group
    padded = np.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(x.shape[0], -1, codec.key_group, x.shape[2])
    members = (np.arange(x.shape[1] + padding) < x.shape[1]).reshape(-1, codec.key_group, 1)
    zero, codes = _fit(segments, data, padded, 2, (low, high), levels, least, (-32767, 32767), members)
    _put(segments, data, "zero", zero)
    _put_codes(segments, data, classes, codes.reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]])
    return None


def _weights(x: Floats, spans: Floats) -> NDArray[np.float64]:
    """How much a key channel's errors count: its spans squared, as its errors would be, times its queries' energy.

    Queries are large where keys are; rotary embedding pairs a channel with its partner half the channels away.
    """
    largest = np.maximum(np.abs(x).max(), np.float32(2.0**-100))
    energy = _energy(x / largest)
    energy += np.roll(energy, x.shape[2] // 2, axis=1)
    return energy.astype(np.float64) * _energy(spans / largest).astype(np.float64)


def _energy(x: Floats) -> NDArray[np.int64]:
    steps = np.rint(x * np.float32(WEIGHT_STEPS)).astype(np.int64)
    energy: NDArray[np.int64] = (steps * steps).sum(1)
    return energy


def _fit(
    segments: list[Segment],
    data: NDArray[np.uint8],
    x: Floats,
    axis: int,
    extremes: tuple[Floats, Floats],
    levels: Floats | np.float32,
    least: Floats | np.float32,
    zeros: tuple[float, float],
    members: NDArray[np.bool_] | np.bool_,
) -> tuple[Floats, Floats]:
    """Store each group's scale of least squared error; return the groups' zeros and all codes.

    Groups lie along `axis` of `x`, as far as `members` holds; scales are at least `least`, zeros within `zeros`.
    """
    low, high = extremes
    table, first = _covering(segments, data, np.maximum((high - low) / levels, least))
    lowest = np.minimum(np.searchsorted(table, least, side="left"), 255)
    unit = np.expand_dims(table[first], axis)
    best: list[NDArray[Any]] = []
    for step in TRIED:
        index = np.clip(first + step, lowest, 255)
        scale = table[index]
        zero = np.clip(np.rint((levels - (low + high) / scale) / np.float32(2)), *zeros)
        wide_scale, wide_zero = np.expand_dims(scale, axis), np.expand_dims(zero, axis)
        codes = np.clip(np.rint(x / wide_scale) + wide_zero, 0, levels)
        back = from_bfloat16(to_bfloat16((codes - wide_zero) * wide_scale))
        error = np.rint((x - back) / unit * np.float32(ERROR_STEPS)).astype(np.int64) * members
        tried = [(error * error).sum(axis), index, zero, codes]
        if best:
            better = tried[0] < best[0]
            wide = np.expand_dims(better, axis)
            tried = [np.where(wide if a.ndim == x.ndim else better, a, b) for a, b in zip(tried, best, strict=True)]
        best = tried
    _put(segments, data, "scale", best[1].astype(np.uint8))
    return best[2], best[3]


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
    limits = (0.0, float(levels))
    zero, codes = _fit(segments, data, grouped, 3, (low, high), levels, np.float32(0), limits, np.True_)
    _put(segments, data, "zero", zero)
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
    table, first = _covering(segments, data, np.abs(x).max(-1, keepdims=True) / np.float32(448))
    _put(segments, data, "scale", first)
    scale = table[first]
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


def _covering(segments: list[Segment], data: NDArray[np.uint8], needed: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Store the base; return its table and the indices of the smallest scales that are as large as needed."""
    base = base_for(float(needed.max()))
    table = scale_table(base)
    _put(segments, data, "base", np.array([base], np.int8))
    return table, np.minimum(np.searchsorted(table, needed, side="left"), 255)


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
