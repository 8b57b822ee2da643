"""Writing samples: each is wholly visible or absent, whatever kills the writer and however many others write.

Order is everything: data objects and their folders are on the medium before the commit record appears, and the record
appears by a hard link, which exactly one of several racing writers gets.
"""

import errno
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cache_store import commit_record, local_files, quarantine_record, sample_group, store_root
from cache_store.commit_record import CommitRecord
from cache_store.errors import CacheStoreError, StoreFullError
from cache_store.field import Field
from cache_store.quarantine_record import QuarantineRecord
from cache_store.sample_group import SampleGroup
from cache_store.sample_key import keys, sample_key
from cache_store.store_root import StoreRoot

_log = logging.getLogger(__name__)
_FULL = {errno.ENOSPC, errno.EDQUOT}


def committed_keys(path: str | os.PathLike[str]) -> frozenset[str]:
    """Keys (`sample_key`) of the samples that a store holds by now, by one listing; none where there is no store."""
    root = store_root.resolve(path)
    return frozenset(keys(root, commit_record.FOLDER)) if (root / commit_record.FOLDER).is_dir() else frozenset()


class CacheWriter:
    """Adds samples to a store, creating it if absent. Safe with other writers, in threads or on other machines."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fields: Sequence[Field],
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises `IdentityMismatchError` if the store exists with another identity or schema."""
        self.path: Path = store_root.resolve(path)
        given = StoreRoot(fields=store_root.by_name(fields), identity=identity, provenance=provenance or {})
        with self._room_for(0, "the store's metadata"):
            root, warnings = store_root.open_or_create(self.path, given)
        for line in warnings:
            _log.warning("store %s was begun with other versions or hardware: %s", self.path, line)
        self.fields: Mapping[str, Field] = root.fields
        self._fingerprint = root.fingerprint
        self._closed = False

    def is_committed(self, sample_id: str) -> bool:
        """Whether the sample is in the store, whoever wrote it."""
        return local_files.exists(self._commit_path(sample_key(sample_id)))

    def write(self, sample_id: str, values: Mapping[str, sample_group.Value]) -> bool:
        """Commit one sample; `True` if this call did, `False` if it was already there or another writer won.

        When this returns the sample is on the medium. Raises `ValueError` before anything is written if values do not
        fit the schema, `StoreFullError` if there is no room.
        """
        self._check_open()
        key = sample_key(sample_id)
        group = sample_group.encode(sample_id, sample_group.check_values(sample_id, values, self.fields), self.fields)
        record = CommitRecord(
            sample_id=sample_id,
            attempt=secrets.token_hex(8),
            fingerprint=self._fingerprint,
            shapes=group.shapes,
            objects={stored.path: stored for stored in group.objects},
        )
        published = record.to_bytes()
        if self.is_committed(sample_id):
            return False
        with self._room_for(group.size_bytes + len(published), f"sample {sample_id!r}"):
            self._write_attempt(record.folder, group)
            won = self._publish(record, published)
        if won:
            self._check_kept(record)
            local_files.remove_file(self._quarantine_path(key))
        else:
            local_files.remove_tree(self.path / record.folder)
        return won

    def quarantine(self, sample_id: str, kind: str, reason: str, traceback_text: str) -> None:
        """Note that a sample could not be made, and why; a sample that is committed after all stays readable."""
        self._check_open()
        key = sample_key(sample_id)
        before = quarantine_record.read(self.path, key)
        record = QuarantineRecord.of_failure(
            sample_id,
            kind=kind,
            reason=reason,
            traceback_text=traceback_text,
            attempts=1 + (before.attempts if before else 0),
        )
        self._put_quarantine(key, record)

    def is_quarantined(self, sample_id: str) -> bool:
        """Whether the sample failed before and was not released for another try (nor committed since)."""
        return self.quarantine_of(sample_id) is not None

    def quarantine_of(self, sample_id: str) -> QuarantineRecord | None:
        """Why the sample failed, if it is quarantined."""
        record = quarantine_record.read(self.path, sample_key(sample_id))
        return None if record is None or record.released or self.is_committed(sample_id) else record

    def release(self, sample_id: str) -> None:
        """Allow another try of a quarantined sample; its count of attempts goes on. Others are left as they are."""
        self._check_open()
        key = sample_key(sample_id)
        record = quarantine_record.read(self.path, key)
        if record is not None and not record.released:
            self._put_quarantine(key, replace(record, released=True))

    def close(self) -> None:
        """End writing; everything written is already on the medium."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_attempt(self, relative: str, group: SampleGroup) -> None:
        folder = self.path / relative
        local_files.make_folder(folder)
        try:
            arrays = {stored.array: folder / stored.array for stored in group.objects if stored.array}
            for path in arrays.values():
                local_files.make_folder(path)
            paths = (folder / stored.path for stored in group.objects)
            local_files.write_new(*zip(paths, group.contents, strict=True))
            for path in (*arrays.values(), folder, folder.parent):
                local_files.sync_folder(path)
        except BaseException:
            local_files.remove_tree(folder)  # nothing refers to it yet; a full disk needs the room
            raise

    def _publish(self, record: CommitRecord, data: bytes) -> bool:
        target = self._commit_path(sample_key(record.sample_id))
        try:
            return local_files.put_if_absent(self.path / store_root.STAGING, target, data)
        except OSError as error:
            if error.errno in _FULL and not local_files.exists(target):
                local_files.remove_tree(self.path / record.folder)  # surely not published, and the disk needs the room
            raise

    def _check_kept(self, record: CommitRecord) -> None:
        """Withdraw the record if a garbage collector took the attempt for a killed writer's."""
        if not local_files.exists(self.path / record.folder):
            target = self._commit_path(sample_key(record.sample_id))
            local_files.remove_file(target)
            local_files.sync_folder(target.parent)
            raise CacheStoreError(
                f"sample {record.sample_id!r} was not written: its attempt {self.path / record.folder} was collected "
                "as garbage. Collect with an age limit above the time that any attempt takes, and write it again."
            )

    def _put_quarantine(self, key: str, record: QuarantineRecord) -> None:
        data = record.to_bytes()
        with self._room_for(len(data), f"the quarantine record of sample {record.sample_id!r}"):
            local_files.replace(self.path / store_root.STAGING, self._quarantine_path(key), data)

    @contextmanager
    def _room_for(self, needed_bytes: int, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            reason = "the disk is full" if error.errno == errno.ENOSPC else "the quota is used up"
            raise StoreFullError(
                f"cannot write {what} to {self.path}: {reason} ({_free(self.path)}); it needs {needed_bytes:,} bytes. "
                "All committed samples are intact; make room and run the same command again, it goes on from here.",
                needed_bytes,
                error.errno,
            ) from error

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed; open a new one.")

    def _commit_path(self, key: str) -> Path:
        return self.path / commit_record.FOLDER / f"{key}.json"

    def _quarantine_path(self, key: str) -> Path:
        return self.path / quarantine_record.FOLDER / f"{key}.json"


def _free(path: Path) -> str:
    try:
        return f"{local_files.free_bytes(path):,} bytes free"
    except OSError:
        return "free space unknown"
