"""Names, shapes and places of a safetensors file's tensors, read without its data."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from alpacache.alpamayo.foreign_json import Schema, conform, parse_json
from alpacache.errors import CheckpointError

_HEADER_LIMIT = 100 * 2**20
_METADATA = "__metadata__"
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16},
    **{"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
"""Bits of one element, by the format's name of the dtype."""
_Size = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor's entry in its shard's header."""

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
    return check_header(header, path, data_start=8 + length, data_bytes=size - 8 - length)


def check_header(
    header: Mapping[str, object], where: Path | str, *, data_start: int = 0, data_bytes: int | None = None
) -> dict[str, TensorInfo]:
    """The tensors that a parsed header declares.

    Args:
        where: the file, as errors name it; its last part is the shard's name.
        data_start: first byte of the data in the file.
        data_bytes: what follows the header; None where the file is not at hand.
    """
    conform(dict[str, str], header.get(_METADATA, {}), f"{where}: {_METADATA}")
    entries = conform(dict[str, _Entry], {name: header[name] for name in header.keys() - {_METADATA}}, where)
    tensors, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end_before = entry.data_offsets[0], end
        end = entry.data_offsets[1]
        bits = math.prod(entry.shape) * _BITS.get(entry.dtype, 0)
        if entry.dtype not in _BITS:
            raise CheckpointError(
                f"{where}: {name!r} has the unknown dtype {entry.dtype!r}; expected {', '.join(_BITS)}."
            )
        if begin != end_before or bits != 8 * (end - begin):
            raise CheckpointError(
                f"{where} has a damaged header: {name!r} is {entry.dtype} {entry.shape} at bytes {begin} to {end}, "
                f"after a tensor that ends at {end_before}; fetch it again."
            )
        if data_bytes is not None and end > data_bytes:
            raise CheckpointError(
                f"{where} is truncated: {name!r} ends at byte {data_start + end} of {data_start + data_bytes}; fetch "
                "it again."
            )
        tensors[name] = TensorInfo(
            shard=Path(where).name,
            dtype=entry.dtype,
            shape=tuple(entry.shape),
            offset=data_start + begin,
            nbytes=end - begin,
        )
    if data_bytes is not None and end < data_bytes:
        raise CheckpointError(
            f"{where} has a damaged header: its tensors end at byte {data_start + end} of {data_start + data_bytes}; "
            "fetch it again."
        )
    return tensors
