"""Verification of a store: what is damaged, what is left over.

Repair drops what is damaged and nothing else; no byte is ever guessed. The data of a dropped sample stay as garbage
until they are collected, so that a person may still look at them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cache_store import commit_record, quarantine_record, store_root
from cache_store.commit_record import CommitRecord
from cache_store.concurrency import in_order
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import CorruptSampleError, FormatError, ObjectStorageError
from cache_store.field import SMALL, Field
from cache_store.sample_check import check_array, check_group
from cache_store.sample_key import keys
from cache_store.storage import Storage, open_storage
from cache_store.stored_object import StoredObject

_DEEP_THREADS = 8
"""Objects in memory at a time, where reading several at once is worth it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is not as it was written."""

    sample_id: str
    """Empty where it concerns the store as a whole, or a record too damaged to tell."""
    object: str
    """Path of the file, relative to the root."""
    field: str
    """The field that cannot be read; empty where it is all of them."""
    what: str
    """For a person: got, expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found."""

    deep: bool
    samples: int
    """Commit records looked at, the damaged ones included."""
    size_bytes: int
    """Bytes of the objects that the readable records name."""
    damaged: tuple[Damage, ...]
    orphans: tuple[str, ...]
    """Folders in `samples/` that no readable record names: running writers, killed ones, or a damaged record's data."""
    stale_temporaries: int
    """Files in `staging/`: of running or of killed writers."""
    quarantined: int
    repaired: tuple[str, ...] = ()
    """Damaged files that were dropped or made anew, relative to the root: commit records (their samples can be
    extracted again), quarantine records, `samples/zarr.json`."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found damaged; after a repair verify again."""
        return not self.damaged


def verify(path: str | os.PathLike[str], *, deep: bool = False, repair: bool = False) -> VerifyReport:
    """Check all records and the presence and size of all objects; with `deep` also every byte against its checksum.

    With `repair` the commit records of damaged samples and all damaged records are removed, so that the samples are
    absent and can be written again; not to be run beside another repair.
    Raises `StoreNotFoundError` or `FormatError` if the root itself cannot be read; all other damage is in the report.
    """
    storage = open_storage(path)
    root = store_root.read(storage)
    damaged = _check_plain_group(storage)
    referenced: set[str] = set()
    committed: set[str] = set()
    broken: dict[str, bytes] = {}
    size = 0
    commit_keys = keys(storage, commit_record.FOLDER)

    def check(key: str) -> tuple[CommitRecord | str, list[Damage]]:
        """The record, or what is wrong with it, and the damage of its sample."""
        try:
            record = commit_record.read(storage, key, fields=root.fields, fingerprint=root.fingerprint)
        except (FormatError, FileNotFoundError) as error:
            return str(error), []
        return record, _check_sample(storage, record, root.fields, deep)

    threads = min(storage.threads, _DEEP_THREADS) if deep else storage.threads
    for key, (record, found) in zip(commit_keys, in_order(check, commit_keys, threads), strict=True):
        name = f"{commit_record.FOLDER}/{key}.json"
        if isinstance(record, str):
            damaged.append(Damage(sample_id="", object=name, field="", what=record))
            broken[name] = b""
            continue
        committed.add(key)
        referenced.add(record.folder.rpartition("/")[2])
        size += record.size_bytes
        if found:
            damaged += found
            broken[name] = record.to_bytes()
    quarantined = 0
    for key in keys(storage, quarantine_record.FOLDER):
        try:
            failure = quarantine_record.read(storage, key)
        except FormatError as error:
            name = f"{quarantine_record.FOLDER}/{key}.json"
            damaged.append(Damage(sample_id="", object=name, field="", what=str(error)))
            broken[name] = b""
            continue
        quarantined += failure is not None and not failure.released and key not in committed
    attempts = set(storage.names(store_root.SAMPLES)) - {store_root.DOCUMENT}
    return VerifyReport(
        deep=deep,
        samples=len(commit_keys),
        size_bytes=size,
        damaged=tuple(damaged),
        orphans=tuple(sorted(attempts - referenced)),
        stale_temporaries=sum(1 for _ in storage.names(store_root.STAGING, flat=True)),
        quarantined=quarantined,
        repaired=_repair(storage, damaged, broken) if repair else (),
    )


def _repair(storage: Storage, damaged: list[Damage], broken: Mapping[str, bytes]) -> tuple[str, ...]:
    """Remove the broken records, each only if it still is what was judged (a sample may have been written anew)."""
    repaired = []
    for name, judged in broken.items():
        if judged and storage.read_document(name, MAX_DOCUMENT_BYTES) != judged:
            continue
        storage.delete([name])
        repaired.append(name)
    plain = f"{store_root.SAMPLES}/{store_root.DOCUMENT}"
    if any(item.object == plain for item in damaged):
        storage.put(plain, [store_root.PLAIN_GROUP])
        repaired.append(plain)
    return tuple(repaired)


def _check_plain_group(storage: Storage) -> list[Damage]:
    name = f"{store_root.SAMPLES}/{store_root.DOCUMENT}"
    try:
        good = storage.read_document(name, 2 * len(store_root.PLAIN_GROUP)) == store_root.PLAIN_GROUP
    except ObjectStorageError:  # of it nothing is known
        raise
    except (OSError, FormatError):
        good = False
    what = f"is not {store_root.PLAIN_GROUP.decode()}; only other Zarr readers use it."
    return [] if good else [Damage(sample_id="", object=name, field="", what=what)]


def _check_sample(storage: Storage, record: CommitRecord, fields: Mapping[str, Field], deep: bool) -> list[Damage]:
    found: list[Damage] = []
    for stored in record.objects.values():
        what = _check_object(storage, record, stored, deep)
        if what:
            name = f"{record.folder}/{stored.path}"
            field = "" if stored.array in ("", SMALL) else stored.array
            found.append(Damage(sample_id=record.sample_id, object=name, field=field, what=what))
    if found or not deep:
        return found
    arrays = [name for name in record.shapes if fields[name].layout == "array"]
    if any(fields[name].layout == "packed" for name in record.shapes):
        arrays.append(SMALL)
    try:
        check_group(storage, record, fields, "")
        for array in arrays:
            check_array(storage, record, array, fields, array)
        if {stored.array for stored in record.objects.values()} != {"", *arrays}:
            raise FormatError(f"the record names objects of other arrays than {arrays}.")
    except (CorruptSampleError, FormatError) as error:
        found.append(Damage(sample_id=record.sample_id, object=record.folder, field="", what=str(error)))
    return found


def _check_object(storage: Storage, record: CommitRecord, stored: StoredObject, deep: bool) -> str:
    """What is wrong with an object, or nothing."""
    relative = f"{record.folder}/{stored.path}"
    try:
        if not deep:
            size = storage.size_bytes(relative)
            return "" if size == stored.size else f"has {size} bytes, expected {stored.size}."
        data = stored.load(storage, record.folder, sample_id=record.sample_id, field=stored.array)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing."
    except (CorruptSampleError, FormatError) as error:
        return str(error)
    if not stored.matches(data):
        return f"does not match its CRC-32C {stored.crc32c}."
    return ""
