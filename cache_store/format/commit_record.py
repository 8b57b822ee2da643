"""The commit record: the one small file whose appearance makes a sample visible. It names all that belongs to it.

The record's checksum of a chunk leaves out the chunk's own four-byte trailer: the CRC-32C of data plus its CRC is the
same constant for all data, so it could not tell one valid chunk from another. This way it *is* the trailer, and a
chunk that was swapped for another valid one is noticed.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

from cache_store.document import MAX_DOCUMENT_BYTES, check_seal, parse, seal, take
from cache_store.errors import (
    CacheStoreError,
    CorruptSampleError,
    FormatError,
    SampleReadError,
    UnreachableStoreError,
    UnreadableSampleError,
)
from cache_store.format.field import Field
from cache_store.format.names import (
    COMMITS,
    METADATA,
    SAMPLES,
    check_key,
    is_attempt,
    key_of_attempt,
    record_path,
    sample_key,
)
from cache_store.format.store_root import StoreRoot
from cache_store.rereading import reread
from cache_store.storage.storage import Storage

TRAILER_BYTES = 4
_MAX_LENGTH = 2**48
_PATH = re.compile(r"(?:(?P<array>[A-Za-z][A-Za-z0-9_.-]{0,99})/)?(?:zarr\.json|(?P<chunk>c(?:\.\d{1,9}){0,32}))")
_ID = re.compile(rb'"sample_id":("(?:[^"\\]|\\.)*")')
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


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """Contents of one committed sample."""

    sample_id: str
    attempt: str
    """Random name of the writer's attempt; its data lie in `samples/<key>.<attempt>/`."""
    fingerprint: str
    """Settings fingerprint of the store's root when this was written."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each field that the sample has, in schema order; `()` or `(n,)` for text."""
    objects: Mapping[str, StoredObject]
    """Every object of the sample, by its path."""

    @cached_property
    def folder(self) -> str:
        """The sample's Zarr group, relative to the root."""
        return f"{SAMPLES}/{sample_key(self.sample_id)}.{self.attempt}"

    @property
    def size_bytes(self) -> int:
        return sum(stored.size for stored in self.objects.values())

    def of_array(self, array: str) -> list[StoredObject]:
        """Objects of one Zarr array of the sample."""
        return [stored for stored in self.objects.values() if stored.array == array]

    def to_bytes(self) -> bytes:
        document = {
            "sample_id": self.sample_id,
            "attempt": self.attempt,
            "fingerprint": self.fingerprint,
            "fields": [{"name": name, "shape": list(shape)} for name, shape in self.shapes.items()],
            "objects": [asdict(stored) for stored in self.objects.values()],
        }
        return seal(document, f"the commit record of sample {self.sample_id!r}")


def read(storage: Storage, root: StoreRoot, key: str, *, waits_s: Sequence[float] | None = None) -> CommitRecord:
    """Read the record with this key, again after each pause while that fails (see `reread`).

    Raises `FileNotFoundError` when there is none, `FormatError` or another `OSError`.
    """
    name = record_path(COMMITS, key)

    def read_record() -> CommitRecord:
        return from_bytes(storage, root, key, storage.read_document(name, MAX_DOCUMENT_BYTES))

    return reread(read_record, partial(storage.forget, name), waits_s)


def unreadable(storage: Storage, key: str, error: Exception, sample_id: str) -> SampleReadError:
    """Describe a damaged record's sample; where its id is unknown, it is empty in the result."""
    which = f"sample {sample_id!r}" if sample_id else "a sample whose id is not known"
    if isinstance(error, FormatError):
        remedy = "Run `verify` on the store; a sample without its commit record can be written again"
        return CorruptSampleError(f"{which}: {error} {remedy}.", sample_id)
    where = storage.where(record_path(COMMITS, key))
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    remedy = "See to the permissions and the disk"
    return UnreadableSampleError(f"{which}: commit record {where} cannot be read ({reason}). {remedy}.", sample_id)


