"""A store in a folder of a local or network file system. Nothing here follows a symbolic link below the root."""

import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_store.errors import FormatError
from cache_store.storage import local_files
from cache_store.storage.local_files import MAX_TRANSFER_BYTES

ROOT_DOCUMENT = "zarr.json"
"""The object that every store has."""
STAGING = "staging"
"""Folder of files that have no name yet."""
BLOCK_BYTES = 2**20
"""Bytes read and checked at a time: still in the second-level cache, and large enough that eight threads do not queue
for Python's interpreter lock (blocks of 256 KiB read half as fast there)."""
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a planted FIFO must not block the open

ByteArray: TypeAlias = NDArray[np.uint8]
OnBlock: TypeAlias = Callable[[Any], None] | None


class LocalStorage:
    """`storage.Storage` below a folder. Holds nothing open; can be pickled."""

    threads = 1

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place: Path | str = root

    def where(self, relative: str) -> str:
        return str(self.root / relative)

    def exists(self, relative: str) -> bool:
        return os.path.lexists(self.root / relative)  # a dangling link takes the name, too

    def names(self, folder: str, *, flat: bool = False) -> Iterator[str]:
        if not folder:
            if self.root.is_dir():
                yield from (entry.name for entry in self.root.iterdir())
            return
        try:
            self.check_parents(f"{folder}/any")
            with os.scandir(self.root / folder) as entries:
                yield from (entry.name for entry in entries)
        except FileNotFoundError as error:
            if not self.exists(ROOT_DOCUMENT):
                raise local_files.unreachable(self.root, error) from error
            incomplete = f"the store at {self.root} is incomplete (was it copied only in part?)"
            raise FormatError(f"{self.root / folder} is missing; {incomplete}.") from error
        except OSError as error:
            raise local_files.unreachable(self.root, error) from error

    def size_bytes(self, relative: str) -> int:
        self.check_parents(relative)
        path = self.root / relative
        return _regular_size(os.lstat(path), path)

    def read_document(self, relative: str, limit_bytes: int) -> bytes:
        self.check_parents(relative)
        descriptor = _open(self.root / relative)
        try:
            size = _regular_size(os.fstat(descriptor), self.root / relative)
            data = bytearray()
            # `os.read` allocates what it is asked for, so that is never the limit: the index has one of 16 GiB.
            while size <= limit_bytes and len(data) <= size and (block := os.read(descriptor, size + 1 - len(data))):
                data += block
        finally:
            os.close(descriptor)
        if (actual := max(size, len(data))) > limit_bytes:
            raise too_large(self.where(relative), actual, limit_bytes)
        return bytes(data)

    def read_into(
        self, relative: str, size: int, target: ByteArray, on_block: OnBlock = None, parents_checked: bool = False
    ) -> ByteArray | int:
        if not parents_checked:
            self.check_parents(relative)
        path = f"{self.root}/{relative}"
        descriptor = _open(path)
        try:
            actual = _regular_size(os.fstat(descriptor), path)
            if actual != size:
                return actual
            rest = np.empty(size - len(target), np.uint8)
            views = [memoryview(target), memoryview(rest)]  # type: ignore[arg-type]
            if on_block is None and size <= MAX_TRANSFER_BYTES and os.preadv(descriptor, views, 0) == size:
                return rest
            step, at = BLOCK_BYTES if on_block is not None else MAX_TRANSFER_BYTES, 0
            for view in views:
                for start in range(0, len(view), step):
                    block = unread = view[start : start + step]
                    while len(unread):
                        count = os.preadv(descriptor, [unread], at)
                        if count == 0:  # truncated since the size was taken
                            return at
                        unread, at = unread[count:], at + count
                    if on_block is not None and view is views[0]:
                        on_block(block)
            return rest
        finally:
            os.close(descriptor)

    def forget(self, relative: str) -> None:
        path = self.root / relative
        with suppress(OSError):
            os.close(os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC))  # a network file system asks the server anew
            descriptor = os.open(path, _READ_FLAGS)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def check_parents(self, relative: str) -> None:
        folder = os.fspath(self.root)
        for part in parts_of(relative, self.root)[:-1]:
            folder = f"{folder}/{part}"
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise FormatError(f"{folder} is not a real folder (a symbolic link?); it is refused.")

    def make_folders(self, folders: Iterable[str]) -> None:
        paths = [self.root / folder for folder in folders]
        for path in paths:
            local_files.make_folders(path)
        parents = dict.fromkeys(path.parent for path in paths)
        # Also names that a racing writer has made but not yet forced to the medium.
        for path in dict.fromkeys([*parents, *(path.parent for path in parents)]):
            local_files.flush(path)

    def check_exclusive(self) -> None:
        pass  # the first hard link shows whether there are any

    def write_group(self, folder: str, files: Sequence[tuple[str, Iterable[Any]]]) -> None:
        path = self.root / folder
        path.mkdir()
        try:
            arrays = dict.fromkeys((path / name).parent for name, _ in files if "/" in name)
            for array in arrays:
                array.mkdir()
            local_files.write_new(*((path / name, parts) for name, parts in files))
            for made in (*arrays, path, path.parent):
                local_files.flush(made)
        except BaseException:
            self.delete_tree(folder)  # nothing refers to it yet; a full disk needs the room
            raise

    def put_if_absent(self, relative: str, data: bytes) -> bool:
        temporary, target = self.root / STAGING / secrets.token_hex(16), self.root / relative
        try:
            local_files.write_new((temporary, [data]))
            won = local_files.link(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        local_files.flush(target.parent)  # the loser's too: it is about to tell its caller that the sample is there
        return won

    def put(self, relative: str, parts: Sequence[Any]) -> None:
        temporary, target = self.root / STAGING / secrets.token_hex(16), self.root / relative
        try:
            local_files.write_new((temporary, parts))
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        local_files.flush(target.parent)

    def move(self, relative: str, target: str) -> None:
        self.check_parents(relative)
        local_files.make_folders((self.root / target).parent)
        (self.root / relative).rename(self.root / target)
        for name in (target, relative):
            local_files.flush((self.root / name).parent)

    def delete(self, relatives: Iterable[str]) -> None:
        paths = [self.root / relative for relative in relatives]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in dict.fromkeys(path.parent for path in paths):
            local_files.flush(folder)

    def delete_tree(self, folder: str) -> None:
        shutil.rmtree(self.root / folder, ignore_errors=True)

    def extent(self, relative: str) -> tuple[int, float]:
        size, changed = 0, 0.0
        pending = [self.root / relative]
        while pending:
            item = pending.pop()
            try:
                status = item.lstat()
                if item.is_dir() and not item.is_symlink():
                    pending += list(item.iterdir())
                else:
                    size += status.st_size
            except FileNotFoundError:  # its writer is at work
                return size, time.time()
            changed = max(changed, status.st_mtime, status.st_ctime if item.is_file() else 0.0)
        return size, changed

    def set_aside(self, folder: str, aside: str) -> bool:
        try:
            (self.root / folder).rename(self.root / aside)
        except FileNotFoundError:
            return False
        return True

    def put_back(self, folder: str, aside: str) -> None:
        if self.exists(aside):
            (self.root / aside).rename(self.root / folder)
            local_files.flush((self.root / folder).parent)

    def drop(self, folder: str, aside: str) -> None:
        self.delete_tree(aside)

    def folder_time_ns(self, folder: str) -> int:
        return (self.root / folder).stat().st_mtime_ns

    def clock_ns(self) -> int:
        probe = self.root / STAGING / secrets.token_hex(16)
        try:
            local_files.write_new((probe, [b""]))
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)


def parts_of(relative: str, root: Path | str) -> list[str]:
    """Components of a name, none of which can lead out of the store."""
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise FormatError(f"path {relative!r} leaves the store at {root} or is not in normal form.")
    return parts


def too_large(where: str, size: int, limit_bytes: int) -> FormatError:
    return FormatError(f"{where} has {size} bytes; a document of a store has at most {limit_bytes}.")


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
