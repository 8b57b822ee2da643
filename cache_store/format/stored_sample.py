"""A committed sample where it lies: its objects and metadata, read and checked against the commit record.

Format version 1 leaves a writer one choice only, the rows of a chunk; all other metadata is compared as a whole, so
that a hostile or foreign document is refused rather than interpreted.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TypeVar

import numpy as np

from cache_store import rereading
from cache_store.checksum import crc32c
from cache_store.document import canonical_json, parse
from cache_store.errors import CorruptSampleError, FormatError, UnreachableStoreError, UnreadableSampleError
from cache_store.format import compression
from cache_store.format.commit_record import TRAILER_BYTES, CommitRecord, StoredObject
from cache_store.format.field import SMALL, Field, chunk_of_rows
from cache_store.format.names import METADATA
from cache_store.format.sample_group import SMALL_ARRAY, array_metadata, chunk_keys, group_metadata, packed_directory
from cache_store.storage.local_files import unreachable
from cache_store.storage.local_storage import ByteArray, OnBlock
from cache_store.storage.storage import Storage

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredSample:
    """The objects of one sample. A method's `field` is what its errors name: the field or fields that it reads."""

    storage: Storage
    record: CommitRecord
    fields: Mapping[str, Field]
    waits_s: tuple[float, ...] | None = None
    """Pauses before further tries of what cannot be read; None: those of `rereading`."""

    def load(self, stored: StoredObject, field: str) -> ByteArray:
        """Read all bytes of an object, and check presence, size and every byte."""

        def read() -> ByteArray:
            data = self._read(stored, field, np.empty(0, np.uint8), None, False)
            crc = crc32c(data[:-TRAILER_BYTES] if stored.is_chunk else data)
            self._compare(stored, field, _trailer(data) if stored.is_chunk else crc, crc)
            return data

        return self._reread(stored, field, read)

    def load_into(
        self, target: ByteArray, stored: StoredObject, field: str, *, parents_checked: bool, check_data: bool
    ) -> None:
        """Fill `target` with the beginning of an uncompressed chunk, checking every byte of it while it is in cache.

        What lies beyond the target is padding, which is read and checked too. After an error the target holds anything.
        Without `check_data` the caller compares the data with the record's checksum; all else is checked here.
        """

        def fill() -> None:
            crc = 0

            def check(block: memoryview | ByteArray) -> None:
                nonlocal crc
                crc = crc32c(block, crc)

            rest = self._read(stored, field, target, check if check_data else None, parents_checked)
            padding, trailer = rest[:-TRAILER_BYTES], _trailer(rest)
            self._compare(stored, field, trailer, crc32c(padding, crc) if check_data else trailer)
            if not check_data and padding.any():  # the caller does not get it
                raise self.damaged(stored, field, " ends in padding that is not zeros.")

        self._reread(stored, field, fill)

    def check_parents(self, stored: StoredObject, field: str) -> None:
        """Raise unless the folders above an object are there and real, for reads with `parents_checked`."""

        def check() -> None:
            try:
                self.storage.check_parents(f"{self.record.folder}/{stored.path}")
            except (FileNotFoundError, NotADirectoryError) as error:
                raise self.damaged(stored, field, " is missing.") from error
            except FormatError as error:  # a link, or anything else that no store has
                raise self.damaged(stored, field, f": {error}") from error

        self._reread(stored, field, check)

    def decode_into(self, target: ByteArray, stored: StoredObject, field: str, chunk_bytes: int) -> None:
        """Fill `target` with the beginning of a compressed chunk, whose bytes are checked before they are decoded."""
        data = self.load(stored, field)
        try:
            compression.decode_into(target, data[:-TRAILER_BYTES], chunk_bytes)
        except (ValueError, RuntimeError) as error:
            raise self.damaged(stored, field, f" cannot be decoded ({str(error)[:200]}).") from error

    def check_group(self, field: str) -> dict[str, str | list[str]]:
        """Check the group's `zarr.json` and return the text fields in it."""
        where = f"sample {self.record.sample_id!r}: {self.storage.where(f'{self.record.folder}/{METADATA}')}"
        document = parse(self.load(self.record.objects[METADATA], field).tobytes(), where)
        directory, _ = packed_directory(self.record.shapes, self.fields)
        attributes = document.get("attributes")
        text = attributes.get("text") if isinstance(attributes, dict) else None
        expected = group_metadata(self.record.sample_id, directory, text)
        shapes = {name: shape for name, shape in self.record.shapes.items() if self.fields[name].layout == "text"}
        same = canonical_json(document) == canonical_json(expected)
        if not same or not isinstance(text, dict) or text.keys() != shapes.keys():
            raise FormatError(f"{where} is not the metadata of this sample in format 1.")
        for name, shape in shapes.items():
            items = text[name] if shape else [text[name]]
            good = isinstance(items, list) and all(isinstance(item, str) for item in items)
            if not good or (len(items),) != (shape or (1,)):
                raise FormatError(f"{where}: the text of field {name!r} has not the record's shape {list(shape)}.")
        return text

    def check_array(self, array: str, field: str) -> int:
        """Rows per chunk by the array's `zarr.json`, which must be the one expected, as must the recorded chunks."""
        place = self.storage.where(f"{self.record.folder}/{array}/{METADATA}")
        where = f"sample {self.record.sample_id!r}, field {field!r}: {place}"
        stored = self.record.objects.get(f"{array}/{METADATA}")
        if stored is None:
            raise FormatError(f"{where} is not named by the commit record.")
        shapes, fields = self.record.shapes, self.fields
        schema = SMALL_ARRAY if array == SMALL else fields[array]
        shape = (packed_directory(shapes, fields)[1],) if array == SMALL else shapes[array]
        try:
            rows = _rows_by_metadata(self.load(stored, field).tobytes(), schema, shape)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
        if rows < 1:
            what = f"{schema.dtype} array of shape {list(shape)}"
            raise FormatError(f"{where} is not the metadata of a {what} in format 1.")
        self._check_chunks(array, schema, shape, rows, where)
        return rows

    def rows_by_record(self, array: str) -> int:
        """Rows per chunk of an uncompressed field by the recorded sizes, which must fit its shape."""
        place = self.storage.where(f"{self.record.folder}/{array}")
        where = f"sample {self.record.sample_id!r}, field {array!r}: {place}"
        field, shape = self.fields[array], self.record.shapes[array]
        first = next((stored.size for stored in self.record.of_array(array) if stored.is_chunk), TRAILER_BYTES)
        rows = max(1, (first - TRAILER_BYTES) // field.size_bytes(chunk_of_rows(1, shape)))
        self._check_chunks(array, field, shape, rows, where)
        return rows

    def damaged(self, stored: StoredObject, field: str, what: str) -> CorruptSampleError:
        """Error about an object; `what` goes on after its name."""
        sample_id = self.record.sample_id
        return CorruptSampleError(
            f"sample {sample_id!r}, field {field!r}: object {stored.path} of {self.storage.where(self.record.folder)}"
            f"{what} Run `verify` on the store for the whole extent; a sample without its commit record can be written "
            "again.",
            sample_id,
            field,
        )

    def _reread(self, stored: StoredObject, field: str, read: Callable[[], Result]) -> Result:
        """Read an object, again and freshly if that fails. Raises what the last failure says of the sample."""
        try:
            return read()
        except (FormatError, UnreachableStoreError):
            raise
        except OSError as error:
            failed = error
        name, storage = f"{self.record.folder}/{stored.path}", self.storage
        forget = partial(storage.forget, name)
        waits_s = rereading.WAITS_S if self.waits_s is None else self.waits_s
        try:
            if not waits_s:
                raise failed
            time.sleep(waits_s[0])
            forget()
            return rereading.reread(read, forget, waits_s[1:])
        except UnreachableStoreError:
            raise
        except OSError as error:
            if not storage.exists(METADATA):
                gone = isinstance(error, CorruptSampleError)
                raise unreachable(storage.place, FileNotFoundError() if gone else error) from error
            if isinstance(error, CorruptSampleError):
                raise
            sample_id, reason = self.record.sample_id, error.strerror or str(error)
            what = f"sample {sample_id!r}, field {field!r}: {storage.where(name)} cannot be read ({reason})"
            raise UnreadableSampleError(f"{what}. See to the permissions and the disk.", sample_id, field) from error

    def _read(
        self, stored: StoredObject, field: str, target: ByteArray, on_block: OnBlock, parents_checked: bool
    ) -> ByteArray:
        path = f"{self.record.folder}/{stored.path}"
        try:
            rest = self.storage.read_into(path, stored.size, target, on_block, parents_checked=parents_checked)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.damaged(stored, field, " is missing.") from error
        except FormatError as error:  # a link, a FIFO, a directory in its place
            raise self.damaged(stored, field, f": {error}") from error
        if isinstance(rest, int):
            raise self.damaged(stored, field, f" has {rest} bytes, expected {stored.size}.")
        return rest

    def _compare(self, stored: StoredObject, field: str, claimed: int, computed: int) -> None:
        """Raise unless the checksum that an object claims is the record's, and its data have it."""
        if f"{claimed:08x}" != stored.crc32c:
            raise self.damaged(stored, field, f" has CRC-32C {claimed:08x}, its commit record says {stored.crc32c}.")
        if computed != claimed:
            what = f": its data do not match its CRC-32C (stored {stored.crc32c}, computed {computed:08x})."
            raise self.damaged(stored, field, what)

    def _check_chunks(self, array: str, field: Field, shape: tuple[int, ...], rows: int, where: str) -> None:
        size = field.size_bytes(chunk_of_rows(rows, shape)) + TRAILER_BYTES
        objects = [stored for stored in self.record.of_array(array) if stored.is_chunk]
        chunks = {stored.path.rpartition("/")[2]: stored.size for stored in objects}
        good = chunks.keys() == set(islice(chunk_keys(shape, rows), len(chunks) + 1))
        if field.compression == "none":
            good &= set(chunks.values()) <= {size}
        else:
            good &= max(chunks.values(), default=0) <= size + compression.MAX_OVERHEAD_BYTES
        if not good:
            count = math.ceil(shape[0] / rows) * bool(math.prod(shape)) if shape else 1
            expected = f"shape {list(shape)} takes {count} chunks of {size} bytes"
            raise FormatError(f"{where}: {expected}; the record names others.")


def _trailer(data: ByteArray) -> int:
    return int.from_bytes(data[-TRAILER_BYTES:].tobytes(), "little")


@lru_cache(maxsize=1024)
def _rows_by_metadata(data: bytes, field: Field, shape: tuple[int, ...]) -> int:
    """Rows per chunk by a `zarr.json`, which samples of one shape share; 0 unless it is what field and shape allow."""
    document = parse(data, METADATA)
    try:
        rows = document["chunk_grid"]["configuration"]["chunk_shape"][0] if shape else 1
    except (KeyError, TypeError, IndexError):
        return 0
    if type(rows) is not int or rows >= 2**48:
        return 0
    expected = array_metadata(field, shape, chunk_of_rows(rows, shape))
    return rows if canonical_json(document) == canonical_json(expected) else 0
