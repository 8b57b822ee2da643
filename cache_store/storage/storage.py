"""The interface of the place where a store lies, and the choice between a file system and object storage.

Everything is named by its path relative to the store's root, with `/`. An implementation makes three promises: what
`write_group`, `put` and `put_if_absent` have written is durable when they return; a document or an object is there as
a whole or not at all; of several `put_if_absent` of one name exactly one wins.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from cache_store.errors import StoreAddressError
from cache_store.storage.local_storage import ByteArray, LocalStorage, OnBlock

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


StorePath: TypeAlias = str | os.PathLike[str]
"""A folder, or an `s3://` URI."""


class Storage(Protocol):
    """The objects below one root."""

    place: Path | str
    """The root: an absolute folder, or a URI."""
    threads: int
    """Number of small requests that are worth having in flight; 1 where each is answered at once."""

    def where(self, relative: str) -> str:
        """Full name of an object, for messages."""

    def exists(self, relative: str) -> bool:
        """Tell whether the name is taken."""

    def names(self, folder: str, *, flat: bool = False) -> Iterator[str]:
        """Names in a folder (`""`: the root), in no order. `flat`: the folder is known to hold no folders.

        Raises `FormatError` where the store lacks the folder, `UnreachableStoreError` where the place does not answer.
        """

    def size_bytes(self, relative: str) -> int:
        """Size of an object; `FileNotFoundError` when absent."""

    def read_document(self, relative: str, limit_bytes: int) -> bytes:
        """A small object, refused with `FormatError` when it is larger than the limit."""

    def read_into(
        self, relative: str, size: int, target: ByteArray, on_block: OnBlock = None, parents_checked: bool = False
    ) -> ByteArray | int:
        """Fill `target` with the beginning of an object of `size` bytes, and return the rest in a new array.

        Returns the object's actual size instead when that is not `size`: nothing is allocated then. `on_block` gets
        each block of the target while it is still in the CPU's cache. A caller that reads many objects of one folder
        may have called `check_parents` for all of them.
        """

    def forget(self, relative: str) -> None:
        """Drop what this machine remembers of an object, so that it is read anew from the medium or the server."""

    def check_parents(self, relative: str) -> None:
        """Raise `FormatError` for a name that leads out of the store."""

    def make_folders(self, folders: Iterable[str]) -> None:
        """Create folders where absent, durably, if the storage has folders."""

    def check_exclusive(self) -> None:
        """Raise `UnsupportedFileSystemError` where `put_if_absent` would let two callers win."""

    def write_group(self, folder: str, files: Sequence[tuple[str, Iterable[Any]]]) -> None:
        """Write the objects (path in the folder, buffers) of a new folder; after an error none is left."""

    def put_if_absent(self, relative: str, data: bytes) -> bool:
        """Publish a whole object under a name, unless the name is taken: then `False` and nothing changes."""

    def put(self, relative: str, parts: Sequence[Any]) -> None:
        """Publish a whole object, given as buffers, under a name, replacing what was there."""

    def move(self, relative: str, target: str) -> None:
        """Give an object another name, durably; `FileNotFoundError` when absent."""

    def delete(self, relatives: Iterable[str]) -> None:
        """Remove objects where present, durably."""

    def delete_tree(self, folder: str) -> None:
        """Remove a folder with everything in it, as far as possible."""

    def extent(self, relative: str) -> tuple[int, float]:
        """Bytes at and below a name, and when it last changed (seconds of the storage's clock)."""

    def set_aside(self, folder: str, aside: str) -> bool:
        """Take a sample's attempt out of its place, so that its writer notices; `False` if it is not there.

        `folder` and `aside` stay known after a kill at any point, so `put_back` or `drop` can follow later.
        """

    def put_back(self, folder: str, aside: str) -> None:
        """Undo `set_aside`, if that has not been done."""

    def drop(self, folder: str, aside: str) -> None:
        """Remove for good what was set aside; `folder` is empty if `aside` is the name of none."""

    def folder_time_ns(self, folder: str) -> int:
        """When a name last appeared in or vanished from a folder, by the storage's clock; 0 where that is unknown."""

    def clock_ns(self) -> int:
        """Time by the clock that stamps objects: a server's may differ from this machine's."""


def open_storage(path: StorePath) -> Storage:
    """Open the storage at a path or an `s3://` URI; a path is made absolute, so a later `chdir` does not matter.

    Raises `StoreAddressError` for other URIs and for object storage that cannot be reached from here.
    """
    if not is_uri(path):
        return LocalStorage(Path(path).absolute())
    from cache_store.storage.s3_access import S3Address, connect

    address = S3Address.parse(os.fspath(path))
    store = connect(address)  # says so where obstore, an extra, is not installed
    from cache_store.storage.object_storage import ObjectStorage

    return ObjectStorage(address, store)


def is_uri(path: StorePath) -> bool:
    """Tell whether this names object storage. Raises `StoreAddressError` for a URI of another kind than `s3://`."""
    match = _SCHEME.match(os.fspath(path))
    if match is None:
        return False
    if match[1] != "s3":
        where = f"a URI with the scheme {match[1]}://"
        raise StoreAddressError(f"a store cannot lie at {where}; give a folder or s3://BUCKET/PREFIX.")
    return True
