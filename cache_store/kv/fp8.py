"""The codec `fp8`: OCP E4M3 codes and one scale a token, 8 bits and a byte a token."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from cache_store.errors import FormatError
from cache_store.kv.layered import Floats, LayeredCodec, Part, Segment, SegmentedBytes, place_segments

_DOCUMENT = {"kind": "fp8", "key_bits": [8], "value_bits": [8], "key_group": 72, "value_group": 32, "spread": True}
"""Bits, groups and spread mean nothing here; identities of stores have them, so they stay."""


@dataclass(frozen=True, slots=True)
class Fp8Codec(LayeredCodec):
    """Keys and values as E4M3, scaled so that a token's largest channel is 448 or a little less."""

    kind: ClassVar[str] = "fp8"

    def to_json(self) -> dict[str, Any]:
        return dict(_DOCUMENT)

    @classmethod
    def from_json(cls, document: dict[str, Any], where: str) -> Self:
        if document.keys() != _DOCUMENT.keys():
            raise FormatError(f"{where}: an fp8 codec has exactly the keys {', '.join(sorted(_DOCUMENT))}.")
        bits = [document["key_bits"], document["value_bits"]]
        if not all(isinstance(each, list) and each and set(map(repr, each)) == {"8"} for each in bits):
            raise FormatError(f"{where}: a code of fp8 has 8 bits, got {bits}.")
        return cls()

    @property
    def channel_group(self) -> int:
        return 32

    def bits_of(self, layer: int) -> tuple[int, int]:
        return 8, 8

    def segments(self, part: Part, layer: int, shape: tuple[int, ...]) -> list[Segment]:
        return place_segments(("base", "int8", (1,)), ("scale", "uint8", (*shape[:2], 1)), ("codes", "uint8", shape))

    def _encode_part(self, part: Part, layer: int, x: Floats, out: SegmentedBytes) -> None:
        table, first = out.put_base(np.abs(x).max(-1, keepdims=True) / np.float32(448))
        out.put("scale", first)
        scale = table[first]
        values = fp8_values()
        middles = (values[1:] + values[:-1]) / 2
        size = np.minimum(np.abs(x / scale), np.float32(448))
        code = np.searchsorted(middles, size, side="left")
        tie = size == middles[np.minimum(code, len(middles) - 1)]
        code += tie & (code % 2 == 1)
        out.put("codes", (code + 128 * np.signbit(x)).astype(np.uint8))

    def _decode_part(self, part: Part, layer: int, data: SegmentedBytes, shape: tuple[int, ...]) -> Floats:
        values = np.append(fp8_values(), np.float32(np.nan))
        x: Floats = np.concatenate([values, -values])[data.get("codes")] * data.get_scales()
        return x


def fp8_values() -> Floats:
    """The 127 non-negative finite values of OCP FP8 E4M3, by code: 0, 2^-9, ... 448."""
    code = np.arange(127)
    exponent, fraction = code >> 3, code & 7
    values: Floats = np.ldexp(np.where(exponent == 0, fraction, 8 + fraction), np.maximum(exponent, 1) - 10)
    return values.astype(np.float32)
