"""The affine codecs `int8`, `int5` and `int4`: integer codes with a scale and an offset for each group.

Attention passes on errors of keys about twice as large as those of values, most of them through the channels of largest
magnitude, where queries are large too. So keys are quantised by channel, with more bits for those, and values by token.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from cache_store.document import take
from cache_store.errors import FormatError
from cache_store.kv.layered import (
    Floats,
    LayeredCodec,
    Part,
    Segment,
    SegmentedBytes,
    from_bfloat16,
    place_segments,
    to_bfloat16,
)

SPREAD = ((8, 2), (8, 1), (2, 0), (4, -1))
"""Classes of key channels by falling weight: 1 in 8 has 2 bits more, 1 in 8 one more, 1 in 2 none, 1 in 4 one less."""
WEIGHT_STEPS = 4096.0
"""Fixed-point resolution in which the weights of key channels are summed, so that every library sums to the same."""
MAX_ZERO = 32000
"""Bound of a key group's offset in steps: a wide scale is taken where an offset would not fit its 16 bits."""
TRIED = (0, -1, 1, 2)
"""Scales that an encoder tries for a group, in steps of the table from the first that covers the group."""
ERROR_STEPS = 64.0
"""Fixed-point resolution, in parts of the covering scale, of the errors whose squares are summed to choose a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineCodec(LayeredCodec):
    """Codes of 2 to 8 bits that stand for `(code - zero) * scale`."""

    kind: ClassVar[str] = "affine"

    key_bits: tuple[int, ...] = (8,)
    """Bits of a key's code by layer, or one number for all layers."""
    value_bits: tuple[int, ...] = (8,)
    """Bits of a value's code, likewise."""
    key_group: int = 72
    """Tokens that share a channel's scale and offset."""
    value_group: int = 32
    """Channels that share a token's scale and offset: a divisor of the channels, or all if there are fewer."""
    spread: bool = True
    """More bits for key channels of large weight, fewer for small ones; only where 64 divides the channels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_bits", tuple(self.key_bits))
        object.__setattr__(self, "value_bits", tuple(self.value_bits))
        for bits in (self.key_bits, self.value_bits):
            if not bits or not all(type(each) is int and 2 <= each <= 8 for each in bits):
                raise ValueError(f"a code has 2 to 8 bits, got {bits}.")
        if self.key_group < 1 or self.value_group < 1:
            raise ValueError(f"groups have a member or more, got {self.key_group} and {self.value_group}.")

    def to_json(self) -> dict[str, Any]:
        bits = {"key_bits": list(self.key_bits), "value_bits": list(self.value_bits)}
        return {"kind": self.kind, **asdict(self), **bits}

    @classmethod
    def from_json(cls, document: dict[str, Any], where: str) -> Self:
        keys = cls().to_json().keys()
        if document.keys() != keys:
            raise FormatError(f"{where}: an affine codec has exactly the keys {', '.join(sorted(keys))}.")
        for key in ("key_group", "value_group"):
            take(document, key, int, where)
        take(document, "spread", bool, where)
        try:
            return cls(**{key: document[key] for key in keys - {"kind"}})
        except (TypeError, ValueError) as error:
            raise FormatError(f"{where}: {error}") from error

    @property
    def channel_group(self) -> int:
        return self.value_group

    def bits_of(self, layer: int) -> tuple[int, int]:
        key, value = (bits[layer if len(bits) > 1 else 0] for bits in (self.key_bits, self.value_bits))
        return key, value

    def of_layers(self, layers: Sequence[int]) -> Self:
        keys, values = (
            bits if len(bits) == 1 else tuple(bits[layer] for layer in layers)
            for bits in (self.key_bits, self.value_bits)
        )
        return replace(self, key_bits=keys, value_bits=values)

    def check_layers(self, layers: int) -> None:
        for bits in (self.key_bits, self.value_bits):
            if len(bits) not in (1, layers):
                raise ValueError(f"the codec has bits for {len(bits)} layers, the sample has {layers}.")

    def key_classes(self, bits: int, channels: int) -> list[tuple[int, int]]:
        """(channels, bits of a code) of each class of key channels, in stored order."""
        if not self.spread or channels % 64:
            return [(channels, bits)]
        return [(channels // share, bits + more) for share, more in SPREAD]

    def value_group_of(self, channels: int) -> int:
        """Channels of values in a group, for so many channels in all."""
        return min(self.value_group, channels)

    def segments(self, part: Part, layer: int, shape: tuple[int, ...]) -> list[Segment]:
        heads, tokens, channels = shape
        key_bits, value_bits = self.bits_of(layer)
        if part == "key":
            classes, zero = self.key_classes(key_bits, channels), "int16"
            groups = (heads, -(-tokens // self.key_group), channels)
        else:
            classes, zero = [(channels, value_bits)], "uint8"
            groups = (heads, tokens, channels // self.value_group_of(channels))
        return place_segments(
            ("base", "int8", (1,)),
            *([("order", "uint8", (heads, channels))] if len(classes) > 1 else []),
            ("scale", "uint8", groups),
            ("zero", zero, groups),
            *(
                (f"codes.{index}.{plane}", "uint8", (heads, tokens, count * plane // 8))
                for index, (count, width) in enumerate(classes)
                for plane in planes(width)
            ),
        )

    def _encode_part(self, part: Part, layer: int, x: Floats, out: SegmentedBytes) -> None:
        if part == "key":
            self._encode_keys(self.key_classes(self.bits_of(layer)[0], x.shape[2]), x, out)
        else:
            self._encode_values(self.bits_of(layer)[1], x, out)

    def _encode_keys(self, classes: list[tuple[int, int]], x: Floats, out: SegmentedBytes) -> None:
        starts = np.arange(0, x.shape[1], self.key_group)
        low: Floats = np.minimum.reduceat(x, starts, axis=1)
        high: Floats = np.maximum.reduceat(x, starts, axis=1)
        if len(classes) > 1:
            order = np.argsort(-_weights(x, high - low), axis=1, kind="stable")
            out.put("order", order.astype(np.uint8))
            x, low, high = (np.take_along_axis(array, order[:, None], 2) for array in (x, low, high))
        levels = np.concatenate([np.full(count, 2**width - 1, np.float32) for count, width in classes])
        largest: Floats = np.maximum(np.abs(low), np.abs(high))
        padding = -x.shape[1] % self.key_group
        padded = np.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(x.shape[0], -1, self.key_group, x.shape[2])
        members = (np.arange(x.shape[1] + padding) < x.shape[1]).reshape(-1, self.key_group, 1)
        least = largest / np.float32(MAX_ZERO)
        codes = _fit(out, padded, 2, (low, high), levels, members, least, zeros=(-32767, 32767))
        _put_codes(out, classes, codes.reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]])

    def _encode_values(self, bits: int, x: Floats, out: SegmentedBytes) -> None:
        levels = np.float32(2**bits - 1)
        grouped = x.reshape(*x.shape[:2], -1, self.value_group_of(x.shape[2]))
        low = np.minimum(grouped.min(-1), np.float32(0))
        high = np.maximum(grouped.max(-1), np.float32(0))
        codes = _fit(out, grouped, 3, (low, high), levels, np.True_, np.float32(0), zeros=(0.0, float(levels)))
        _put_codes(out, [(x.shape[2], bits)], codes.reshape(x.shape))

    def _decode_part(self, part: Part, layer: int, data: SegmentedBytes, shape: tuple[int, ...]) -> Floats:
        key_bits, value_bits = self.bits_of(layer)
        scale, zero = data.get_scales(), data.get("zero").astype(np.float32)
        if part == "value":
            codes = _get_codes(data, [(shape[2], value_bits)])
            grouped = codes.reshape(*shape[:2], -1, self.value_group_of(shape[2]))
            values: Floats = (grouped - zero[..., None]) * scale[..., None]
            return values.reshape(shape)
        classes, groups = self.key_classes(key_bits, shape[2]), np.arange(shape[1]) // self.key_group
        x = (_get_codes(data, classes) - zero[:, groups]) * scale[:, groups]
        if len(classes) == 1:
            return x
        order = data.get("order").astype(np.int64)
        if (np.sort(order, axis=1) != np.arange(shape[2])).any():
            raise ValueError("the order of key channels is not a permutation.")
        unsorted = np.empty_like(x)
        np.put_along_axis(unsorted, np.broadcast_to(order[:, None], x.shape), x, 2)
        return unsorted


def planes(width: int) -> list[int]:
    """Widths of the bit planes that a code is split into, lowest bits first: 5 bits are 4 and 1."""
    return [plane for plane in (8, 4, 2, 1) if width & plane]


def _weights(x: Floats, spans: Floats) -> NDArray[np.float64]:
    """Weights of a key channel's errors: its spans squared, as its errors would be, times its queries' energy.

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
    out: SegmentedBytes,
    x: Floats,
    axis: int,
    extremes: tuple[Floats, Floats],
    levels: Floats | np.float32,
    members: NDArray[np.bool_] | np.bool_,
    least: Floats | np.float32,
    zeros: tuple[float, float],
) -> Floats:
    """Store base, scales of least squared error and zeros of all groups; return the codes.

    Groups lie along `axis` of `x`, as far as `members` holds. Codes go up to `levels`; `least` is the smallest scale,
    `zeros` are the smallest and the largest zero.
    """
    low, high = extremes
    table, first = out.put_base(np.maximum((high - low) / levels, least))
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
    out.put("scale", best[1].astype(np.uint8))
    out.put("zero", best[2])
    return best[3]


