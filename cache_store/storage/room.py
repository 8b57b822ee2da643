"""What a file system refuses to take, as an error that says why, what would help and that nothing is lost."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_store.errors import StoreAddressError, StoreFullError
from cache_store.storage.local_files import free_bytes

FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
"""What is said of a path that leads through a file, or into a file system like `/proc`."""


@contextmanager
def room_for(needed_bytes: int, what: str, place: Path | str) -> Iterator[None]:
    """Raise `StoreFullError` where writing this to a store fails for want of room; other errors pass.

    But for `StoreAddressError` where the store is not to be written by this user, or at all.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FORBIDDEN and _is_below(place, error.filename):
            raise StoreAddressError(
                f"cannot write {what} to {place}: {_reason(error)}. All committed samples are intact; see to the "
                "permissions and how the disk is mounted, or give a store that you may write to."
            ) from error
        if error.errno not in FULL:
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the quota is used up"
        raise StoreFullError(
            f"cannot write {what} to {place}: {reason} ({_free(place)}); it needs {needed_bytes:,} bytes. "
            "All committed samples are intact; make room and run the same command again, it goes on from here.",
            needed_bytes,
            error.errno,
        ) from error


@contextmanager
def place_of(place: Path | str) -> Iterator[None]:
    """Raise `StoreAddressError` where a path cannot be a store's, or not yours; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FORBIDDEN | _NO_FOLDER:
            raise
        raise StoreAddressError(
            f"cannot open or make a store at {place}: {_reason(error)}. Correct the path, or see to the permissions "
            "and how the disk is mounted."
        ) from error


def _is_below(place: Path | str, name: Any) -> bool:
    """Whether it is the store that refused: while one is copied it may be the other."""
    return bool(name) and Path(place) in Path(os.fsdecode(name)).parents


def _reason(error: OSError) -> str:
    """With the path that was refused, which may be a folder above the store."""
    code = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno  # there is a file where a folder was to be
    reason = os.strerror(code or 0)
    return f"{reason} ({error.filename})" if error.filename else reason


def _free(place: Path | str) -> str:
    try:
        return f"{free_bytes(Path(place)):,} bytes free"
    except OSError:
        return "free space unknown"
