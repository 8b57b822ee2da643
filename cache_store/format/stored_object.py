"""A stored object: one immutable file of a sample, as its commit record names it.

The record's checksum of a chunk leaves out the chunk's own four-byte trailer: the CRC-32C of data plus its CRC is the
same constant for all data, so it could not tell one valid chunk from another. This way it *is* the trailer, and a
chunk that was swapped for another valid one is noticed.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

from cache_store.errors import FormatError
from cache_store.format.names import METADATA

TRAILER_BYTES = 4
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
        return not self.path.endswith(METADATA)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

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
