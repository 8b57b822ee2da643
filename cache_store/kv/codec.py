"""Quantising codecs for KV caches: which bits mean what. The page of the format gives the same in words.

The encoded form of keys and values `[layer, 2, head, token, channel]` is one run of bytes, layer after layer, of each
layer keys then values, so that layers can be read, sent and decoded one at a time. Everything but the layers' lengths
follows from codec and shape. What drives the design: attention passes errors of keys on about twice as large as those
of values, and most through the channels of
largest magnitude, where queries are large too; so keys get their levels by channel, and values by token.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cache_store.document import take
from cache_store.errors import FormatError

CodecName = Literal["bf16", "fp8", "int8", "int5", "int4"]


Kind = Literal["affine", "fp8"]

SPREAD = ((8, 2), (8, 1), (2, 0), (4, -1))
"""Classes of key channels by falling weight: 1 in 8 has 2 bits more, 1 in 8 one more, 1 in 2 none, 1 in 4 one less."""
_KEYS = {"kind", "key_bits", "value_bits", "key_group", "value_group", "spread"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One array in a layer's bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the layer's keys or values."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCodec:
    """How keys and values become bytes."""

    kind: Kind = "affine"
    key_bits: tuple[int, ...] = (8,)
    """Bits of a key's code by layer, or one number for all; `fp8` has always 8."""
    value_bits: tuple[int, ...] = (8,)
    key_group: int = 72
    """Tokens that share a channel's scale and offset (`affine`)."""
    value_group: int = 32
    """Channels that share a token's scale and offset (`affine`): a divisor of them, or all if there are fewer."""
    spread: bool = True
    """More bits for key channels of large weight, fewer for small ones; only where 64 divides the channels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_bits", tuple(self.key_bits))
        object.__setattr__(self, "value_bits", tuple(self.value_bits))
        bits = (*self.key_bits, *self.value_bits)
        if self.kind not in ("affine", "fp8") or not (self.key_bits and self.value_bits):
            raise ValueError(f"a codec is affine or fp8 with bits for keys and values, got {self}.")
        if not all(type(b) is int and 2 <= b <= 8 for b in bits) or (self.kind == "fp8" and set(bits) != {8}):
            raise ValueError(f"a code has 2 to 8 bits, 8 for fp8, got {bits}.")
        if self.key_group < 1 or self.value_group < 1:
            raise ValueError(f"groups have a member or more, got {self.key_group} and {self.value_group}.")

    def bits_of(self, layer: int) -> tuple[int, int]:
        """Bits of this layer's keys and values."""
        if len(self.key_bits) == 1 and len(self.value_bits) == 1:
            return self.key_bits[0], self.value_bits[0]
        return (
            self.key_bits[layer if len(self.key_bits) > 1 else 0],
            self.value_bits[layer if len(self.value_bits) > 1 else 0],
        )

    def key_classes(self, bits: int, channels: int) -> list[tuple[int, int]]:
        """(channels, bits of a code) of each class of key channels, in stored order."""
        if not self.spread or channels % 64:
            return [(channels, bits)]
        return [(channels // share, bits + more) for share, more in SPREAD]

    def segments(self, what: Literal["key", "value"], layer: int, shape: tuple[int, ...]) -> list[Segment]:
        """Where everything lies in a layer's keys or values, for heads, tokens and channels `shape`."""
        heads, tokens, channels = shape
        bits = self.bits_of(layer)[what == "value"]
        found: list[Segment] = []

        def add(name: str, dtype: str, *lengths: int) -> None:
            end = found[-1].offset + found[-1].size_bytes if found else 0
            found.append(Segment(name=name, dtype=dtype, shape=lengths, offset=end))

        add("base", "int8", 1)
        if self.kind == "fp8":
            add("scale", "uint8", heads, tokens, 1)
            add("codes", "uint8", heads, tokens, channels)
            return found
        if what == "key":
            groups = math.ceil(tokens / self.key_group)
            classes = self.key_classes(bits, channels)
            if len(classes) > 1:
                add("order", "uint8", heads, channels)
            add("scale", "uint8", heads, groups, channels)
            add("zero", "int16", heads, groups, channels)
        else:
            groups = channels // self.value_group_of(channels)
            classes = [(channels, bits)]
            add("scale", "uint8", heads, tokens, groups)
            add("zero", "uint8", heads, tokens, groups)
        for index, (count, width) in enumerate(classes):
            for plane in planes(width):
                add(f"codes.{index}.{plane}", "uint8", heads, tokens, count * plane // 8)
        return found

    def value_group_of(self, channels: int) -> int:
        """Channels a group of values."""
        return min(self.value_group, channels)

    def layer_bytes(self, layer: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of a layer's keys and of its values, for a sample of `[layer, 2, head, token, channel]`."""
        layers, two, heads, tokens, channels = shape
        per_layer = max(len(self.key_bits), len(self.value_bits))
        if two != 2 or channels % 8 or channels > 256 or channels % self.value_group_of(channels) or not tokens:
            raise ValueError(
                f"keys and values are [layer, 2, head, token, channel] with a token and a multiple of 8 and of "
                f"{self.value_group} channels up to 256, got {list(shape)}."
            )
        if per_layer > 1 and any(len(bits) not in (1, layers) for bits in (self.key_bits, self.value_bits)):
            raise ValueError(f"the codec has bits for {per_layer} layers, the sample has {layers}.")
        sizes = []
        for what in ("key", "value"):
            last = self.segments(what, layer, (heads, tokens, channels))[-1]
            sizes.append(last.offset + last.size_bytes)
        return sizes[0], sizes[1]

    def encoded_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a whole encoded sample."""
        return sum(sum(self.layer_bytes(layer, shape)) for layer in range(shape[0]))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "key_bits": list(self.key_bits),
            "value_bits": list(self.value_bits),
            "key_group": self.key_group,
            "value_group": self.value_group,
            "spread": self.spread,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], where: str) -> "KVCodec":
        """From an untrusted document, such as a store's identity."""
        if not isinstance(document, dict) or document.keys() != _KEYS:
            raise FormatError(f"{where}: a codec has exactly the keys {', '.join(sorted(_KEYS))}.")
        for key in ("key_group", "value_group"):
            take(document, key, int, where)
        take(document, "spread", bool, where)
        try:
            return cls(
                **{**document, "key_bits": tuple(document["key_bits"]), "value_bits": tuple(document["value_bits"])}
            )
        except (TypeError, ValueError) as error:
            raise FormatError(f"{where}: {error}") from error


def planes(width: int) -> list[int]:
    """Widths of the bit planes that a code is split into, lowest bits first: 5 bits are 4 and 1."""
    return [plane for plane in (8, 4, 2, 1) if width & plane]


CODECS = {
    "int8": KVCodec(),
    "int5": KVCodec(key_bits=(5,), value_bits=(5,)),
    "int4": KVCodec(key_bits=(4,), value_bits=(4,)),
    "fp8": KVCodec(kind="fp8"),
}
"""The named settings: just below 8.5, 5.5 and 4.5 bits a value, and fp8 with 8 bits and a byte a token.

With keys in groups of 64 instead of 72 `order` and `base` would come on top of that.
"""

MANTISSAS = np.array([2.0 ** (i / 16) for i in range(16)]).astype(np.float32)
"""The sixteen steps of an octave of scales, rounded to float32; the page lists them in hexadecimal."""
MAX_VALUE = 2.0**125
"""Larger magnitudes are refused: their differences could overflow."""
WEIGHT_STEPS = 4096.0
"""Fixed-point resolution in which the weights of key channels are summed, so that every library sums to the same."""
MAX_ZERO = 32000
"""Bound of a key group's offset in steps: a wide scale is taken where an offset would not fit its 16 bits."""
TRIED = (0, -1, 1, 2)
"""Scales that an encoder tries for a group, in steps of the table from the first that covers the group."""
ERROR_STEPS = 64.0
"""Fixed-point resolution, in parts of the covering scale, of the errors whose squares are summed to choose a scale."""


def scale_table(base: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The 256 scales of a layer's keys or values, rising: `MANTISSAS[i % 16] * 2^(i // 16 + base)`, all exact."""
    steps = np.arange(256)
    return np.ldexp(MANTISSAS[steps % 16], (steps // 16 + base).astype(np.int32)).astype(np.float32)


def base_for(largest: float) -> int:
    """The base whose table just reaches the largest needed scale."""
    return max(-100, min(112, math.frexp(largest)[1] - 15)) if largest > 0 else 0


def fp8_values() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The 127 non-negative finite values of OCP FP8 E4M3, by code: 0, 2^-9, ... 448."""
    code = np.arange(127)
    exponent, fraction = code >> 3, code & 7
    return np.where(
        exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
    ).astype(np.float32)
