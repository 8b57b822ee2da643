"""Optional lossless compression of chunks: blosc with zstd and a byte shuffle, which is a codec of Zarr's own.

The values of a KV cache compress to about two thirds; decoding costs a core more than most disks can deliver, so it
is for remote or nearly full media. The chunk's CRC-32C follows the compressed bytes and covers them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.format.field import Field

Buffer = NDArray[np.uint8] | bytes

MAX_OVERHEAD_BYTES = 16
"""Size of blosc's header before what does not compress."""
_MAX_BYTES = 2**31 - 1 - MAX_OVERHEAD_BYTES
_BLOCK_BYTES = 2**20
"""Block size; zstd finds little in small blocks."""


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
    """Buffers of a chunk as they are stored."""
    if field.compression == "none":
        return parts
    from numcodecs.blosc import SHUFFLE, Blosc  # uncompressed fields need no numcodecs

    raw = np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"field {field.name!r}: a compressed chunk has at most {_MAX_BYTES} bytes, got {len(raw)}.")
    coder = Blosc(cname="zstd", clevel=1, shuffle=SHUFFLE, blocksize=_BLOCK_BYTES)
    return (bytes(coder.encode(raw.view(f"u{field.stored_dtype.itemsize}"))),)


def decode_into(target: NDArray[np.uint8], frame: NDArray[np.uint8], raw_bytes: int) -> None:
    """Fill `target` with the beginning of what a chunk of `raw_bytes` was compressed to.

    Raises `ValueError`, before anything is decoded, unless the frame's header claims this size and to be whole, and
    `RuntimeError` for a frame that does not decode.
    """
    claimed = np.frombuffer(frame[4:16].tobytes(), "<u4").tolist()
    if len(claimed) != 3 or claimed[0] != raw_bytes or claimed[2] != len(frame):
        raise ValueError(
            f"a compressed chunk claims (raw, block, stored) sizes {claimed}, expected {raw_bytes} raw and "
            f"{len(frame)} stored bytes"
        )
    from numcodecs.blosc import Blosc

    if len(target) == raw_bytes:
        Blosc().decode(frame, target)
    else:  # the last chunk of an array, which ends in padding
        target[:] = np.frombuffer(Blosc().decode(frame), np.uint8)[: len(target)]
