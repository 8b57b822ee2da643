"""A store in a bucket of S3-compatible object storage, through obstore; keys are the paths of the local tree.

An object appears as a whole or not at all, and `If-None-Match: *` does what a hard link does on a file system. obstore
repeats a request where that is safe. A conditional put is not safe, because a lost answer may hide a success, so its
loser looks at what is there: commit records of two attempts are never equal.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, GenericError
from obstore.store import S3Store

from cache_store.concurrency import in_order, in_order_by
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import FormatError, ObjectStorageError, UnsupportedFileSystemError
from cache_store.storage import s3_access
from cache_store.storage.local_storage import BLOCK_BYTES, STAGING, ByteArray, OnBlock, parts_of, too_large
from cache_store.storage.s3_access import S3Address
from cache_store.storage.s3_errors import explained, status_of
from cache_store.storage.storage import Storage, open_storage

if TYPE_CHECKING:
    from obstore import ObjectMeta

PART_BYTES = 16 * 2**20
"""Size of an upload's parts; a chunk of the default size is one request."""
RANGE_BYTES = 4 * 2**20
"""Size of a download's ranges, of which several are in flight: one connection does not fill the line."""
_RANGES = 16
"""Requests for ranges in flight for one store."""
_AHEAD = 8
"""Ranges of one object in flight; they are in memory besides the caller's buffer."""
_UPLOADS = 8
"""Objects of one sample, or parts of one object, in flight."""
_TRIES = 4
"""Tries of a request that was not answered to its end; obstore repeats only what it knows to be safe."""
_GROUP = "zarr.json"
"""The object of a group that is written and removed first: an attempt without it can never be committed."""

Result = TypeVar("Result")
Buffer: TypeAlias = Any
"""obstore's own bytes, which numpy reads in place."""


