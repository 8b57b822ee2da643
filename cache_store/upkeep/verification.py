"""Verification of a store: what is damaged, what is left over.

Repair drops what is damaged and nothing else; no byte is ever guessed. The data of a dropped sample stay as garbage
until they are collected, so that a person may still look at them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cache_store.concurrency import in_order
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import CacheStoreError, FormatError, ObjectStorageError
from cache_store.format import commit_record, quarantine_record, store_root
from cache_store.format.commit_record import CommitRecord
from cache_store.format.field import SMALL, Field
from cache_store.format.sample_check import check_array, check_group
from cache_store.format.sample_key import keys
from cache_store.format.stored_object import StoredObject
from cache_store.storage.storage import Storage, open_storage

_PLAIN = f"{store_root.SAMPLES}/{store_root.DOCUMENT}"
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
    proven: bool = True
    """Whether repair may act on it. A disk that does not answer proves nothing of what is on it."""


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
    extracted again), quarantine records, `samples/zarr.json`. What could not be dropped is in `damaged` once more."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found damaged; after a repair verify again."""
        return not self.damaged


def verify(path: str | os.PathLike[str], *, deep: bool = False, repair: bool = False) -> VerifyReport:
    """Check all records and the presence and size of all objects; with `deep` also every byte against its checksum.

    With `repair` the commit records of damaged samples and all damaged records are removed, so that the samples are
    absent and can be written again; not to be run beside another repair. What a disk did not give it leaves alone.
    Raises `StoreNotFoundError` or `FormatError` if the root itself cannot be read; all other damage is in the report.
    """
    storage = open_storage(path)
    root = store_root.read(storage)
    damaged = _check_plain_group(storage)
    referenced: set[str] = set()
    committed: set[str] = set()
    broken: dict[str, bytes | str] = {}
    size = 0
    commit_keys = keys(storage, commit_record.FOLDER)

    def check(key: str) -> tuple[CommitRecord | None, list[Damage], bytes | str]:
        """The record if it is one, the damage of it or its sample, and what its file held."""
        name = f"{commit_record.FOLDER}/{key}.json"
        content: bytes | str = b""
        try:
            content = _content(storage, name)
            where = f"commit record {storage.where(name)}"
            record = CommitRecord.from_bytes(
                _whole(content), where, key=key, fields=root.fields, fingerprint=root.fingerprint
            )
        except (FormatError, OSError) as error:
            return None, [_damage(error, name)], content
        return record, _check_sample(storage, record, root.fields, deep), content

    threads = min(storage.threads, _DEEP_THREADS) if deep else storage.threads
    for key, (record, found, content) in zip(commit_keys, in_order(check, commit_keys, threads), strict=True):
        if record is not None:
            committed.add(key)
            referenced.add(record.folder.rpartition("/")[2])
            size += record.size_bytes
        damaged += found
        if any(item.proven for item in found):
            broken[f"{commit_record.FOLDER}/{key}.json"] = content
    quarantined = 0
    for key in keys(storage, quarantine_record.FOLDER):
        name = f"{quarantine_record.FOLDER}/{key}.json"
        content = b""
        try:
            content = _content(storage, name)
            failure = quarantine_record.checked(storage, key, _whole(content))
        except FileNotFoundError:  # released or committed since the folder was listed
            continue
        except (FormatError, OSError) as error:
            damaged.append(_damage(error, name))
            if damaged[-1].proven:
                broken[name] = content
            continue
        quarantined += not failure.released and key not in committed
    repaired, refused = _repair(storage, damaged, broken) if repair else ((), ())
    attempts = set(storage.names(store_root.SAMPLES)) - {store_root.DOCUMENT}
    return VerifyReport(
        deep=deep,
        samples=len(commit_keys),
        size_bytes=size,
        damaged=(*damaged, *refused),
        orphans=tuple(sorted(attempts - referenced)),
        stale_temporaries=sum(1 for _ in storage.names(store_root.STAGING, flat=True)),
        quarantined=quarantined,
        repaired=repaired,
    )


