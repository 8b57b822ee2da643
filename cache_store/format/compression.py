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
_BLOSC: dict[str, Any] = {"blocksize": 2**20, "clevel": 1, "cname": "zstd"}
"""Settings of the compressor; zstd finds little in smaller blocks."""


def codecs(field: Field) -> list[dict[str, Any]]:
    """The compressor as Zarr v3 metadata: nothing, or one codec between `bytes` and `crc32c`."""
    if field.compression == "none":
        return []
    configuration = {**_BLOSC, "shuffle": "shuffle", "typesize": field.stored_dtype.itemsize}
    return [{"configuration": configuration, "name": "blosc"}]


def encode(field: Field, parts: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
    """Buffers of a chunk as they are stored."""
    if field.compression == "none":
        return parts
    from numcodecs.blosc import SHUFFLE, Blosc  # uncompressed fields need no numcodecs

    raw = np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"field {field.name!r}: a compressed chunk has at most {_MAX_BYTES} bytes, got {len(raw)}.")
    return (bytes(Blosc(**_BLOSC, shuffle=SHUFFLE).encode(raw.view(f"u{field.stored_dtype.itemsize}"))),)


def decode_into(target: NDArray[np.uint8], frame: NDArray[np.uint8], raw_bytes: int) -> None:
    """Fill `target` with the beginning of what a chunk of `raw_bytes` was compressed to.

    Raises `ValueError`, before anything is decoded, unless the frame's header claims this size and to be whole, and
    `RuntimeError` for a frame that does not decode.
    """
    claimed = np.frombuffer(frame[4:16].tobytes(), "<u4").tolist()
    if len(claimed) != 3 or claimed[0] != raw_bytes or claimed[2] != len(frame):
        expected = f"{raw_bytes} raw and {len(frame)} stored bytes"
        raise ValueError(f"a compressed chunk claims (raw, block, stored) sizes {claimed}, expected {expected}")
    from numcodecs.blosc import Blosc

    if len(target) == raw_bytes:
        Blosc().decode(frame, target)
    else:  # the last chunk of an array, which ends in padding
        target[:] = np.frombuffer(Blosc().decode(frame), np.uint8)[: len(target)]
