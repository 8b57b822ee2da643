"""Copying a store, between folders and buckets in any mix, while writers and readers go on at both ends.

Data first, records last: a sample appears in the copy as it appears in a store. Every byte is checked against its
commit record on the way. A copy that was killed goes on where it was: what is committed is left alone, and of a sample
that was begun only what is missing or not whole is copied. Names and bytes of all objects stay what they were.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_store.concurrency import in_order
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import CacheStoreError, CorruptSampleError, FormatError, StoreAddressError
from cache_store.format import commit_record, index, quarantine_record, store_root
from cache_store.format.commit_record import CommitRecord
from cache_store.format.sample_group import METADATA
from cache_store.format.sample_key import keys
from cache_store.format.store_root import StoreRoot
from cache_store.format.stored_object import MEND, StoredObject
from cache_store.storage.room import room_for
from cache_store.storage.storage import Storage, open_storage

_SAMPLES = 4
"""Copied at a time, so that one sample's last object does not keep the others waiting."""
_OBJECTS = 8
"""Held in memory at a time, each a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What `copy` did."""

    samples: int
    """In the source when it was listed."""
    copied: int
    already_there: int
    size_bytes: int
    """Of the objects that were copied."""
    damaged: tuple[str, ...]
    """What is wrong with the samples and records that were not copied."""

    @property
    def ok(self) -> bool:
        return not self.damaged


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    on_sample: Callable[[int, int, int], None] = lambda done, samples, size_bytes: None,
) -> CopyReport:
    """Copy all samples and quarantine records of a store; `on_sample` hears how far it is.

    The target may be absent, an earlier copy, or any store of the same schema and identity, which then holds both.
    Raises `StoreNotFoundError`, `IdentityMismatchError` or `FormatError` before anything is written; damaged samples
    are left out and named in the report.
    """
    start, end = open_storage(source), open_storage(target)
    if start.place == end.place:
        raise StoreAddressError(f"source and target of the copy are both {start.place}; give another target.")
    root = store_root.read(start)
    with room_for(0, "the store's metadata", end.place):
        _make_target(start, end, root)
    wanted, held = keys(start, commit_record.FOLDER), set(keys(end, commit_record.FOLDER))
    missing = [key for key in wanted if key not in held]
    copied, size, damaged = [], 0, []
    with ThreadPoolExecutor(_OBJECTS, "copy") as pool:

        def copy_one(key: str) -> CommitRecord | str | None:
            try:
                return _copy_sample(start, end, root, key, pool)
            except (CorruptSampleError, FormatError) as error:
                return str(error)

        done = len(wanted) - len(missing)
        for found in in_order(copy_one, missing, _SAMPLES):
            if isinstance(found, str):
                damaged.append(found)
            elif found is not None:
                copied.append(found.sample_id)
                size += found.size_bytes
            done += 1
            on_sample(done, len(wanted), size)
    damaged += _copy_quarantine(start, end)
    if copied and end.threads > 1:  # without an index, opening it takes a request a sample
        index.build(end, root, copied)
    return CopyReport(
        samples=len(wanted),
        copied=len(copied),
        already_there=len(wanted) - len(missing),
        size_bytes=size,
        damaged=tuple(damaged),
    )


def _make_target(source: Storage, target: Storage, root: StoreRoot) -> None:
    """The root of the copy, byte for byte the source's unless the target is a store already."""
    store_root.make(target, source.read_document(store_root.DOCUMENT, MAX_DOCUMENT_BYTES))
    there = store_root.read(target)
    if there.fingerprint != root.fingerprint:
        there.check(root, target.place)
        raise FormatError(
            f"the store at {target.place} has other chunk sizes or compression than {source.place}, and its commit "
            "records would not be valid there; copy into a store of its own."
        )


def _copy_sample(
    source: Storage, target: Storage, root: StoreRoot, key: str, pool: ThreadPoolExecutor
) -> CommitRecord | None:
    """The copied sample's record; nothing if it is gone from the source, or another attempt at it won."""
    name = f"{commit_record.FOLDER}/{key}.json"
    try:
        data = source.read_document(name, MAX_DOCUMENT_BYTES)
    except FileNotFoundError:
        return None
    record = CommitRecord.from_bytes(
        data, f"commit record {source.where(name)}", key=key, fields=root.fields, fingerprint=root.fingerprint
    )
    with room_for(record.size_bytes, f"sample {record.sample_id!r}", target.place):
        _copy_objects(source, target, record, pool)
        won = target.put_if_absent(name, data)
    if not won:
        if target.read_document(name, MAX_DOCUMENT_BYTES) != data:
            target.delete_tree(record.folder)
        return None
    if not target.exists(f"{record.folder}/{METADATA}"):
        target.delete([name])
        raise CacheStoreError(
            f"sample {record.sample_id!r} was not copied: {target.where(record.folder)} was collected as garbage. "
            "Collect with an age limit above the time that a copy takes, and run the same command again."
        )
    return record


def _copy_objects(source: Storage, target: Storage, record: CommitRecord, pool: ThreadPoolExecutor) -> None:
    """All objects of a sample, durably; those that an earlier try has copied are checked instead."""
    folders = dict.fromkeys(f"{record.folder}/{stored.array}".rstrip("/") for stored in record.objects.values())
    target.make_folders(folders)
    first = record.objects[METADATA]  # as `ObjectStorage.write_group` has it, for the sake of garbage collection
    begun = target.exists(f"{record.folder}/{first.path}")
    _copy_object(source, target, record, first, begun)
    rest = [stored for stored in record.objects.values() if stored is not first]
    for copied in [pool.submit(_copy_object, source, target, record, stored, begun) for stored in rest]:
        copied.result()


def _copy_object(source: Storage, target: Storage, record: CommitRecord, stored: StoredObject, begun: bool) -> None:
    if begun:
        with suppress(CorruptSampleError):  # missing, or not whole
            _load(target, record, stored)
            return
    target.put(f"{record.folder}/{stored.path}", [_load(source, record, stored)])


def _load(storage: Storage, record: CommitRecord, stored: StoredObject) -> NDArray[np.uint8]:
    """The object's bytes, all of them checked."""
    data = stored.load(storage, record.folder, sample_id=record.sample_id, field=stored.array)
    if not stored.matches(data):
        raise CorruptSampleError(
            f"sample {record.sample_id!r}, field {stored.array!r}: object {storage.where(record.folder)}/{stored.path} "
            f"does not match its CRC-32C {stored.crc32c}. {MEND}",
            record.sample_id,
            stored.array,
        )
    return data


def _copy_quarantine(source: Storage, target: Storage) -> list[str]:
    """Records of failures that the target has none of; what is wrong with those that cannot be read."""
    damaged = []
    held = set(keys(target, quarantine_record.FOLDER)) | set(keys(target, commit_record.FOLDER))
    for key in keys(source, quarantine_record.FOLDER):
        if key in held:
            continue
        try:
            record = quarantine_record.read(source, key)
        except FormatError as error:
            damaged.append(str(error))
            continue
        if record is not None:
            data = record.to_bytes()
            with room_for(len(data), f"the quarantine record of sample {record.sample_id!r}", target.place):
                target.put(f"{quarantine_record.FOLDER}/{key}.json", [data])
    return damaged
