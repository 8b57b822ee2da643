"""Refusals of a file system, as errors that say why, what would help, and that nothing is lost."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_store.errors import StoreAddressError, StoreFullError
from cache_store.storage.local_files import free_bytes

FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
"""Answers for a path that leads through a file, or into a file system like `/proc`."""


@contextmanager
def writing(what: str, needed_bytes: int, place: Path | str) -> Iterator[None]:
    """Explain why a write to a store failed: `StoreFullError` where there is no room, `StoreAddressError` where this
    user may not write. Other errors pass."""
    try:
        yield
    except OSError as error:
        # While a store is copied, what refused may be the other one.
        is_below = bool(error.filename) and Path(place) in Path(os.fsdecode(error.filename)).parents
        if error.errno in _FORBIDDEN and is_below:
            raise StoreAddressError(
                f"cannot write {what} to {place}: {_reason(error)}. All committed samples are intact; see to the "
                "permissions and how the disk is mounted, or give a store that you may write to."
            ) from error
        if error.errno not in FULL:
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the quota is used up"
        free = "free space unknown"
        with suppress(OSError):
            free = f"{free_bytes(Path(place)):,} bytes free"
        raise StoreFullError(
            f"cannot write {what} to {place}: {reason} ({free}); it needs {needed_bytes:,} bytes. "
            "All committed samples are intact; make room and run the same command again, it goes on from here.",
            needed_bytes,
            error.errno,
        ) from error


@contextmanager
def opening(place: Path | str) -> Iterator[None]:
    """Raise `StoreAddressError` where a path cannot be a store's, or not this user's; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FORBIDDEN | _NO_FOLDER:
            raise
        raise StoreAddressError(
            f"cannot open or make a store at {place}: {_reason(error)}. Correct the path, or see to the permissions "
            "and how the disk is mounted."
        ) from error


def _reason(error: OSError) -> str:
    """The system's reason, with the path that was refused: it may be a folder above the store."""
    code = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno  # there is a file where a folder was to be
    reason = os.strerror(code or 0)
    return f"{reason} ({error.filename})" if error.filename else reason
