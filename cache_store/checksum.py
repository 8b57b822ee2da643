"""CRC-32C of buffers at the speed of memory, without holding Python's interpreter lock.

google_crc32c, which Zarr uses, computes under the lock and reads what has left the second-level cache at a quarter of
the speed; awscrt does neither (docs/decisions/0002-dependencies.md).
"""

from collections.abc import Callable

import numpy as np
from awscrt import checksums
from numpy.typing import NDArray


def value(data: bytes | NDArray[np.uint8]) -> int:
    """The checksum of a whole."""
    return int(checksums.crc32c(memoryview(data)))  # type: ignore[arg-type]


def extend(crc: int, block: NDArray[np.uint8]) -> int:
    """The checksum of what `crc` covers followed by a contiguous block."""
    return extender(block)(crc, 0, block.size)


def extender(buffer: NDArray[np.uint8]) -> Callable[[int, int, int], int]:
    """`(crc, start, end) -> crc` over ranges of one contiguous buffer."""
    view = memoryview(buffer)  # type: ignore[arg-type]
    return lambda crc, start, end: int(checksums.crc32c(view[start:end], crc))
