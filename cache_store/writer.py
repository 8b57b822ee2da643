"""Writing samples: each is wholly visible or absent, whatever kills the writer and however many others write.

Order is everything: data objects and their folders are on the medium before the commit record appears, and the record
appears by a hard link or a conditional put, which exactly one of several racing writers gets.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from cache_store.document import canonical_copy
from cache_store.errors import StoreNotFoundError
from cache_store.format import commit_record, quarantine_record, sample_group, store_root
from cache_store.format.commit_record import CommitRecord
from cache_store.format.field import Field
from cache_store.format.names import COMMITS, METADATA, QUARANTINE, list_keys, record_path, sample_key
from cache_store.format.quarantine_record import QuarantineRecord
from cache_store.format.store_root import StoreRoot
from cache_store.storage.local_files import FULL, writing
from cache_store.storage.storage import Storage, StorePath, open_storage

_log = logging.getLogger(__name__)


def stored_identity(path: StorePath) -> Mapping[str, Any] | None:
    """Identity of the store at a path, from its root alone; None where there is no store. Raises `FormatError`."""
    try:
        return store_root.read(open_storage(path)).identity
    except StoreNotFoundError:
        return None


def stored_provenance(path: StorePath) -> Mapping[str, Any] | None:
    """Provenance of the store at a path, as `stored_identity`."""
    try:
        return store_root.read(open_storage(path)).provenance
    except StoreNotFoundError:
        return None


def committed_keys(path: StorePath) -> frozenset[str]:
    """Keys (`sample_key`) of the samples that a store holds by now, by one listing; none where there is no store."""
    storage = open_storage(path)
    return frozenset(list_keys(storage, COMMITS) if storage.exists(METADATA) else ())


class CacheWriter:
    """Adds samples to a store, creating it if absent. Safe with other writers, in threads or on other machines."""

    def __init__(
        self,
        path: StorePath,
        *,
        fields: Sequence[Field],
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any] | None = None,
        codec_tables: bytes | None = None,
    ) -> None:
        """Open or create the store. Raises `IdentityMismatchError` if it exists with another identity or schema.

        `codec_tables`: what a new store keeps of a calibration whose hash the identity names.
        """
        self._storage: Storage = open_storage(path)
        self.path = self._storage.place
        given = StoreRoot(
            fields=store_root.by_name(fields),
            identity=canonical_copy(identity, "identity"),
            provenance=canonical_copy(provenance or {}, "provenance"),
        )
        metadata = given.to_bytes()
        with writing("the store's metadata", len(metadata) + len(codec_tables or b""), self.path):
            is_new = store_root.make(self._storage, metadata, codec_tables)
            root = given if is_new else store_root.read(self._storage)
        for line in root.check(given, self.path):
            _log.warning("store %s was begun with other versions or hardware: %s", self.path, line)
        self.fields: Mapping[str, Field] = root.fields
        self._fingerprint = root.fingerprint
        self._closed = False

    def is_committed(self, sample_id: str) -> bool:
        """Tell whether the sample is in the store, whoever wrote it."""
        return self._storage.exists(record_path(COMMITS, sample_key(sample_id)))

    def write(self, sample_id: str, values: Mapping[str, sample_group.Value]) -> bool:
        """Commit one sample; `True` if this call did, `False` if it was already there or another writer won.

        The sample is on the medium when this returns. Raises `ValueError` before anything is written if values do not
        fit the schema, `StoreFullError` if there is no room.
        """
        self._check_open()
        group = sample_group.encode(sample_id, sample_group.check_values(sample_id, values, self.fields), self.fields)
        record = CommitRecord(
            sample_id=sample_id,
            attempt=secrets.token_hex(8),
            fingerprint=self._fingerprint,
            shapes=group.shapes,
            objects=group.objects,
        )
        published = record.to_bytes()
        if self.is_committed(sample_id):
            return False
        with writing(f"sample {sample_id!r}", record.size_bytes + len(published), self.path):
            self._storage.write_group(record.folder, group.files)
            won = self._publish(record, published)
        if not won:
            self._storage.delete_tree(record.folder)
            return False
        commit_record.check_kept(self._storage, record)
        failure = record_path(QUARANTINE, sample_key(sample_id))
        if self._storage.exists(failure):
            self._storage.delete([failure])
        return True

    def failed_keys(self) -> frozenset[str]:
        """Keys of the samples with a quarantine record, released or not, by one listing."""
        return frozenset(list_keys(self._storage, QUARANTINE))

    def quarantine(self, sample_id: str, kind: str, reason: str, traceback_text: str) -> None:
        """Record that a sample could not be made, and why; a sample that is committed after all stays readable."""
        self._check_open()
        quarantine_record.write_failure(self._storage, sample_id, kind, reason, traceback_text)

    def quarantine_of(self, sample_id: str) -> QuarantineRecord | None:
        """Why the sample failed, if it did and was not released for another try (nor committed since).

        A record that cannot be read is as none, with a warning: the sample is tried again.
        """
        record = quarantine_record.read_if_sound(self._storage, sample_key(sample_id))
        return None if record is None or record.released or self.is_committed(sample_id) else record

    def release(self, sample_id: str) -> None:
        """Allow another try of a quarantined sample; its count of attempts goes on. Others are left as they are."""
        self._check_open()
        record = quarantine_record.read_if_sound(self._storage, sample_key(sample_id))
        if record is not None and not record.released:
            quarantine_record.write(self._storage, replace(record, released=True))

    def close(self) -> None:
        """End writing; everything written is already on the medium."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _publish(self, record: CommitRecord, data: bytes) -> bool:
        name = record_path(COMMITS, sample_key(record.sample_id))
        try:
            return self._storage.put_if_absent(name, data)
        except OSError as error:
            if error.errno in FULL and not self._storage.exists(name):
                self._storage.delete_tree(record.folder)  # surely not published, and the disk needs the room
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed; open a new one.")
