"""Durable files: bytes are on the medium when `write_new` returns, a name when `flush` of its folder has returned.

Refusals of the file system become errors that say why, what would help, and that nothing is lost.
"""

import errno
import fcntl
import mmap
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.concurrency import in_order_by
from cache_store.errors import StoreAddressError, StoreFullError, UnreachableStoreError, UnsupportedFileSystemError

MAX_TRANSFER_BYTES = 2**30
"""Limit of one system call; Linux transfers at most 2 GiB."""
FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
"""Answers for a path that leads through a file, or into a file system like `/proc`."""
_AWAY = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO}
_AWAY |= {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
"""Answers of a disk that fails, and of a share whose server is away."""
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_WRITERS = 4
"""Threads that write the files of one sample."""
_DIRECT = getattr(os, "O_DIRECT", 0)
"""Flag to write around the page cache: a sample is not read again soon, and fresh pages for it cost more CPU time than
all else (docs/decisions/0013-writes-around-the-page-cache.md)."""
_DIRECT_BYTES = 2**20
"""Size from which files are written that way."""
_BLOCK = 4096
"""Alignment of such a write, in memory and on the medium."""
_STAGE_BYTES = 2**20


def write_new(*files: tuple[Path, Iterable[Any]]) -> None:
    """Create files from buffers (bytes or uint8 arrays) and force them to the medium. None must exist yet.

    Several are written in threads, as one cannot keep a fast disk busy; none writes after this, be it by an error.
    """
    if len(files) == 1:
        _write_file(*files[0])
        return
    with ThreadPoolExecutor(_WRITERS, "write") as pool:
        deque(in_order_by(pool, lambda file: _write_file(*file), files, len(files)), maxlen=0)


def _write_file(path: Path, parts: Iterable[Any]) -> None:
    views = [np.frombuffer(part, np.uint8) for part in parts if len(part)]
    size = sum(map(len, views))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        direct = size >= _DIRECT_BYTES and _set_direct(descriptor, True)
        for view in _aligned(views, size) if direct else views:
            _write_all(descriptor, view)
        if direct:
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aligned(views: Iterable[NDArray[np.uint8]], size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the same bytes in aligned blocks, the last one padded; each is valid until the next."""
    stage = np.frombuffer(mmap.mmap(-1, min(size + -size % _BLOCK, _STAGE_BYTES)), np.uint8)
    filled = 0
    for view in views:
        while len(view):
            taken = min(len(view), len(stage) - filled)
            # numpy copies between arrays without the interpreter lock; memoryviews would hold it.
            stage[filled : filled + taken] = view[:taken]
            view, filled = view[taken:], filled + taken
            if filled == len(stage):
                yield stage
                filled = 0
    if filled:
        yield stage[: filled + -filled % _BLOCK]


def _write_all(descriptor: int, view: NDArray[np.uint8]) -> None:
    while len(view):
        try:
            view = view[os.write(descriptor, view[:MAX_TRANSFER_BYTES].data) :]
        except OSError as error:
            # Refused as not aligned, at once or after a write that a full disk cut short: the page cache takes any.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Write around the page cache, or through it, from now on; returns whether that is a change."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        if changes := bool(flags & _DIRECT) != wanted:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ _DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return changes


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the medium."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Create a folder and its parents where absent, and force the new names to the medium."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def link(temporary: Path, target: Path) -> bool:
    """Give a file a second name, unless that is taken: then `False`."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost; the link count tells whose link it is.
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno in _NO_LINKS:
            failed = f"cannot hard-link {temporary} to {target} ({error.strerror})"
            remedy = "commits samples by hard links, so keep it on a file system that has them (ext4, XFS, NFS, ...)"
            raise UnsupportedFileSystemError(f"{failed}; the store {remedy}.") from error
        raise
    return True


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file beside its name, flush it, then rename it: a kill or a power loss leaves the old one or the new."""
    draft = path.with_name(f".{path.name}.new")
    with open(draft, "wb", opener=_open_no_link) as file:
        file.write(data)
    flush(draft)
    draft.replace(path)
    flush(path.parent)


def _open_no_link(path: str, flags: int) -> int:
    """Open a file, but not the one that a link under its name leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def free_bytes(path: Path) -> int:
    """Room that an ordinary user has left on the file system (quotas not counted)."""
    return shutil.disk_usage(path).free


@contextmanager
def writing(what: str, needed_bytes: int, place: Path | str) -> Iterator[None]:
    """Raise `StoreFullError` where there is no room and `StoreAddressError` where this user may not write."""
    try:
        yield
    except OSError as error:
        # While a store is copied, what refused may be the other one.
        is_below = bool(error.filename) and Path(place) in Path(os.fsdecode(error.filename)).parents
        if error.errno in _FORBIDDEN and is_below:
            failed = f"cannot write {what} to {place}: {_reason(error)}. All committed samples are intact"
            remedy = "see to the permissions and how the disk is mounted, or give a store that you may write to"
            raise StoreAddressError(f"{failed}; {remedy}.") from error
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
    """Raise `StoreAddressError` where a path cannot be a store's, or not this user's; other errors pass.

    `UnreachableStoreError` where disk or share do not answer.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _AWAY:
            raise unreachable(place, error) from error
        if error.errno not in _FORBIDDEN | _NO_FOLDER:
            raise
        remedy = "Correct the path, or see to the permissions and how the disk is mounted."
        raise StoreAddressError(f"cannot open or make a store at {place}: {_reason(error)}. {remedy}") from error


def unreachable(place: Path | str, error: OSError) -> UnreachableStoreError:
    """Error for a place that does not answer, or holds no store any more."""
    reason = "the store is not there any more" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    known = "That says nothing of what the store holds, and nothing was changed"
    remedy = "see that the disk or share is mounted and may be read, and run the same command again"
    return UnreachableStoreError(f"{place} cannot be reached: {reason}. {known}; {remedy}.")


def _reason(error: OSError) -> str:
    """The system's reason, with the path that was refused: it may be a folder above the store."""
    code = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno  # there is a file where a folder was to be
    reason = os.strerror(code or 0)
    return f"{reason} ({error.filename})" if error.filename else reason
