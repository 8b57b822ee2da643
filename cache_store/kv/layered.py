"""Codecs that store layer after layer, of each its keys and then its values, in pieces whose places follow from shapes.

So layers can be read, sent and decoded one at a time, and a kernel finds its bytes by arithmetic alone. Reference code
uses only operations that IEEE 754 defines to the bit, in float32 and in a fixed order: difference, division, product,
maximum, rounding half to even. Sums, whose order differs between libraries, are of integers only.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from cache_store.kv.codec import KVCodec

Part = Literal["key", "value"]
PARTS: tuple[Part, Part] = ("key", "value")
Floats = NDArray[np.float32]

NOT_FINITE = "keys or values have NaN, infinity or a magnitude of 2^125, which cannot be quantised."
MAX_VALUE = 2.0**125
"""Larger magnitudes are refused: their differences could overflow."""
MANTISSAS = np.array([2.0 ** (i / 16) for i in range(16)]).astype(np.float32)
"""Sixteen steps of an octave of scales, rounded to float32; the page of the format lists them in hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One array among the bytes of a layer's keys or values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the layer's keys or values."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class LayeredCodec(KVCodec):
    """A codec whose keys and values of a layer are a list of segments each."""

    @property
    @abstractmethod
    def channel_group(self) -> int:
        """Channels are a multiple of it, or fewer."""

    @abstractmethod
    def bits_of(self, layer: int) -> tuple[int, int]:
        """Bits of a code of this layer's keys and values; layers that agree in them have the same segments."""

    @abstractmethod
    def segments(self, part: Part, layer: int, shape: tuple[int, ...]) -> list[Segment]:
        """Lay out a layer's keys or values, for heads, tokens and channels `shape`."""

    @abstractmethod
    def _encode_part(self, part: Part, layer: int, x: Floats, out: "SegmentedBytes") -> None:
        """Fill in all segments of `x`, `[head, token, channel]`."""

    @abstractmethod
    def _decode_part(self, part: Part, layer: int, data: "SegmentedBytes", shape: tuple[int, ...]) -> Floats:
        """`[head, token, channel]`, not yet rounded to bfloat16."""

    def layer_bytes(self, layer: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of a layer's keys and of its values, in a sample of this shape."""
        two, _, tokens, channels = shape[1:]
        if two != 2 or channels % 8 or channels > 256 or channels % min(self.channel_group, channels) or not tokens:
            wanted = f"a token and a multiple of 8 and of {self.channel_group} channels up to 256"
            raise ValueError(f"keys and values are [layer, 2, head, token, channel] with {wanted}, got {list(shape)}.")
        keys, values = (self.segments(part, layer, shape[2:])[-1] for part in PARTS)
        return keys.offset + keys.size_bytes, values.offset + values.size_bytes

    @lru_cache(maxsize=4096)  # noqa: B019  # codecs are small values that compare by their settings
    def layer_starts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Start of each layer's bytes in a sample of this shape, then the end of the last one's."""
        self.check_layers(shape[0])
        return (0, *accumulate(sum(self.layer_bytes(layer, shape)) for layer in range(shape[0])))

    def check_layers(self, layers: int) -> None:
        """Raise `ValueError` for a number of layers that the codec is not for."""
        return

    def of_layers(self, layers: Sequence[int]) -> Self:
        """The codec of samples that hold only these of the layers that this one is for, with the same bytes of each."""
        del layers
        return self

    def encoded_bytes(self, shape: tuple[int, ...]) -> int:
        return self.layer_starts(shape)[-1]

    def parts(self, layer: int, shape: tuple[int, ...]) -> list[tuple[Part, slice, list[Segment]]]:
        """A layer's keys and its values: which of the layer's bytes they are, and what lies in these."""
        keys, values = (self.segments(part, layer, shape[2:]) for part in PARTS)
        middle, end = accumulate(self.layer_bytes(layer, shape))
        return [("key", slice(0, middle), keys), ("value", slice(middle, end), values)]

    def encode(self, bits: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """Encoded bytes of bfloat16 bits; `ValueError` unless all are finite and below 2^125."""
        values = from_bfloat16(bits)
        if not (np.abs(values) < MAX_VALUE).all():
            raise ValueError(NOT_FINITE)
        data = np.empty(self.encoded_bytes(bits.shape), np.uint8)
        for layer, begin in enumerate(self.layer_starts(bits.shape)[:-1]):
            for index, (part, where, segments) in enumerate(self.parts(layer, bits.shape)):
                self._encode_part(part, layer, values[layer, index], SegmentedBytes(segments, data[begin:][where]))
        return data

    def decode(self, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint16]:
        self.check_size(data.shape, shape)
        values = np.empty(shape, np.float32)
        for layer, begin in enumerate(self.layer_starts(shape)[:-1]):
            for index, (part, where, segments) in enumerate(self.parts(layer, shape)):
                segmented = SegmentedBytes(segments, data[begin:][where])
                values[layer, index] = self._decode_part(part, layer, segmented, shape[2:])
        return to_bfloat16(values)


class SegmentedBytes:
    """The bytes of a layer's keys or values, read and written by segment."""

    def __init__(self, segments: list[Segment], data: NDArray[np.uint8]) -> None:
        self._segments, self._data = {segment.name: segment for segment in segments}, data

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Store an array as its segment."""
        segment = self._segments[name]
        assert array.shape == segment.shape, name
        raw = np.ascontiguousarray(array, np.dtype(segment.dtype).newbyteorder("<")).reshape(-1).view(np.uint8)
        self._data[segment.offset : segment.offset + segment.size_bytes] = raw

    def get(self, name: str) -> NDArray[Any]:
        """A copy of a segment's array."""
        segment = self._segments[name]
        raw = self._data[segment.offset : segment.offset + segment.size_bytes].copy()
        return raw.view(np.dtype(segment.dtype).newbyteorder("<")).reshape(segment.shape)

    def put_base(self, needed: Floats) -> tuple[Floats, NDArray[np.intp]]:
        """Store the base; return its table and the indices of the smallest scales that are as large as needed."""
        base = base_for(float(needed.max()))
        table = scale_table(base)
        self.put("base", np.array([base], np.int8))
        return table, np.minimum(np.searchsorted(table, needed, side="left"), 255)

    def get_scales(self) -> Floats:
        """The scales that the segments `base` and `scale` stand for."""
        scales: Floats = scale_table(int(self.get("base")[0]))[self.get("scale")]
        return scales


def place_segments(*arrays: tuple[str, str, tuple[int, ...]]) -> list[Segment]:
    """Segments without gaps from (name, dtype, shape) of each."""
    segments: list[Segment] = []
    end = 0
    for name, dtype, shape in arrays:
        segments.append(Segment(name=name, dtype=dtype, shape=shape, offset=end))
        end += segments[-1].size_bytes
    return segments


def scale_table(base: int) -> Floats:
    """The 256 scales of a layer's keys or values, rising: `MANTISSAS[i % 16] * 2^(i // 16 + base)`, all exact."""
    steps = np.arange(256)
    return np.ldexp(MANTISSAS[steps % 16], (steps // 16 + base).astype(np.int32)).astype(np.float32)


def base_for(largest: float) -> int:
    """The base whose table just reaches the largest needed scale."""
    return max(-100, min(112, math.frexp(largest)[1] - 15)) if largest > 0 else 0


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    """The float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    raw = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded
