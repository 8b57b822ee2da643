"""Every operation on the file system that the store needs; `object_storage` is its counterpart.

Durability is the point: a file is on the medium when `write_new` returns, its name when `sync_folder` of its folder
has returned. Nothing here follows a symbolic link below the store's root.
"""

import errno
import fcntl
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.errors import FormatError, UnsupportedFileSystemError

_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a planted FIFO must not block the open
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_MAX_WRITE = 2**30
"""Linux writes at most 2 GiB a call."""
_WRITERS = 4
"""Threads that write the files of one sample."""
_DIRECT = getattr(os, "O_DIRECT", 0)
"""Around the page cache: a sample is not read again soon, and fresh pages for it cost more of a core than all else."""
_DIRECT_BYTES = 2**20
"""Files from this size on are written that way."""
_BLOCK = 4096
"""What such a write has to be a multiple of, in memory and on the medium."""
_STAGE_BYTES = 2**20


def write_new(*files: tuple[Path, Iterable[Any]]) -> None:
    """Create files from buffers (bytes or uint8 arrays) and force them to the medium. None must exist yet.

    Several are written in threads: one alone cannot keep a fast disk busy. When this ends, by an error too, no thread
    writes any more.
    """
    if len(files) == 1:
        _write_file(*files[0])
        return
    with ThreadPoolExecutor(_WRITERS, "write") as pool:
        try:
            for written in [pool.submit(_write_file, *file) for file in files]:
                written.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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
    """The same bytes in aligned blocks, the last one padded; each is good until the next."""
    stage = np.frombuffer(mmap.mmap(-1, min(size + -size % _BLOCK, _STAGE_BYTES)), np.uint8)
    filled = 0
    for view in views:
        while len(view):
            taken = min(len(view), len(stage) - filled)
            # Between arrays, as numpy lets go of the interpreter lock; memoryviews do not.
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
            view = view[os.write(descriptor, view[:_MAX_WRITE].data) :]
        except OSError as error:
            # Refused as not aligned, here or after a write that a full disk cut short: the page cache takes anything.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Write around the page cache or through it from now on; whether that is a change."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if bool(flags & _DIRECT) == wanted:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ _DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return True


def make_folder(path: Path) -> None:
    """Create one folder that must not exist yet. The name is durable after `sync_folder(path.parent)`."""
    path.mkdir()


def make_folders(path: Path) -> None:
    """Create a folder and its parents where absent, and force the new names to the medium."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the medium."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_if_absent(staging: Path, target: Path, data: bytes) -> bool:
    """Publish a whole durable file under a name, unless the name is taken: then `False` and nothing changes."""
    temporary = staging / secrets.token_hex(16)
    try:
        write_new((temporary, [data]))
        won = _link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)  # also for the loser: it is about to tell its caller that the sample is there
    return won


def _link(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost; the link count knows who made it.
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise UnsupportedFileSystemError(
                f"cannot hard-link {temporary} to {target} ({error.strerror}); the store commits samples by hard "
                "links, so keep it on a file system that has them (ext4, XFS, NFS, ...)."
            ) from error
        raise
    return True


def replace(staging: Path, target: Path, parts: Iterable[Any]) -> None:
    """Publish a whole durable file of these buffers under a name, replacing what was there."""
    temporary = staging / secrets.token_hex(16)
    try:
        write_new((temporary, parts))
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder with everything in it, as far as possible."""
    shutil.rmtree(path, ignore_errors=True)


def exists(path: Path) -> bool:
    """Whether the name is taken (a dangling link takes it too)."""
    return os.path.lexists(path)


def names(root: Path, relative: str) -> Iterator[str]:
    """The names in a folder below the root, in no order."""
    try:
        check_parents(root, f"{relative}/any")
        with os.scandir(root / relative) as entries:
            for entry in entries:
                yield entry.name
    except FileNotFoundError as error:
        raise FormatError(
            f"{root / relative} is missing; the store at {root} is incomplete (was it copied only in part?)."
        ) from error


def free_bytes(path: Path) -> int:
    """Room that an ordinary user has left on the file system (quotas not counted)."""
    return shutil.disk_usage(path).free