def _repair(
    storage: Storage, damaged: Sequence[Damage], broken: Mapping[str, bytes | str]
) -> tuple[tuple[str, ...], tuple[Damage, ...]]:
    """Remove the broken records, each only if it still is what was judged (a sample may have been written anew).

    What was repaired, and what could not be.
    """
    repaired, refused = [], []
    plain = [item.object for item in damaged if item.object == _PLAIN and item.proven]
    for name in [*broken, *plain]:
        try:
            if name == _PLAIN:
                storage.put(name, [store_root.PLAIN_GROUP])
            elif _content(storage, name) == broken[name]:
                storage.delete([name])
            else:
                continue
        except FileNotFoundError:
            continue
        except ObjectStorageError:
            raise
        except OSError as error:
            what = f"could not be repaired ({error.strerror or error}); see to the permissions and the disk."
            refused.append(Damage(sample_id="", object=name, field="", what=what, proven=False))
            continue
        repaired.append(name)
    return tuple(repaired), tuple(refused)


def _content(storage: Storage, name: str) -> bytes | str:
    """The bytes of a record; of one that is refused unread (too large, a link), the refusal."""
    try:
        return storage.read_document(name, MAX_DOCUMENT_BYTES)
    except FormatError as error:
        return str(error)


def _whole(content: bytes | str) -> bytes:
    if isinstance(content, str):
        raise FormatError(content)
    return content


def _damage(error: FormatError | OSError, name: str, *, sample_id: str = "", field: str = "") -> Damage:
    """What an error says of an object; object storage's own says nothing and is raised again."""
    if isinstance(error, ObjectStorageError):
        raise error
    proven = isinstance(error, CacheStoreError)
    if isinstance(error, FileNotFoundError):
        what = "is gone since its folder was listed; verify again."
    elif isinstance(error, OSError) and not proven:
        what = f"cannot be read ({error.strerror or error}); repair leaves it. See to the permissions and the disk."
    else:
        what = str(error)
    return Damage(sample_id=sample_id, object=name, field=field, what=what, proven=proven)


def _check_plain_group(storage: Storage) -> list[Damage]:
    try:
        if storage.read_document(_PLAIN, 2 * len(store_root.PLAIN_GROUP)) == store_root.PLAIN_GROUP:
            return []
    except (FileNotFoundError, FormatError):
        pass
    except OSError as error:
        return [_damage(error, _PLAIN)]
    what = f"is not {store_root.PLAIN_GROUP.decode()}; only other Zarr readers use it."
    return [Damage(sample_id="", object=_PLAIN, field="", what=what)]


def _check_sample(storage: Storage, record: CommitRecord, fields: Mapping[str, Field], deep: bool) -> list[Damage]:
    found: list[Damage] = []
    for stored in record.objects.values():
        found += _check_object(storage, record, stored, deep)
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
    except (FormatError, OSError) as error:
        found.append(_damage(error, record.folder, sample_id=record.sample_id))
    return found


def _check_object(storage: Storage, record: CommitRecord, stored: StoredObject, deep: bool) -> list[Damage]:
    """What is wrong with an object, or nothing."""
    name = f"{record.folder}/{stored.path}"
    field = "" if stored.array in ("", SMALL) else stored.array
    what = ""
    try:
        if deep:
            data = stored.load(storage, record.folder, sample_id=record.sample_id, field=stored.array)
            what = "" if stored.matches(data) else f"does not match its CRC-32C {stored.crc32c}."
        elif (size := storage.size_bytes(name)) != stored.size:
            what = f"has {size} bytes, expected {stored.size}."
    except (FileNotFoundError, NotADirectoryError):
        what = "is missing."
    except (FormatError, OSError) as error:
        return [_damage(error, name, sample_id=record.sample_id, field=field)]
    return [Damage(sample_id=record.sample_id, object=name, field=field, what=what)] if what else []
