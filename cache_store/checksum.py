"""CRC-32C of buffers, without holding Python's interpreter lock where that is possible.

google_crc32c computes under the lock, so reading threads would check one at a time and hold up the thread that
trains. Its extension links the C library, whose function is called here directly; ctypes lets go of the lock.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_CHECK_VALUE = 0xE3069283
"""CRC-32C of `123456789`, by which an implementation is known."""


def _direct() -> Callable[[int, Any, int], int] | None:
    try:
        from google_crc32c import _crc32c

        function = ctypes.CDLL(_crc32c.__file__).crc32c_extend
    except (ImportError, OSError, AttributeError):  # the pure Python build, or one that hides its symbols
        return None
    function.restype = ctypes.c_uint32
    function.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    return function if function(0, b"123456789", 9) == _CHECK_VALUE else None


_extend_at = _direct()


def extend(crc: int, block: NDArray[np.uint8]) -> int:
    """The checksum of what `crc` covers followed by a contiguous block."""
    return extender(block)(crc, 0, block.size)


def extender(buffer: NDArray[np.uint8]) -> Callable[[int, int, int], int]:
    """`(crc, start, end) -> crc` over ranges of one contiguous buffer, whose address is looked up once."""
    if _extend_at is None:
        return lambda crc, start, end: int(google_crc32c.extend(crc, buffer[start:end]))
    function, address = _extend_at, buffer.ctypes.data
    return lambda crc, start, end: function(crc, address + start, end - start)
