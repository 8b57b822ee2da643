"""Optional lossless compression of chunks: blosc with zstd and a byte shuffle, in Zarr's own codec.

The values of a KV cache compress to about two thirds; decoding costs a core more than most disks can deliver, so it
is for remote or nearly full media. The chunk's CRC-32C comes after it and covers the compressed bytes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.errors import CorruptSampleError
from cache_store.format.field import Field

Buffer = NDArray[np.uint8] | bytes

MAX_OVERHEAD_BYTES = 16
"""Blosc stores what does not compress with a header of this size."""
_MAX_BYTES = 2**31 - 1 - MAX_OVERHEAD_BYTES
_BLOCK_BYTES = 2**20
"""Large, because zstd finds little in small blocks."""


def codecs(field: Field) -> list[dict[str, Any]]:
    """The compressor as Zarr v3 metadata: nothing, or one codec between `bytes` and `crc32c`."""
    if field.compression == "none":
        return []
    configuration = {
        "blocksize": _BLOCK_BYTES,
        "clevel": 1,
        "cname": "zstd",
        "shuffle": "shuffle",
        "typesize": field.stored_dtype.itemsize,
    }
    return [{"configuration": configuration, "name": "blosc"}]


def encode(field: Field, parts: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
    """The buffers of a chunk as they are stored."""
    if field.compression == "none":
        return parts
    from numcodecs.blosc import SHUFFLE, Blosc  # writing uncompressed fields needs no numcodecs

    raw = np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"field {field.name!r}: a compressed chunk has at most {_MAX_BYTES} bytes, got {len(raw)}.")
    coder = Blosc(cname="zstd", clevel=1, shuffle=SHUFFLE, blocksize=_BLOCK_BYTES)
    return (bytes(coder.encode(raw.view(f"u{field.stored_dtype.itemsize}"))),)


def check_header(data: NDArray[np.uint8], raw_bytes: int, sample_id: str, field: str) -> None:
    """Raise unless a compressed chunk with its trailer claims to be whole and to decode to `raw_bytes`."""
    claimed = np.frombuffer(data[4:16].tobytes(), "<u4").tolist()
    if len(claimed) != 3 or claimed[0] != raw_bytes or claimed[2] != len(data) - 4:
        raise CorruptSampleError(
            f"sample {sample_id!r}, field {field!r}: a compressed chunk claims (raw, block, stored) sizes {claimed}, "
            f"expected {raw_bytes} raw and {len(data) - 4} stored bytes.",
            sample_id,
            field,
        )
