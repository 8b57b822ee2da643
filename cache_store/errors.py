"""Errors of the store. Each also inherits the builtin that fits, so callers need not import this module.

All survive pickling, because readers run inside data-loading worker processes.
"""

import errno
from collections.abc import Sequence


class CacheStoreError(Exception):
    """Base of every error that this package raises on purpose (bad arguments are plain `ValueError`)."""


class StoreNotFoundError(CacheStoreError, FileNotFoundError):
    """No store at this path."""


class IdentityMismatchError(CacheStoreError, ValueError):
    """The store holds samples made with other settings; `differences` has one line per differing key."""

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class FormatError(CacheStoreError, ValueError):
    """Metadata or a record of the store is malformed, damaged, hostile or of a newer format version."""


class SampleReadError(CacheStoreError, OSError):
    """A committed sample cannot be read, and could not be when tried again: damaged, or something is in the way."""

    def __init__(self, message: str, sample_id: str = "", field: str = "") -> None:
        super().__init__(message)
        self.sample_id = sample_id
        self.field = field


class CorruptSampleError(SampleReadError):
    """Bytes of a committed sample are not what was written: missing, truncated or changed."""


class UnreadableSampleError(SampleReadError):
    """A committed sample is not given out (I/O error, no permission, gone since); that says nothing of its bytes."""


class SampleNotFoundError(CacheStoreError, KeyError):
    """No committed sample has this id."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class FieldNotFoundError(CacheStoreError, KeyError):
    """The store has no such field, or this sample was written without this optional one."""

    __str__ = Exception.__str__


class StoreFullError(CacheStoreError, OSError):
    """The file system has no room (or quota) left; `needed_bytes` is what the refused write needs."""

    def __init__(self, message: str, needed_bytes: int = 0, code: int = errno.ENOSPC) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.errno = code

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # `errno` is no entry of `__dict__`
        return type(self), (self.args[0], self.needed_bytes, self.errno)


class UnsupportedFileSystemError(CacheStoreError, OSError):
    """The file system or object storage lacks what the commit protocol needs (hard links, conditional puts)."""


class StoreAddressError(CacheStoreError, ValueError):
    """A URI that names no store, or object storage that is not set up: no library, credentials or bucket."""


class UnreachableStoreError(CacheStoreError, OSError):
    """The place of a store does not answer (unmounted, network away); that says nothing of what the store holds."""


class ObjectStorageError(UnreachableStoreError):
    """Object storage refused a request, or still failed after all retries."""
