"""Reading committed samples: every byte is checked on its way; reading one field never touches another's objects."""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store import sample_read
from cache_store.concurrency import in_order
from cache_store.difference import differences
from cache_store.errors import FieldNotFoundError, SampleNotFoundError
from cache_store.format import commit_record, index, quarantine_record, store_root
from cache_store.format.commit_record import CommitRecord
from cache_store.format.field import Field
from cache_store.format.quarantine_record import QuarantineRecord
from cache_store.format.sample_ids import SampleIds
from cache_store.format.sample_key import keys, sample_key
from cache_store.sample_read import SampleRead
from cache_store.storage.storage import Storage, open_storage

_KEEPING = threading.Lock()
"""Of all readers, so that a reader can be pickled: records are kept and dropped by any thread."""
_MAX_RECORDS = 4096
"""Kept in memory; a record takes some kilobytes and is read again in well under a millisecond."""


class CacheReader:
    """The samples that were committed when it was opened (or last refreshed). Holds no open file; can be pickled."""

    def __init__(self, path: str | os.PathLike[str], *, expect_identity: Mapping[str, Any] | None = None) -> None:
        """Raises `StoreNotFoundError`, `IdentityMismatchError` (if an identity is expected) or `FormatError`."""
        self._storage: Storage = open_storage(path)
        self.path: Path | str = self._storage.place
        root = store_root.read(self._storage)
        if expect_identity is not None and (lines := differences(expect_identity, root.identity)):
            raise store_root.mismatch(self.path, [f"identity.{line}" for line in lines])
        self.identity: Mapping[str, Any] = root.identity
        self.provenance: Mapping[str, Any] = root.provenance
        self.fields: Mapping[str, Field] = root.fields
        self._root = root
        self._records: dict[str, CommitRecord] = {}
        self._sample_ids = SampleIds.of([])
        self.refresh()

    @property
    def sample_ids(self) -> Sequence[str]:
        """Sorted ids of the committed samples, as of opening or the last `refresh`."""
        return self._sample_ids

    def refresh(self) -> None:
        """See what was committed since, and forget what was removed. Records already known are not read again."""
        found = index.read(self._storage)
        if found is not None and found.is_fresh(self._storage):
            self._sample_ids = found.ids
        else:
            known = self._sample_ids if len(self._sample_ids) or found is None else found.ids
            self._sample_ids = index.list_ids(self._storage, self._root, known)
        self._records = {key: record for key, record in self._records.items() if key in self._sample_ids}

    @property
    def threads(self) -> int:
        """How many samples are worth reading at once for small fields: 1 on a disk, more over a network."""
        return self._storage.threads

    @property
    def quarantined(self) -> dict[str, QuarantineRecord]:
        """Samples that failed and are neither released for another try nor committed, by id; read anew each time."""
        names = keys(self._storage, quarantine_record.FOLDER)
        found = list(in_order(partial(quarantine_record.read, self._storage), names, self.threads))
        return {
            record.sample_id: record
            for record in sorted((item for item in found if item), key=lambda item: item.sample_id)
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
        """The fields that a sample has, in schema order; optional ones may be absent."""
        return tuple(self.record(sample_id).shapes)

    def shape(self, sample_id: str, field: str) -> tuple[int, ...]:
        """Shape of one field of a sample, from its record; of text `()` or `(n,)`."""
        return self.record(sample_id).shapes[self._present(sample_id, [field])[0]]

    def read(
        self,
        sample_id: str,
        fields: Sequence[str] | None = None,
        *,
        out: Mapping[str, NDArray[Any]] | None = None,
        threads: int = 1,
    ) -> dict[str, NDArray[Any]]:
        """The wanted fields (all that the sample has by default), as the arrays of `out` or new ones.

        bfloat16 comes as its uint16 bits, text as numpy strings. Arrays in `out` (of exactly the stored dtype and
        shape, such as views of pinned memory) are filled in place; after an error they hold anything. Raises
        `SampleNotFoundError`, `FieldNotFoundError`, and `CorruptSampleError` if any byte is not what was committed.
        """
        read = self.plan(sample_id, fields, out=out)
        if threads > 1 and len(read.tasks) > 1:
            with ThreadPoolExecutor(threads, "cache-read") as pool:
                for done in [pool.submit(task) for task in read.tasks]:
                    done.result()
        else:
            for task in read.tasks:
                task()
        return read.arrays

    def plan(
        self,
        sample_id: str,
        fields: Sequence[str] | None = None,
        *,
        out: Mapping[str, NDArray[Any]] | None = None,
        unchecked: Sequence[str] = (),
        by_record: bool = False,
    ) -> SampleRead:
        """What `read` does, for callers that run the tasks in threads of their own.

        A caller that can check data faster than a CPU may ask for the data of some fields `unchecked`; what there is
        left to check is in the result. `by_record`: the sample's `zarr.json` documents, which say to other readers what
        the commit record says, are not read.
        """
        return sample_read.plan(
            self._storage, *self._wanted(sample_id, fields), out or {}, unchecked, by_record=by_record
        )

    def buffer_bytes(self, sample_id: str, fields: Sequence[str] | None = None) -> int:
        """Bytes of a flat buffer that `views` can hold these fields in; text takes none."""
        return sample_read.buffer_bytes(*self._wanted(sample_id, fields))

    def views(
        self, sample_id: str, buffer: NDArray[np.uint8], fields: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Arrays for these fields in a caller's flat uint8 buffer, to be given to `read` as `out`."""
        return sample_read.carve(*self._wanted(sample_id, fields), buffer)

    def record(self, sample_id: str) -> CommitRecord:
        """The commit record of a sample, read and checked when it is first asked for."""
        record = self._records.get(sample_id)
        if record is not None:
            return record
        if sample_id in self._sample_ids:
            try:
                record = commit_record.read(
                    self._storage, sample_key(sample_id), fields=self.fields, fingerprint=self._root.fingerprint
                )
            except FileNotFoundError:
                raise SampleNotFoundError(
                    f"sample {sample_id!r} was removed from {self.path} since it was opened; `refresh` forgets it."
                ) from None
            with _KEEPING:
                while len(self._records) >= _MAX_RECORDS:
                    del self._records[next(iter(self._records))]
                self._records[sample_id] = record
            return record
        raise SampleNotFoundError(
            f"sample {sample_id!r} is not among the {len(self)} committed samples of {self.path}; "
            "see `sample_ids`, and `refresh` if it was written after opening."
        )

    def _present(self, sample_id: str, fields: Sequence[str]) -> list[str]:
        if isinstance(fields, str):
            raise ValueError(f"fields is a sequence of names, got the string {fields!r}.")
        for name in fields:
            if name not in self.fields:
                raise FieldNotFoundError(f"the store at {self.path} has no field {name!r}; it has {list(self.fields)}.")
            if name not in self.record(sample_id).shapes:
                raise FieldNotFoundError(f"sample {sample_id!r} of {self.path} was written without field {name!r}.")
        return list(dict.fromkeys(fields))

    def _wanted(
        self, sample_id: str, fields: Sequence[str] | None
    ) -> tuple[CommitRecord, Mapping[str, Field], list[str]]:
        record = self.record(sample_id)
        wanted = list(record.shapes) if fields is None else self._present(sample_id, fields)
        return record, self.fields, wanted
