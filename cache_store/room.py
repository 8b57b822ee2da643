"""A full disk or quota, as an error that says how much is needed and that nothing is lost."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_store.errors import StoreFullError
from cache_store.local_files import free_bytes

FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def room_for(needed_bytes: int, what: str, place: Path | str) -> Iterator[None]:
    """Raise `StoreFullError` where writing this to a store fails for want of room; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the quota is used up"
        raise StoreFullError(
            f"cannot write {what} to {place}: {reason} ({_free(place)}); it needs {needed_bytes:,} bytes. "
            "All committed samples are intact; make room and run the same command again, it goes on from here.",
            needed_bytes,
            error.errno,
        ) from error


def _free(place: Path | str) -> str:
    try:
        return f"{free_bytes(Path(place)):,} bytes free"
    except OSError:
        return "free space unknown"
