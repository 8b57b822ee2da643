"""Names, shapes and places of a safetensors file's tensors, read without its data."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from alpacache.alpamayo.foreign_json import Schema, conform, parse_json
from alpacache.errors import CheckpointError

_HEADER_LIMIT = 100 * 2**20
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16},
    **{"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
"""Bits of one element, by the format's name of the dtype."""
_Size = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lives, from its shard's header."""

    shard: str
    """Name of the file."""
    dtype: str
    """The format's name, such as `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the shard file."""
    nbytes: int


class _Entry(Schema):
    dtype: str
    shape: Annotated[list[_Size], Field(max_length=64)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name.

    Raises `CheckpointError` unless every entry fits its shape and dtype, and all of them fill the file's data without
    overlap or gap, as the format demands.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{path} is not a safetensors file, or it is truncated; fetch it again.")
        header = parse_json(file.read(length), f"the header of {path}")
    return check_header(header, path, shard=path.name, data_start=8 + length, size=size)