class ObjectStorage:
    """`storage.Storage` below a prefix of a bucket. Pickles as its address alone."""

    threads = 32

    def __init__(self, address: S3Address, store: S3Store) -> None:
        self.address = address
        self.place: Path | str = str(address)
        self._store = store
        self._pool = ThreadPoolExecutor(_RANGES, "ranges")  # begins no thread before its first use

    def __reduce__(self) -> tuple[Callable[[str], Storage], tuple[str]]:
        return open_storage, (str(self.address),)

    def where(self, relative: str) -> str:
        return f"{self.address}/{relative}" if relative else str(self.address)

    def forget(self, relative: str) -> None:
        pass  # every reading is a request of its own

    def check_parents(self, relative: str) -> None:
        parts_of(relative, self.place)

    def exists(self, relative: str) -> bool:
        with suppress(FileNotFoundError):
            self._head(relative)
            return True
        return False

    def names(self, folder: str, *, flat: bool = False) -> Iterator[str]:
        if flat:
            yield from (name for name, _ in self._objects(folder))
            return
        prefix = self.address.key(folder)
        start = len(prefix) + 1 if prefix else 0
        with self._explained("list", folder):
            listing = obstore.list_with_delimiter(self._store, prefix or None)
        yield from (path[start:] for path in listing["common_prefixes"])
        yield from (item["path"][start:] for item in listing["objects"])

    def size_bytes(self, relative: str) -> int:
        return self._head(relative)["size"]

    def read_document(self, relative: str, limit_bytes: int) -> bytes:
        key = self._key(relative)

        def read() -> bytes:
            result = obstore.get(self._store, key)
            if (size := result.meta["size"]) > limit_bytes:
                raise too_large(self.where(relative), size, limit_bytes)
            return bytes(result.bytes())

        with self._explained("read", relative):
            return _repeat(read)

    def read_into(
        self, relative: str, size: int, target: ByteArray, on_block: OnBlock = None, parents_checked: bool = False
    ) -> ByteArray | int:
        """Read in ranges, the first of which says how large the object is without a request of its own."""
        key = self._key(relative)
        with self._explained("read", relative):
            pieces = self._ranges(key, size)
            first, actual = next(pieces) if size else (b"", self.size_bytes(relative))
            if actual != size:
                return actual
            piece, rest = np.frombuffer(first, np.uint8), np.empty(size - len(target), np.uint8)
            step = BLOCK_BYTES if on_block is not None else max(size, 1)
            for buffer in (target, rest):
                for start in range(0, len(buffer), step):
                    block = unread = buffer[start : start + step]
                    while len(unread):
                        if not len(piece):
                            piece = np.frombuffer(next(pieces)[0], np.uint8)
                        count = min(len(unread), len(piece))
                        unread[:count] = piece[:count]
                        piece, unread = piece[count:], unread[count:]
                    if on_block is not None and buffer is target:
                        on_block(block)
        return rest

    def make_folders(self, folders: Iterable[str]) -> None:
        pass

    def check_exclusive(self) -> None:
        """Put one name twice: some servers silently ignore the condition."""
        probe = f"{STAGING}/{secrets.token_hex(16)}"
        with self._explained("write", probe):
            _repeat(lambda: self._create(probe, b"1"))
            twice = _repeat(lambda: self._create(probe, b"2"))
        self.delete([probe])
        if twice:
            raise UnsupportedFileSystemError(
                f"the server of {self.place} ignores If-None-Match, by which exactly one of several writers commits a "
                "sample; take a server that has conditional puts, or a newer version of it."
            )

    def write_group(self, folder: str, files: Sequence[tuple[str, Iterable[Any]]]) -> None:
        def write(file: tuple[str, Iterable[Any]]) -> None:
            self.put(f"{folder}/{file[0]}", list(file[1]))

        try:
            first, *rest = sorted(files, key=lambda file: file[0] != _GROUP)
            write(first)
            deque(in_order(write, rest, _UPLOADS), maxlen=0)
        except BaseException:
            self.delete_tree(folder)  # nothing refers to it yet
            raise

    def put_if_absent(self, relative: str, data: bytes) -> bool:
        def publish() -> bool | None:
            if self._create(relative, data):
                return True
            try:
                return self.read_document(relative, len(data)) == data
            except FormatError:  # larger: another's
                return False
            except FileNotFoundError:  # refused because of a request at the same time, or removed since
                return None

        with self._explained("write", relative):
            for attempt in range(_TRIES):
                if (won := _repeat(publish)) is not None:
                    return won
                _wait(attempt)
        answer = "the server says that it is there, and that it is not"
        remedy = "Nothing was committed; run the same command again."
        raise ObjectStorageError(f"cannot write {self.where(relative)}: {answer}. {remedy}")

    def put(self, relative: str, parts: Sequence[Any]) -> None:
        key = self._key(relative)
        kept = [part for part in parts if len(part)]
        in_parts = sum(map(len, kept)) > PART_BYTES
        options = {"chunk_size": PART_BYTES, "max_concurrency": _UPLOADS} if in_parts else {"use_multipart": False}
        with self._explained("write", relative):
            _repeat(lambda: obstore.put(self._store, key, kept or b"", **options))

    def move(self, relative: str, target: str) -> None:
        source, end = self._key(relative), self._key(target)
        with self._explained("move", relative):
            _repeat(lambda: obstore.copy(self._store, source, end))
        self.delete([relative])

    def delete(self, relatives: Iterable[str]) -> None:
        keys = [self._key(relative) for relative in relatives]
        with self._explained("remove", ""):
            if keys:  # one alone without the bulk request, which not all servers have
                _repeat(lambda: obstore.delete(self._store, keys if len(keys) > 1 else keys[0]))

    def delete_tree(self, folder: str) -> None:
        with suppress(ObjectStorageError, FileNotFoundError):
            names = [f"{folder}/{name}" for name, _ in self._objects(folder)]
            self.delete(name for name in names if name != f"{folder}/{_GROUP}")
            self.delete([f"{folder}/{_GROUP}"])

    def extent(self, relative: str) -> tuple[int, float]:
        with suppress(FileNotFoundError):
            alone = self._head(relative)
            return alone["size"], alone["last_modified"].timestamp()
        objects = [item for _, item in self._objects(relative)]
        changed = max((item["last_modified"].timestamp() for item in objects), default=time.time())
        return sum(item["size"] for item in objects), changed

    def set_aside(self, folder: str, aside: str) -> bool:
        """Remove its `zarr.json`: a writer that publishes later misses it, and one that has published is seen."""
        name = f"{folder}/{_GROUP}"
        try:
            data = self.read_document(name, MAX_DOCUMENT_BYTES)
        except FileNotFoundError:  # another collector took it, or its writer is giving up
            return any(True for _ in self._objects(folder))
        self.put(aside, [data])
        self.delete([name])
        return True

    def put_back(self, folder: str, aside: str) -> None:
        with suppress(FileNotFoundError):
            self.put(f"{folder}/{_GROUP}", [self.read_document(aside, MAX_DOCUMENT_BYTES)])
            self.delete([aside])

    def drop(self, folder: str, aside: str) -> None:
        if folder:
            self.delete_tree(folder)
        self.delete([aside])

    def folder_time_ns(self, folder: str) -> int:
        return 0

    def clock_ns(self) -> int:
        probe = f"{STAGING}/{secrets.token_hex(16)}"
        self.put(probe, [b"1"])
        try:
            return int(self._head(probe)["last_modified"].timestamp() * 1e9)
        finally:
            self.delete([probe])

    def _key(self, relative: str) -> str:
        self.check_parents(relative)
        return self.address.key(relative)

    def _explained(self, action: str, relative: str) -> AbstractContextManager[None]:
        return explained(self.address, action, self.where(relative))

    def _head(self, relative: str) -> "ObjectMeta":
        key = self._key(relative)
        with self._explained("look for", relative):
            return _repeat(lambda: obstore.head(self._store, key))

    def _objects(self, folder: str) -> Iterator[tuple[str, "ObjectMeta"]]:
        """All objects below a folder, with their names in it."""
        prefix = self.address.key(folder)
        with self._explained("list", folder):
            for page in obstore.list(self._store, prefix, chunk_size=1000):
                yield from ((item["path"][len(prefix) + 1 :], item) for item in page)

    def _create(self, relative: str, data: bytes) -> bool:
        """Make one conditional put; returns whether it created the object."""
        try:
            obstore.put(self._store, self._key(relative), data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def _ranges(self, key: str, size: int) -> Iterator[tuple[Buffer, int]]:
        """The object's ranges in order, each with the object's size; several are in flight."""
        read = partial(self._range, key, size)
        starts = range(0, size, RANGE_BYTES)
        return map(read, starts) if len(starts) == 1 else in_order_by(self._pool, read, starts, _AHEAD)

    def _range(self, key: str, expected: int, start: int) -> tuple[Buffer, int]:
        """The range of an object from `start` on, shorter only where the object is, and the object's size."""
        end = min(start + RANGE_BYTES, expected)

        def read() -> tuple[Buffer, int]:
            try:
                result = obstore.get(self._store, key, options={"range": (start, end)})
            except GenericError as error:
                if status_of(error) != "416":  # it ends before the range
                    raise
                return b"", obstore.head(self._store, key)["size"]
            size, data = result.meta["size"], result.bytes()
            if len(data) != min(end, size) - start:
                raise GenericError("the answer is shorter than it says")
            return data, size

        return _repeat(read)


def _repeat(action: Callable[[], Result]) -> Result:
    """Call an action that may be done twice, again while there is no whole answer to it."""
    for attempt in range(_TRIES - 1):
        try:
            return action()
        except GenericError as error:
            if status_of(error):
                raise
        _wait(attempt)
    return action()


def _wait(attempt: int) -> None:
    longest = min(s3_access.FIRST_WAIT * 2**attempt, s3_access.LONGEST_WAIT).total_seconds()
    time.sleep(longest * (1 + secrets.randbelow(1000) / 1000) / 2)
