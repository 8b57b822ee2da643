"""A read-only Zarr store over the objects of one committed sample, so that zarr never sees an unchecked byte.

Zarr's own local store answers a missing chunk with silent zeros; this one serves exactly the objects that the commit
record names and raises for anything else that looks like a chunk. Imported only when something is read with zarr.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype

from cache_store.errors import CacheStoreError, CorruptSampleError
from cache_store.format import compression
from cache_store.format.commit_record import CommitRecord
from cache_store.format.stored_object import MEND
from cache_store.storage.storage import Storage


class SampleObjects(Store):  # type: ignore[misc]  # zarr's types are not followed
    """Objects of one sample for reading one field of it; errors name both."""

    supports_writes = False
    supports_deletes = False
    supports_partial_writes = False
    supports_listing = False

    def __init__(self, storage: Storage, record: CommitRecord, field: str) -> None:
        super().__init__(read_only=True)
        self._storage = storage
        self._record = record
        self._field = field
        self.decoded_bytes: int | None = None
        """What a compressed chunk must decode to; one that claims another size is refused undecoded."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        stored = self._record.objects.get(key)
        if stored is None:
            if key.endswith(("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")):
                return None  # zarr looking for other kinds of metadata
            raise CorruptSampleError(
                f"sample {self._record.sample_id!r}, field {self._field!r}: zarr asks for {key}, which the commit "
                f"record does not name. {MEND}",
                self._record.sample_id,
                self._field,
            )
        if byte_range is not None:
            raise NotImplementedError(f"the arrays of a store are unsharded; a part of {key} was asked for.")
        data = await asyncio.to_thread(
            stored.load, self._storage, self._record.folder, sample_id=self._record.sample_id, field=self._field
        )
        if stored.is_chunk and self.decoded_bytes is not None:
            compression.check_header(data, self.decoded_bytes, self._record.sample_id, self._field)
        return prototype.buffer.from_array_like(data)

    async def exists(self, key: str) -> bool:
        return key in self._record.objects

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> list[Any]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def set(self, key: str, value: Any) -> None:
        raise NotImplementedError("samples are immutable")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("samples are immutable")

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError("the commit record lists the objects")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("the commit record lists the objects")

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("the commit record lists the objects")


def read_array(storage: Storage, record: CommitRecord, array: str, field: str, out: NDArray[Any]) -> None:
    """Fill `out` with one whole array of a sample, decoded and checksum-tested by zarr."""
    objects = SampleObjects(storage, record, field)
    opened = zarr.open_array(objects, path=array, mode="r", zarr_format=3)
    if opened.compressors[:-1]:  # the last one is crc32c
        objects.decoded_bytes = math.prod(opened.chunks) * out.itemsize
    try:
        opened.get_basic_selection(..., out=default_buffer_prototype().nd_buffer.from_numpy_array(out))
    except CacheStoreError:
        raise
    except (ValueError, RuntimeError) as error:  # zarr's crc32c codec, or the decompressor
        place = storage.where(f"{record.folder}/{array}")
        raise CorruptSampleError(
            f"sample {record.sample_id!r}, field {field!r}: a chunk of {place} does not match its CRC-32C or "
            f"cannot be decoded ({str(error)[:200]}). {MEND}",
            record.sample_id,
            field,
        ) from error