def _put_codes(out: SegmentedBytes, classes: list[tuple[int, int]], codes: Floats) -> None:
    first = 0
    for index, (count, width) in enumerate(classes):
        rest: NDArray[Any] = codes[..., first : first + count].astype(np.uint16)
        first += count
        for plane in planes(width):
            parts = (rest & (2**plane - 1)).astype(np.uint8).reshape(*rest.shape[:-1], -1, 8 // plane)
            packed = parts[..., 0].copy()
            for i in range(1, 8 // plane):
                packed |= parts[..., i] << np.uint8(i * plane)
            out.put(f"codes.{index}.{plane}", packed)
            rest = rest >> np.uint16(plane)


def _get_codes(data: SegmentedBytes, classes: list[tuple[int, int]]) -> Floats:
    codes: list[Floats] = []
    for index, (_, width) in enumerate(classes):
        done, shifted = 0, []
        for plane in planes(width):
            packed = data.get(f"codes.{index}.{plane}")
            parts = [(packed >> np.uint8(i * plane)) & np.uint8(2**plane - 1) for i in range(8 // plane)]
            values = np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.uint16)
            shifted.append(values << np.uint16(done))
            done += plane
        codes.append(np.bitwise_or.reduce(shifted).astype(np.float32))
    return np.concatenate(codes, -1)
