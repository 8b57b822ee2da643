"""Verification of a store: what is damaged, what is left over.

Repair drops what is damaged and nothing else; no byte is ever guessed. The data of a dropped sample stay as garbage
until they are collected, so that a person may still look at them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from cache_store import commit_record, local_files, quarantine_record, store_root
from cache_store.commit_record import CommitRecord
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import CorruptSampleError, FormatError
from cache_store.field import SMALL, Field
from cache_store.sample_check import check_array, check_group
from cache_store.sample_key import keys
from cache_store.stored_object import TRAILER_BYTES, StoredObject


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
    root_path = store_root.resolve(path)
    root = store_root.read(root_path)
    damaged = _check_plain_group(root_path)
    referenced: set[str] = set()
    committed: set[str] = set()
    broken: dict[str, bytes] = {}
    size = 0
    commit_keys = keys(root_path, commit_record.FOLDER)
    for key in commit_keys:
        name = f"{commit_record.FOLDER}/{key}.json"
        try:
            record = commit_record.read(root_path, key, fields=root.fields, fingerprint=root.fingerprint)
        except (FormatError, FileNotFoundError) as error:
            damaged.append(Damage(sample_id="", object=name, field="", what=str(error)))
            broken[name] = b""
            continue
        committed.add(key)
        referenced.add(record.folder.rpartition("/")[2])
        size += record.size_bytes
        if found := _check_sample(root_path, record, root.fields, deep):
            damaged += found
            broken[name] = record.to_bytes()
    quarantined = 0
    for key in keys(root_path, quarantine_record.FOLDER):
        try:
            failure = quarantine_record.read(root_path, key)
        except FormatError as error:
            name = f"{quarantine_record.FOLDER}/{key}.json"
            damaged.append(Damage(sample_id="", object=name, field="", what=str(error)))
            broken[name] = b""
            continue
        quarantined += failure is not None and not failure.released and key not in committed
    attempts = set(local_files.names(root_path, store_root.SAMPLES)) - {store_root.DOCUMENT}
    return VerifyReport(
        deep=deep,
        samples=len(commit_keys),
        size_bytes=size,
        damaged=tuple(damaged),
        orphans=tuple(sorted(attempts - referenced)),
        stale_temporaries=sum(1 for _ in local_files.names(root_path, store_root.STAGING)),
        quarantined=quarantined,
        repaired=_repair(root_path, damaged, broken) if repair else (),
    )


def _repair(root: Path, damaged: list[Damage], broken: Mapping[str, bytes]) -> tuple[str, ...]:
    """Remove the broken records, each only if it still is what was judged (a sample may have been written anew)."""
    repaired = []
    for name, judged in broken.items():
        if judged and local_files.read_document(root, name, MAX_DOCUMENT_BYTES) != judged:
            continue
        local_files.remove_file(root / name)
        repaired.append(name)
    for folder in sorted({name.partition("/")[0] for name in repaired}):
        local_files.sync_folder(root / folder)
    plain = f"{store_root.SAMPLES}/{store_root.DOCUMENT}"
    if any(item.object == plain for item in damaged):
        local_files.replace(root / store_root.STAGING, root / plain, store_root.PLAIN_GROUP)
        repaired.append(plain)
    return tuple(repaired)


def _check_plain_group(root: Path) -> list[Damage]:
    name = f"{store_root.SAMPLES}/{store_root.DOCUMENT}"
    try:
        good = local_files.read_document(root, name, 2 * len(store_root.PLAIN_GROUP)) == store_root.PLAIN_GROUP
    except (OSError, FormatError):
        good = False
    what = f"is not {store_root.PLAIN_GROUP.decode()}; only other Zarr readers use it."
    return [] if good else [Damage(sample_id="", object=name, field="", what=what)]


def _check_sample(root: Path, record: CommitRecord, fields: Mapping[str, Field], deep: bool) -> list[Damage]:
    found: list[Damage] = []
    for stored in record.objects.values():
        what = _check_object(root, record, stored, deep)
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
        check_group(root, record, fields, "")
        for array in arrays:
            check_array(root, record, array, fields, array)
        if {stored.array for stored in record.objects.values()} != {"", *arrays}:
            raise FormatError(f"the record names objects of other arrays than {arrays}.")
    except (CorruptSampleError, FormatError) as error:
        found.append(Damage(sample_id=record.sample_id, object=record.folder, field="", what=str(error)))
    return found


def _check_object(root: Path, record: CommitRecord, stored: StoredObject, deep: bool) -> str:
    """What is wrong with an object, or nothing."""
    relative = f"{record.folder}/{stored.path}"
    try:
        if not deep:
            size = local_files.size_bytes(root, relative)
            return "" if size == stored.size else f"has {size} bytes, expected {stored.size}."
        data = stored.load(root, record.folder, sample_id=record.sample_id, field=stored.array)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing."
    except (CorruptSampleError, FormatError) as error:
        return str(error)
    if stored.is_chunk and f"{google_crc32c.value(data[:-TRAILER_BYTES]):08x}" != stored.crc32c:
        return f"does not match its CRC-32C {stored.crc32c}."
    return ""
