"""Reading committed samples: every byte is checked on its way; reading one field never touches another's objects."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store import commit_record, local_files, quarantine_record, sample_read, store_root
from cache_store.commit_record import CommitRecord
from cache_store.difference import differences
from cache_store.errors import FieldNotFoundError, SampleNotFoundError
from cache_store.field import Field
from cache_store.quarantine_record import QuarantineRecord
from cache_store.sample_key import is_key
from cache_store.sample_read import SampleRead


class CacheReader:
    """The samples that were committed when it was opened (or last refreshed). Holds no open file; can be pickled."""

    def __init__(self, path: str | os.PathLike[str], *, expect_identity: Mapping[str, Any] | None = None) -> None:
        """Raises `StoreNotFoundError`, `IdentityMismatchError` (if an identity is expected) or `FormatError`."""
        self.path: Path = store_root.resolve(path)
        root = store_root.read(self.path)
        if expect_identity is not None and (lines := differences(expect_identity, root.identity)):
            raise store_root.mismatch(self.path, [f"identity.{line}" for line in lines])
        self.identity: Mapping[str, Any] = root.identity
        self.provenance: Mapping[str, Any] = root.provenance
        self.fields: Mapping[str, Field] = root.fields
        self._fingerprint = root.fingerprint
        self._records: dict[str, CommitRecord] = {}
        self._sample_ids: tuple[str, ...] = ()
        self.refresh()

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Sorted ids of the committed samples, as of opening or the last `refresh`."""
        return self._sample_ids

    def refresh(self) -> None:
        """See what was committed since, and forget what was removed. Records already known are not read again."""
        known = {Path(record.folder).name.rpartition(".")[0]: record for record in self._records.values()}
        records = {}
        for key in keys(self.path, commit_record.FOLDER):
            try:
                record = known.get(key) or commit_record.read(
                    self.path, key, fields=self.fields, fingerprint=self._fingerprint
                )
            except FileNotFoundError:  # removed since the folder was listed
                continue
            records[record.sample_id] = record
        self._records = records
        self._sample_ids = tuple(sorted(records))

    @property
    def quarantined(self) -> dict[str, QuarantineRecord]:
        """Samples that failed and are neither released for another try nor committed, by id; read anew each time."""
        found = (quarantine_record.read(self.path, key) for key in keys(self.path, quarantine_record.FOLDER))
        return {
            record.sample_id: record
            for record in sorted((item for item in found if item), key=lambda item: item.sample_id)
            if not record.released and record.sample_id not in self._records
        }

    def __len__(self) -> int:
        return len(self._sample_ids)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._records

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
    ) -> SampleRead:
        """What `read` does, for callers that run the tasks in threads of their own."""
        return sample_read.plan(self.path, *self._wanted(sample_id, fields), out or {})

    def buffer_bytes(self, sample_id: str, fields: Sequence[str] | None = None) -> int:
        """Bytes of a flat buffer that `views` can hold these fields in; text takes none."""
        return sample_read.buffer_bytes(*self._wanted(sample_id, fields))

    def views(
        self, sample_id: str, buffer: NDArray[np.uint8], fields: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Arrays for these fields in a caller's flat uint8 buffer, to be given to `read` as `out`."""
        return sample_read.carve(*self._wanted(sample_id, fields), buffer)

    def record(self, sample_id: str) -> CommitRecord:
        """The commit record of a sample."""
        try:
            return self._records[sample_id]
        except KeyError:
            raise SampleNotFoundError(
                f"sample {sample_id!r} is not among the {len(self)} committed samples of {self.path}; "
                "see `sample_ids`, and `refresh` if it was written after opening."
            ) from None

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


def keys(root: Path, folder: str) -> list[str]:
    """The keys that have a record in this folder of a store; other names are no records."""
    found = (name.removesuffix(".json") for name in local_files.names(root, folder) if name.endswith(".json"))
    return sorted(key for key in found if is_key(key))
