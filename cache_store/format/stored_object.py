"""A stored object: one immutable file of a sample, as its commit record names it, and its checked bytes.

The record's checksum of a chunk leaves out the chunk's own four-byte trailer: the CRC-32C of data plus its CRC is the
same constant for all data, so it could not tell one valid chunk from another. This way it *is* the trailer, and a
chunk that was swapped for another valid one is found out.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store import checksum
from cache_store.errors import CorruptSampleError, FormatError
from cache_store.storage.storage import Storage

TRAILER_BYTES = 4
BLOCK_BYTES = 2**20
"""Read and checked at a time: still in the second-level cache, and few enough that eight threads do not queue for
Python's interpreter lock (256 KiB reads half as fast there)."""
_PATH = re.compile(r"(?:(?P<array>[A-Za-z][A-Za-z0-9_.-]{0,99})/)?(?:zarr\.json|(?P<chunk>c(?:\.\d{1,9}){0,32}))")
_CRC = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Relative path in the sample's group, size in bytes and CRC-32C (of a chunk: without its trailer)."""

    path: str
    size: int
    crc32c: str

    @property
    def array(self) -> str:
        """Name of the Zarr array it belongs to; empty for the group's own metadata."""
        return self.path.rpartition("/")[0]

    @property
    def is_chunk(self) -> bool:
        return not self.path.endswith("zarr.json")

    def load(self, storage: Storage, folder: str, *, sample_id: str, field: str) -> NDArray[np.uint8]:
        """All bytes, after checking presence, size and the record's checksum.

        Of a chunk only the trailer is compared; whoever decodes the chunk compares the trailer with the data.
        """
        try:
            data = storage.read_exactly(f"{folder}/{self.path}", self.size)
        except (FileNotFoundError, NotADirectoryError) as error:
            what = self._what(storage, folder, sample_id, field)
            raise CorruptSampleError(f"{what} is missing. {MEND}", sample_id, field) from error
        if isinstance(data, int):
            what = self._what(storage, folder, sample_id, field)
            raise CorruptSampleError(f"{what} has {data} bytes, expected {self.size}. {MEND}", sample_id, field)
        crc = int.from_bytes(data[-TRAILER_BYTES:].tobytes(), "little") if self.is_chunk else checksum.value(data)
        self._compare(crc, storage, folder, sample_id, field)
        return data

    def matches(self, data: NDArray[np.uint8]) -> bool:
        """Whether what `load` gave is what was committed, the data of a chunk included."""
        return not self.is_chunk or f"{checksum.value(data[:-TRAILER_BYTES]):08x}" == self.crc32c

    def load_into(
        self,
        target: NDArray[np.uint8],
        storage: Storage,
        folder: str,
        *,
        sample_id: str,
        field: str,
        parents_checked: bool = False,
        check_data: bool = True,
    ) -> None:
        """Fill `target` with the beginning of an uncompressed chunk, checking every byte of it while it is in cache.

        What lies beyond the target is padding, read and checked too. After an error the target holds anything.
        Without `check_data` the caller compares the bytes with the record's checksum; size, trailer and padding, which
        is zeros, are still checked.
        """
        crc = 0 if check_data else int(self.crc32c, 16)
        trailer = np.empty(TRAILER_BYTES, np.uint8)
        extenders = [checksum.extender(target)]
        padding = np.empty(0, np.uint8)

        def buffers() -> list[NDArray[np.uint8]]:
            nonlocal padding
            beyond = self.size - TRAILER_BYTES - len(target)
            if not beyond:
                return [target, trailer]
            padding = np.empty(beyond, np.uint8)
            extenders.append(checksum.extender(padding))
            return [target, padding, trailer]

        def check(number: int, start: int, end: int) -> None:
            nonlocal crc
            if number < len(extenders):  # the trailer is not part of what it checks
                crc = extenders[number](crc, start, end)

        try:
            found = storage.read_into(
                f"{folder}/{self.path}",
                self.size,
                buffers,
                block_bytes=BLOCK_BYTES if check_data else self.size,
                on_block=check if check_data else None,
                parents_checked=parents_checked,
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            what = self._what(storage, folder, sample_id, field)
            raise CorruptSampleError(f"{what} is missing. {MEND}", sample_id, field) from error
        stored = int.from_bytes(trailer.tobytes(), "little")
        padded = not check_data and bool(padding.any())  # which the caller does not get
        if found == self.size and stored == crc == int(self.crc32c, 16) and not padded:
            return
        what = self._what(storage, folder, sample_id, field)
        if found != self.size:
            raise CorruptSampleError(f"{what} has {found} bytes, expected {self.size}. {MEND}", sample_id, field)
        self._compare(stored, storage, folder, sample_id, field)
        if padded:
            raise CorruptSampleError(f"{what} ends in padding that is not zeros. {MEND}", sample_id, field)
        if f"{crc:08x}" != self.crc32c:
            raise CorruptSampleError(
                f"{what}: its data do not match its CRC-32C (stored {self.crc32c}, computed {crc:08x}). {MEND}",
                sample_id,
                field,
            )

    def _what(self, storage: Storage, folder: str, sample_id: str, field: str) -> str:
        return f"sample {sample_id!r}, field {field!r}: object {self.path} of {storage.where(folder)}"

    def _compare(self, crc: int, storage: Storage, folder: str, sample_id: str, field: str) -> None:
        if f"{crc:08x}" != self.crc32c:
            what = self._what(storage, folder, sample_id, field)
            raise CorruptSampleError(
                f"{what} has CRC-32C {crc:08x}, its commit record says {self.crc32c}. {MEND}", sample_id, field
            )

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "crc32c": self.crc32c}

    @classmethod
    def from_json(cls, document: Any, where: str) -> "StoredObject":
        """From an untrusted record; a path can only be a document or a chunk of one of the group's own arrays."""
        if not isinstance(document, dict) or document.keys() != {"path", "size", "crc32c"}:
            raise FormatError(f"{where}: an object has exactly the keys path, size and crc32c.")
        path, size, crc32c = document["path"], document["size"], document["crc32c"]
        match = _PATH.fullmatch(path) if isinstance(path, str) else None
        if match is None or (match["chunk"] and not match["array"]):
            raise FormatError(f"{where}: {path!r} is not the path of an object of a sample; it is refused.")
        if type(size) is not int or size < (TRAILER_BYTES if match["chunk"] else 2):
            raise FormatError(f"{where}: {size!r} is not a size of object {path}.")
        if not isinstance(crc32c, str) or not _CRC.fullmatch(crc32c):
            raise FormatError(f"{where}: {crc32c!r} is not the CRC-32C of object {path}, eight lower-case hex digits.")
        return cls(path=path, size=size, crc32c=crc32c)


MEND = "Run `verify` on the store for the whole extent; a sample without its commit record can be written again."
"""The next step that every message about damage ends with."""
