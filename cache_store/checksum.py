"""CRC-32C of buffers at the speed of memory, without holding Python's interpreter lock.

google_crc32c, which Zarr uses, computes under the lock and reads what has left the second-level cache at a quarter of
the speed; awscrt does neither (docs/decisions/0002-dependencies.md).
"""

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78
"""Castagnoli's polynomial without x^32, reflected: bit 31 is the coefficient of x^0."""


def crc32c(data: bytes | memoryview | NDArray[np.uint8], crc: int = 0) -> int:
    """Checksum of contiguous bytes, or of what `crc` covers followed by them."""
    from awscrt import checksums  # its shared library takes as long to load as the rest of this package

    return checksums.crc32c(memoryview(data), crc)  # type: ignore[no-any-return,arg-type]


def without_zeros(crc: int, count: int) -> int:
    """Checksum of the same bytes without `count` zero bytes at their end, undone byte by byte."""
    state = crc ^ 0xFFFFFFFF
    for _ in range(count):
        for _ in range(8):
            # A forward step shifts right and, after a set bit, adds the polynomial; its own top bit then shows that.
            state = ((state ^ POLYNOMIAL) << 1 | 1) if state >> 31 else state << 1
    return state ^ 0xFFFFFFFF
