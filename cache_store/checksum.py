"""CRC-32C of buffers at the speed of memory, without holding Python's interpreter lock.

google_crc32c, which Zarr uses, computes under the lock and reads what has left the second-level cache at a quarter of
the speed; awscrt does neither (docs/decisions/0002-dependencies.md).
"""

from collections.abc import Callable

import numpy as np
from awscrt import checksums
from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78
"""P(x) of Castagnoli without x^32, reflected: bit 31 is the coefficient of x^0."""


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


def without_zeros(crc: int, count: int) -> int:
    """The checksum of what comes before `count` zero bytes at the end, given that of the whole; undone byte by byte."""
    state = crc ^ 0xFFFFFFFF
    for _ in range(count):
        for _ in range(8):
            # A step forward shifts right and, after a set bit, adds the polynomial, whose highest bit then tells of it.
            state = ((state ^ POLYNOMIAL) << 1 | 1) if state >> 31 else state << 1
    return state ^ 0xFFFFFFFF