def size_bytes(root: Path, relative: str) -> int:
    """Size of a regular file below the root; `FileNotFoundError` when absent, `FormatError` for links and the like."""
    check_parents(root, relative)
    path = root / relative
    return _regular_size(os.lstat(path), path)


def read_document(root: Path, relative: str, limit_bytes: int) -> bytes:
    """A small file below the root, refused when it is larger than the limit."""
    check_parents(root, relative)
    descriptor = _open(root / relative)
    try:
        size = _regular_size(os.fstat(descriptor), root / relative)
        data = bytearray()
        # `os.read` allocates what it is asked for, so that is never the limit: the index has one of 16 GiB.
        while size <= limit_bytes and len(data) <= size and (block := os.read(descriptor, size + 1 - len(data))):
            data += block
    finally:
        os.close(descriptor)
    if (found := max(size, len(data))) > limit_bytes:
        raise FormatError(f"{root / relative} has {found} bytes; a document of a store has at most {limit_bytes}.")
    return bytes(data)


def read_exactly(root: Path, relative: str, size: int) -> NDArray[np.uint8] | int:
    """The bytes of a file below the root, or its actual size when that is not `size` (nothing is allocated then)."""
    data: list[NDArray[np.uint8]] = []

    def buffers() -> list[NDArray[np.uint8]]:
        data.append(np.empty(size, np.uint8))
        return data

    found = read_into(root, relative, size, buffers, block_bytes=size or 1)
    return data[0] if found == size else found


def read_into(
    root: Path,
    relative: str,
    size: int,
    buffers: Callable[[], Sequence[NDArray[np.uint8]]],
    *,
    block_bytes: int,
    on_block: Callable[[int, int, int], None] | None = None,
    parents_checked: bool = False,
) -> int:
    """Fill buffers, together of `size` bytes, with a file below the root.

    Each block is handed on while in cache, as number of the buffer, start and end. Returns the file's actual size; when
    that is not `size` the file is not read, or not to its end. Whoever reads many files of one folder may have called
    `check_parents` for all of them.
    """
    if not parents_checked:
        check_parents(root, relative)
    path = f"{root}/{relative}"
    descriptor = _open(path)
    try:
        found = _regular_size(os.fstat(descriptor), path)
        if found != size:
            return found
        parts = buffers()
        if on_block is None and size <= _MAX_WRITE and os.preadv(descriptor, [memoryview(b) for b in parts], 0) == size:  # type: ignore[arg-type]
            return size
        at = 0
        for number, buffer in enumerate(parts):
            view, length = memoryview(buffer), len(buffer)  # type: ignore[arg-type]
            for start in range(0, length, block_bytes):
                end = min(start + block_bytes, length)
                filled = start
                while filled < end:
                    count = os.preadv(descriptor, [view[filled : min(end, filled + _MAX_WRITE)]], at + filled)
                    if count == 0:  # truncated since the size was taken
                        return at + filled
                    filled += count
                if on_block is not None:
                    on_block(number, start, end)
            at += length
        return size
    finally:
        os.close(descriptor)


def _open(path: Path | str) -> int:
    try:
        return os.open(path, _READ_FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError(f"{path} is a symbolic link; a store has none, so it is refused.") from error
        raise


def _regular_size(status: os.stat_result, path: Path | str) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path} is not a regular file; a store has only files and folders, so it is refused.")
    return status.st_size


def parts_of(relative: str, root: Path | str) -> list[str]:
    """The components of a name, none of which can lead out of the store."""
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise FormatError(f"path {relative!r} leaves the store at {root} or is not in normal form.")
    return parts


def check_parents(root: Path, relative: str) -> None:
    """No component between the root and the file may be a link: it could lead out of the store."""
    parts = parts_of(relative, root)
    folder = os.fspath(root)
    for part in parts[:-1]:
        folder = f"{folder}/{part}"
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise FormatError(f"{folder} is not a real folder (a symbolic link?); it is refused.")


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file beside its name, flush it, then rename it: a kill or a power loss leaves the old one or the new."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(data)
    flush(draft)
    draft.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the medium."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
