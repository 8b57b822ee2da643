"""Names, shapes and places of a safetensors file's tensors, read without its data."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpacache.errors import CheckpointError

_HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lives, from its shard's header."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte in the shard file."""
    nbytes: int


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Header of a safetensors file: name -> dtype, shape, offset, nbytes; every offset is checked against the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{path} is not a safetensors file, or it is truncated; fetch it again.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged header ({error}); fetch it again.") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= size - 8 - length:
            raise CheckpointError(
                f"{path} is truncated: {name} ends at byte {8 + length + end} of {size}; fetch it again."
            )
        tensors[name] = {
            "dtype": str(entry["dtype"]),
            "shape": tuple(entry["shape"]),
            "offset": 8 + length + begin,
            "nbytes": end - begin,
        }
    return tensors
