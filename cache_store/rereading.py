"""Second readings: what was not read rightly once may be whole, and the way to it at fault.

A line, a network card or a page cache flips a bit now and then, and a disk or a share that comes back says for a moment
that nothing is there. So one failed reading proves nothing. The pauses are long enough for a short absence and short
enough for a training that waits; what has failed by then is the caller's to judge.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from cache_store.errors import FormatError, UnreachableStoreError

WAITS_S = (0.0, 0.1, 0.3, 1.0)
"""Pauses before the second and each further try."""

Result = TypeVar("Result")


def reread(read: Callable[[], Result], forget: Callable[[], None], waits_s: Sequence[float] | None = None) -> Result:
    """Call `read`, and again after each pause (by default `WAITS_S`) while it fails. Raises the last error.

    `forget` is called in between, so that the next try does not get the same bytes out of a cache. A place that does
    not answer at all was tried again by the storage already.
    """
    for wait_s in WAITS_S if waits_s is None else waits_s:
        try:
            return read()
        except UnreachableStoreError:
            raise
        except (FormatError, OSError):
            time.sleep(wait_s)
            forget()
    return read()
