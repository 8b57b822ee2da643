"""Reading committed samples: every byte is checked on its way; reading one field never touches another's objects."""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from cache_store import sample_read
from cache_store.concurrency import in_order
from cache_store.document import differences
from cache_store.errors import (
    FieldNotFoundError,
    FormatError,
    SampleNotFoundError,
    SampleReadError,
    UnreachableStoreError,
    UnreadableSampleError,
)
from cache_store.format import commit_record, index, quarantine_record, store_root
from cache_store.format.commit_record import CommitRecord
from cache_store.format.field import Field
from cache_store.format.index import SampleIds
from cache_store.format.names import METADATA, QUARANTINE, list_keys, sample_key
from cache_store.format.quarantine_record import QuarantineRecord
from cache_store.format.stored_sample import StoredSample
from cache_store.sample_read import Arrays, Ranges, SampleRead
from cache_store.storage.local_files import unreachable
from cache_store.storage.local_storage import ByteArray
from cache_store.storage.storage import Storage, StorePath, open_storage

_RECORDS_LOCK = threading.Lock()
"""One lock for all readers, so that a reader can be pickled: any thread may keep and drop records."""
_MAX_RECORDS = 4096
"""Records kept in memory; one takes some kilobytes and is read again in well under a millisecond."""


class CacheReader:
    """The samples that were committed when it was opened (or last refreshed). Holds no open file; can be pickled."""

    def __init__(self, path: StorePath, *, expect_identity: Mapping[str, Any] | None = None) -> None:
        """Open the store at a path or `s3://` URI.

        Raises `StoreNotFoundError`, `UnreachableStoreError`, `IdentityMismatchError` (if an identity is expected) or
        `FormatError`. Damaged records cost their samples alone: see `unreadable`.
        """
        self._storage: Storage = open_storage(path)
        self.path = self._storage.place
        self.threads = self._storage.threads
        """Number of samples worth reading at once for small fields: 1 on a disk, more over a network."""
        self._root = store_root.read(self._storage)
        self.identity: Mapping[str, Any] = self._root.identity
        self.provenance: Mapping[str, Any] = self._root.provenance
        self.fields: Mapping[str, Field] = self._root.fields
        if expect_identity is not None and (lines := differences(expect_identity, self.identity)):
            raise store_root.mismatch(self.path, [f"identity.{line}" for line in lines])
        self.unreadable: tuple[SampleReadError, ...] = ()
        """Faults of commit records that could not be read at opening or the last `refresh`, `sample_id` empty
        where it is not known. Other samples are none the worse; one whose id is known is listed, and raises this error
        when it is read."""
        self._records: dict[str, CommitRecord] = {}
        self._sample_ids = SampleIds.of([])
        self.refresh()

    @property
    def sample_ids(self) -> Sequence[str]:
        """Sorted ids of the committed samples, as of opening or the last `refresh`."""
        return self._sample_ids

    def refresh(self) -> None:
        """See what was committed since, and forget what was removed. Records already known are not read again."""
        stored = index.read(self._storage)
        if stored is not None and stored.is_fresh(self._storage):
            self._sample_ids, self.unreadable = stored.ids, ()
        else:
            known = self._sample_ids if len(self._sample_ids) or stored is None else stored.ids
            self._sample_ids, self.unreadable = index.list_ids(self._storage, self._root, known)
        self._records = {key: record for key, record in self._records.items() if key in self._sample_ids}

    @property
    def quarantined(self) -> dict[str, QuarantineRecord]:
        """Samples that failed and are neither released for another try nor committed, by id; read anew each time.

        Records that cannot be read are left out, with a warning.
        """
        keys = list_keys(self._storage, QUARANTINE)
        records = in_order(partial(quarantine_record.read_if_sound, self._storage), keys, self.threads)
        return {
            record.sample_id: record
            for record in sorted(filter(None, records), key=lambda record: record.sample_id)
            if not record.released and record.sample_id not in self
        }

    def __len__(self) -> int:
        return len(self._sample_ids)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._sample_ids

    def size_bytes(self, sample_id: str) -> int:
        """Bytes of all objects of a sample, from its record."""
        return self.record(sample_id).size_bytes

    def fields_of(self, sample_id: str) -> tuple[str, ...]:
        """Fields that a sample has, in schema order; optional ones may be absent."""
        return tuple(self.record(sample_id).shapes)

    def shape(self, sample_id: str, field: str) -> tuple[int, ...]:
        """Shape of one field of a sample, from its record; `()` or `(n,)` for text."""
        sample, (name,) = self._select(sample_id, [field])
        return sample.record.shapes[name]

    def read(
        self,
        sample_id: str,
        fields: Sequence[str] | None = None,
        *,
        out: Arrays | None = None,
        threads: int = 1,
        ranges: Ranges | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Read the wanted fields (by default all that the sample has) into the arrays of `out` or new ones.

        Of a field of layout `array`, `ranges` may ask for parts of axis 0: `{"kv": [(0, 2), (5, 6)]}` gives layers
        0, 1 and 5, with the same bits, and chunks without any of them are not touched.

        bfloat16 comes as its uint16 bits, text as numpy strings. Arrays in `out` (of exactly the stored dtype and
        shape, such as views of pinned memory) are filled in place; after an error they hold anything. Raises
        `SampleNotFoundError` or `FieldNotFoundError`. What cannot be read is tried again, freshly; then it raises
        `CorruptSampleError` where a byte is not what was committed, `UnreadableSampleError` where it is not given out,
        or `UnreachableStoreError`.
        """
        read = self.plan(sample_id, fields, out=out, ranges=ranges)
        for _ in in_order(lambda task: task(), read.tasks, min(threads, len(read.tasks))):
            pass
        return read.arrays

    def plan(
        self,
        sample_id: str,
        fields: Sequence[str] | None = None,
        *,
        out: Arrays | None = None,
        unchecked: Sequence[str] = (),
        by_record: bool = False,
        ranges: Ranges | None = None,
    ) -> SampleRead:
        """Do what `read` does, but leave the tasks to a caller with threads of its own.

        A caller that can check data faster than a CPU may ask for the data of some fields `unchecked`; the result
        says what is left to check. `by_record` skips the `zarr.json` documents, which repeat the commit record.
        """
        selected = self._select(sample_id, fields)
        return sample_read.plan(*selected, out or {}, unchecked, by_record=by_record, ranges=ranges)

    def buffer_bytes(self, sample_id: str, fields: Sequence[str] | None = None, *, ranges: Ranges | None = None) -> int:
        """Bytes of a flat buffer that `views` can hold these fields in; text takes none."""
        return sample_read.buffer_bytes(*self._select(sample_id, fields), ranges)

    def views(
        self,
        sample_id: str,
        buffer: ByteArray,
        fields: Sequence[str] | None = None,
        *,
        ranges: Ranges | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Arrays for these fields in a caller's flat uint8 buffer, to be given to `read` as `out`."""
        return sample_read.carve(*self._select(sample_id, fields), buffer, ranges)

    def record(self, sample_id: str) -> CommitRecord:
        """The commit record of a sample, read and checked when it is first asked for."""
        if record := self._records.get(sample_id):
            return record
        if sample_id not in self._sample_ids:
            where = f"the {len(self)} committed samples of {self.path}"
            remedy = "see `sample_ids`, and `refresh` if it was written after opening"
            raise SampleNotFoundError(f"sample {sample_id!r} is not among {where}; {remedy}.")
        key = sample_key(sample_id)
        known_bad = any(error.sample_id == sample_id for error in self.unreadable)
        try:
            record = commit_record.read(self._storage, self._root, key, waits_s=() if known_bad else None)
        except UnreachableStoreError:
            raise
        except FileNotFoundError as error:
            if not self._storage.exists(METADATA):
                raise unreachable(self.path, error) from error
            gone = f"sample {sample_id!r} was removed from {self.path} since it was opened; `refresh` forgets it."
            raise UnreadableSampleError(gone, sample_id) from None
        except (FormatError, OSError) as error:
            raise commit_record.unreadable(self._storage, key, error, sample_id) from error
        with _RECORDS_LOCK:
            while len(self._records) >= _MAX_RECORDS:
                del self._records[next(iter(self._records))]
            self._records[sample_id] = record
        return record

    def _select(self, sample_id: str, fields: Sequence[str] | None) -> tuple[StoredSample, list[str]]:
        """The sample, and the names of the wanted fields, all of which it has."""
        record = self.record(sample_id)
        if isinstance(fields, str):
            raise ValueError(f"fields is a sequence of names, got the string {fields!r}.")
        names = list(record.shapes if fields is None else dict.fromkeys(fields))
        for name in names:
            if name not in self.fields:
                raise FieldNotFoundError(f"the store at {self.path} has no field {name!r}; it has {list(self.fields)}.")
            if name not in record.shapes:
                raise FieldNotFoundError(f"sample {sample_id!r} of {self.path} was written without field {name!r}.")
        return StoredSample(self._storage, record, self.fields), names
