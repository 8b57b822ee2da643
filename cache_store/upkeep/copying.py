"""Copying a store, between folders and buckets in any mix, while writers and readers go on at both ends.

Data first, records last: a sample appears in the copy as it appears in a store. Every byte is checked against its
commit record on the way. A killed copy goes on where it stopped: what is committed is left alone, and of a sample that
was begun only what is missing or not whole is copied. Names and bytes of all objects stay what they were.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from cache_store.concurrency import in_order
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import (
    FormatError,
    SampleReadError,
    StoreAddressError,
    UnreachableStoreError,
    UnreadableSampleError,
)
from cache_store.format import codec_tables, commit_record, index, quarantine_record, store_root
from cache_store.format.commit_record import CommitRecord, StoredObject
from cache_store.format.names import COMMITS, METADATA, QUARANTINE, SAMPLES, list_keys, record_path
from cache_store.format.store_root import StoreRoot
from cache_store.format.stored_sample import StoredSample
from cache_store.rereading import reread
from cache_store.storage.local_files import writing
from cache_store.storage.storage import Storage, StorePath, open_storage

_SAMPLES = 4
"""Samples copied at a time, so that one sample's last object does not keep the others waiting."""
_OBJECTS = 8
"""Objects held in memory at a time, each a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """Result of `copy`."""

    samples: int
    """Number of samples in the source when it was listed."""
    copied: int
    already_there: int
    size_bytes: int
    """Bytes of the objects that were copied."""
    damaged: tuple[str, ...]
    """Errors of the samples and records that were not copied, as they are damaged."""
    unreadable: tuple[str, ...]
    """The same of samples that the source does not give out, which may be whole."""

    @property
    def ok(self) -> bool:
        return not self.damaged and not self.unreadable


def copy(
    source: StorePath,
    target: StorePath,
    *,
    on_sample: Callable[[int, int, int], None] = lambda done, samples, size_bytes: None,
) -> CopyReport:
    """Copy all samples and quarantine records of a store; `on_sample` is told how far it is.

    The target may be absent, an earlier copy, or any store of the same schema and identity, which then holds both.
    Raises `StoreNotFoundError`, `IdentityMismatchError` or `FormatError` first; the report names damaged samples.
    """
    start, end = open_storage(source), open_storage(target)
    if start.place == end.place:
        raise StoreAddressError(f"source and target of the copy are both {start.place}; give another target.")
    root = store_root.read(start)
    with writing("the store's metadata", 0, end.place):
        name = codec_tables.name_in(root.identity)
        tables = None if name is None else codec_tables.read(start, name)
        store_root.make(end, start.read_document(METADATA, MAX_DOCUMENT_BYTES), tables)  # byte for byte the source's
        there = store_root.read(end)
    if there.fingerprint != root.fingerprint:
        there.check(root, end.place)
        reason = f"has other chunk sizes or compression than {start.place}, and its commit records would not be valid"
        raise FormatError(f"the store at {end.place} {reason} there; copy into a store of its own.")
    wanted, held = list_keys(start, COMMITS), set(list_keys(end, COMMITS))
    missing = [key for key in wanted if key not in held]
    copied, size = [], 0
    damaged: list[str] = []
    unreadable: list[str] = []
    with ThreadPoolExecutor(_OBJECTS, "copy") as pool:

        def copy_one(key: str) -> CommitRecord | SampleReadError | FormatError | None:
            try:
                return _copy_sample(start, end, root, key, pool)
            except (SampleReadError, FormatError) as error:
                return error

        for done, outcome in enumerate(in_order(copy_one, missing, _SAMPLES), len(wanted) - len(missing) + 1):
            if isinstance(outcome, Exception):
                (unreadable if isinstance(outcome, UnreadableSampleError) else damaged).append(str(outcome))
            elif outcome is not None:
                copied.append(outcome.sample_id)
                size += outcome.size_bytes
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
        unreadable=tuple(unreadable),
    )


def _copy_sample(
    source: Storage, target: Storage, root: StoreRoot, key: str, pool: ThreadPoolExecutor
) -> CommitRecord | None:
    """Copy one sample. Returns nothing if it is gone from the source, or another attempt at it won."""
    name = record_path(COMMITS, key)

    def read() -> tuple[bytes, CommitRecord]:
        data = source.read_document(name, MAX_DOCUMENT_BYTES)
        return data, commit_record.from_bytes(source, root, key, data)

    try:
        data, record = reread(read, partial(source.forget, name))
    except UnreachableStoreError:
        raise
    except (FormatError, OSError) as error:
        if isinstance(error, FileNotFoundError) and key not in list_keys(source, COMMITS):
            return None
        attempts = source.names(SAMPLES)
        raise commit_record.unreadable(source, key, error, commit_record.find_id(source, key, attempts)) from error
    with writing(f"sample {record.sample_id!r}", record.size_bytes, target.place):
        _copy_objects(
            StoredSample(source, record, root.fields), StoredSample(target, record, root.fields, waits_s=()), pool
        )
        won = target.put_if_absent(name, data)
    if not won:
        if target.read_document(name, MAX_DOCUMENT_BYTES) != data:
            target.delete_tree(record.folder)
        return None
    commit_record.check_kept(target, record)
    return record


def _copy_objects(source: StoredSample, target: StoredSample, pool: ThreadPoolExecutor) -> None:
    """Copy all objects of a sample durably; those that an earlier try has copied are checked instead."""
    objects = source.record.objects
    folders = dict.fromkeys(f"{target.record.folder}/{stored.array}".rstrip("/") for stored in objects.values())
    target.storage.make_folders(folders)
    begun = target.storage.exists(f"{target.record.folder}/{METADATA}")

    def copy_object(stored: StoredObject) -> None:
        if begun:
            with suppress(SampleReadError):  # missing, or not whole
                target.load(stored, stored.array)
                return
        target.storage.put(f"{target.record.folder}/{stored.path}", [source.load(stored, stored.array)])

    copy_object(objects[METADATA])  # first, as in `ObjectStorage.write_group`, for the garbage collector's sake
    for copied in [pool.submit(copy_object, stored) for path, stored in objects.items() if path != METADATA]:
        copied.result()


def _copy_quarantine(source: Storage, target: Storage) -> list[str]:
    """Copy records of failures that the target has none of; returns what is wrong with those that cannot be read."""
    damaged = []
    held = set(list_keys(target, QUARANTINE)) | set(list_keys(target, COMMITS))
    for key in list_keys(source, QUARANTINE):
        if key in held:
            continue
        try:
            record = quarantine_record.read(source, key)
        except UnreachableStoreError:
            raise
        except (FormatError, OSError) as error:
            damaged.append(str(error))
            continue
        if record is not None:
            quarantine_record.write(target, record)
    return damaged