def find_id(storage: Storage, key: str, attempts: Iterable[str]) -> str:
    """The id of a sample whose record cannot be read, or an empty text.

    Looks in what is left of the record, and in the attempts at the sample (`attempts` are names in `samples/`). What it
    finds is certain, as the key holds a hash of the id.
    """
    groups = [f"{SAMPLES}/{name}/{METADATA}" for name in attempts if key_of_attempt(name) == key]
    for name in (record_path(COMMITS, key), *groups):
        try:
            for match in _ID.finditer(storage.read_document(name, MAX_DOCUMENT_BYTES)):
                if sample_key(sample_id := json.loads(match[1])) == key:
                    return str(sample_id)
        except UnreachableStoreError:
            raise
        except (OSError, ValueError):  # a `FormatError` is a `ValueError`
            continue
    return ""


def from_bytes(storage: Storage, root: StoreRoot, key: str, data: bytes) -> CommitRecord:
    """The record from untrusted bytes: sealed, of this key, these settings and this schema, with harmless paths."""
    where = f"commit record {storage.where(record_path(COMMITS, key))}"
    check_seal(data, where)
    document = parse(data, where)
    sample_id = take(document, "sample_id", str, where)
    check_key(sample_id, key, where)
    where = f"{where} (sample {sample_id!r})"
    attempt = take(document, "attempt", str, where)
    if not is_attempt(attempt):
        raise FormatError(f"{where}: {attempt!r} is not an attempt's name (16 hex digits).")
    fingerprint = take(document, "fingerprint", str, where)
    if fingerprint != root.fingerprint:
        other = f"settings {fingerprint[:64]!r}, the store has {root.fingerprint!r}"
        raise FormatError(f"{where} was written under {other}; it was copied in from another store.")
    listed = [StoredObject.from_json(item, where) for item in take(document, "objects", list, where)]
    objects = {stored.path: stored for stored in listed}
    if len(objects) != len(listed) or METADATA not in objects:
        raise FormatError(f"{where} names an object twice, or not the group's {METADATA}.")
    shapes = _shapes(take(document, "fields", list, where), root.fields, where)
    return CommitRecord(sample_id=sample_id, attempt=attempt, fingerprint=fingerprint, shapes=shapes, objects=objects)


def check_kept(storage: Storage, record: CommitRecord) -> None:
    """Withdraw a record that was just published, if a garbage collector took the attempt for a killed writer's."""
    if not storage.exists(f"{record.folder}/{METADATA}"):
        storage.delete([record_path(COMMITS, sample_key(record.sample_id))])
        problem = f"its attempt {storage.where(record.folder)} was collected as garbage"
        remedy = "Collect with an age limit above what any attempt or copy takes, and run the same command again."
        raise CacheStoreError(f"sample {record.sample_id!r} was not written: {problem}. {remedy}")


def _shapes(items: list[Any], fields: Mapping[str, Field], where: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for item in items:
        if not isinstance(item, dict) or item.keys() != {"name", "shape"}:
            raise FormatError(f"{where}: a field of a record has exactly the keys name and shape.")
        name, shape = item["name"], item["shape"]
        field = fields.get(name) if isinstance(name, str) else None
        if field is None or name in shapes:
            raise FormatError(f"{where} names field {name!r}, which the store's schema lacks or the record repeats.")
        good = isinstance(shape, list) and all(type(length) is int and 0 <= length < _MAX_LENGTH for length in shape)
        if not good or len(shape) != len(field.axes) or math.prod(shape) >= _MAX_LENGTH:
            raise FormatError(f"{where}: {shape!r} is not a shape of field {name!r} with axes {list(field.axes)}.")
        shapes[name] = tuple(shape)
    absent = [name for name, field in fields.items() if field.required and name not in shapes]
    if absent:
        raise FormatError(f"{where} lacks the required fields {', '.join(absent)}.")
    return shapes
