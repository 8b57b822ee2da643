"""Verification of a store: what is damaged, what is left over.

Repair drops what is damaged and nothing else; no byte is ever guessed. The data of a dropped sample stay as garbage
until they are collected, so that a person may still look at them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cache_store.concurrency import in_order
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import CacheStoreError, FormatError, ObjectStorageError
from cache_store.format import commit_record, quarantine_record, store_root
from cache_store.format.commit_record import CommitRecord, StoredObject
from cache_store.format.field import SMALL
from cache_store.format.names import COMMITS, METADATA, QUARANTINE, SAMPLES, list_keys, record_path
from cache_store.format.store_root import PLAIN_GROUP, PLAIN_GROUP_PATH
from cache_store.format.stored_sample import StoredSample
from cache_store.storage.local_storage import STAGING
from cache_store.storage.storage import Storage, StorePath, open_storage

_DEEP_THREADS = 8
"""Objects in memory at a time, where reading several at once is worth it."""
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is not as it was written."""

    sample_id: str
    """Empty where it concerns the store as a whole, or a record too damaged to tell."""
    object: str
    """Path of the file, relative to the root."""
    field: str
    """Field that cannot be read; empty where it is all of them."""
    what: str
    """For a person: got, expected."""
    proven: bool = True
    """Whether repair may act on it. A disk that does not answer proves nothing about what is on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """State of a store as `verify` saw it."""

    deep: bool
    samples: int
    """Number of commit records looked at, the damaged ones included."""
    size_bytes: int
    """Bytes of the objects that the readable records name."""
    damaged: tuple[Damage, ...]
    orphans: tuple[str, ...]
    """Folders in `samples/` that no readable record names: running writers, killed ones, or a damaged record's data."""
    stale_temporaries: int
    """Number of files in `staging/`, of running or of killed writers."""
    quarantined: int
    repaired: tuple[str, ...] = ()
    """Damaged files that were dropped or made anew, relative to the root: commit records (their samples can be
    extracted again), quarantine records, `samples/zarr.json`. What could not be dropped is in `damaged` once more."""

    @property
    def ok(self) -> bool:
        """Whether nothing was damaged; after a repair verify again."""
        return not self.damaged


def verify(path: StorePath, *, deep: bool = False, repair: bool = False) -> VerifyReport:
    """Check all records and the presence and size of all objects; with `deep` also every byte against its checksum.

    With `repair` the commit records of damaged samples and all damaged records are removed, so that the samples are
    absent and can be written again; not to be run beside another repair. What a disk did not return is left alone.
    Raises `StoreNotFoundError` or `FormatError` if the root itself cannot be read; all other damage is in the report.
    """
    storage = open_storage(path)
    root = store_root.read(storage)
    damaged: list[Damage] = []
    broken: dict[str, bytes | str] = {}
    referenced, committed = set[str](), set[str]()
    size, quarantined = 0, 0

    def note(name: str, damage: list[Damage], content: bytes | str) -> None:
        damaged.extend(damage)
        if any(item.proven for item in damage):
            broken[name] = content

    def check_sample(key: str) -> tuple[CommitRecord | None, list[Damage], bytes | str]:
        parse = partial(commit_record.from_bytes, storage, root, key)
        record, damage, content = _read_record(storage, record_path(COMMITS, key), parse)
        if record is not None:
            damage = _check_sample(StoredSample(storage, record, root.fields), deep)
        return record, damage, content

    note(PLAIN_GROUP_PATH, _check_plain_group(storage), "")
    commit_keys = list_keys(storage, COMMITS)
    threads = min(storage.threads, _DEEP_THREADS) if deep else storage.threads
    for key, (record, damage, content) in zip(commit_keys, in_order(check_sample, commit_keys, threads), strict=True):
        if record is not None:
            committed.add(key)
            referenced.add(record.folder.rpartition("/")[2])
            size += record.size_bytes
        note(record_path(COMMITS, key), damage, content)
    for key in list_keys(storage, QUARANTINE):
        name = record_path(QUARANTINE, key)
        try:
            parse = partial(quarantine_record.from_bytes, storage, key)
            failure, damage, content = _read_record(storage, name, parse, may_vanish=True)
        except FileNotFoundError:  # released or committed since the folder was listed
            continue
        if failure is not None:
            quarantined += not failure.released and key not in committed
        note(name, damage, content)
    repaired, refused = _repair(storage, broken) if repair else ((), ())
    return VerifyReport(
        deep=deep,
        samples=len(commit_keys),
        size_bytes=size,
        damaged=(*damaged, *refused),
        orphans=tuple(sorted(set(storage.names(SAMPLES)) - {METADATA} - referenced)),
        stale_temporaries=sum(1 for _ in storage.names(STAGING, flat=True)),
        quarantined=quarantined,
        repaired=repaired,
    )


def _repair(storage: Storage, broken: Mapping[str, bytes | str]) -> tuple[tuple[str, ...], tuple[Damage, ...]]:
    """Remove the broken records, each only if it still is what was judged (a sample may have been written anew).

    Returns what was repaired, and what could not be.
    """
    repaired, refused = [], []
    for name, content in sorted(broken.items()):
        try:
            if name == PLAIN_GROUP_PATH:
                storage.put(name, [PLAIN_GROUP])
            elif _content(storage, name) == content:
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


def _read_record(
    storage: Storage, name: str, parse: Callable[[bytes], Record], *, may_vanish: bool = False
) -> tuple[Record | None, list[Damage], bytes | str]:
    """A record if it is a valid one, or else its damage; and what its file held, as `_content` has it."""
    content: bytes | str = b""
    try:
        content = _content(storage, name)
        if isinstance(content, str):
            raise FormatError(content)
        return parse(content), [], content
    except (FormatError, OSError) as error:
        if may_vanish and isinstance(error, FileNotFoundError):
            raise
        return None, [_damage(error, name)], content


def _content(storage: Storage, name: str) -> bytes | str:
    """Bytes of a record; the refusal where it is refused unread (too large, a link)."""
    try:
        return storage.read_document(name, MAX_DOCUMENT_BYTES)
    except FormatError as error:
        return str(error)


def _damage(error: FormatError | OSError, name: str, *, sample_id: str = "", field: str = "") -> Damage:
    """Turn an error into what it says of an object; one of object storage says nothing of it and is raised again."""
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
        if storage.read_document(PLAIN_GROUP_PATH, 2 * len(PLAIN_GROUP)) == PLAIN_GROUP:
            return []
    except (FileNotFoundError, FormatError):
        pass
    except OSError as error:
        return [_damage(error, PLAIN_GROUP_PATH)]
    what = f"is not {PLAIN_GROUP.decode()}; only other Zarr readers use it."
    return [Damage(sample_id="", object=PLAIN_GROUP_PATH, field="", what=what)]


def _check_sample(sample: StoredSample, deep: bool) -> list[Damage]:
    record, fields = sample.record, sample.fields
    damage = [item for stored in record.objects.values() for item in _check_object(sample, stored, deep)]
    if damage or not deep:
        return damage
    arrays = [name for name in record.shapes if fields[name].layout == "array"]
    if any(fields[name].layout == "packed" for name in record.shapes):
        arrays.append(SMALL)
    try:
        sample.check_group("")
        for array in arrays:
            sample.check_array(array, array)
        if {stored.array for stored in record.objects.values()} != {"", *arrays}:
            raise FormatError(f"the record names objects of other arrays than {arrays}.")
    except (FormatError, OSError) as error:
        return [_damage(error, record.folder, sample_id=record.sample_id)]
    return []


def _check_object(sample: StoredSample, stored: StoredObject, deep: bool) -> list[Damage]:
    name = f"{sample.record.folder}/{stored.path}"
    field = "" if stored.array in ("", SMALL) else stored.array
    what = ""
    try:
        if deep:
            sample.load(stored, field)
        elif (size := sample.storage.size_bytes(name)) != stored.size:
            what = f"has {size} bytes, expected {stored.size}."
    except (FileNotFoundError, NotADirectoryError):
        what = "is missing."
    except (FormatError, OSError) as error:
        return [_damage(error, name, sample_id=sample.record.sample_id, field=field)]
    return [Damage(sample_id=sample.record.sample_id, object=name, field=field, what=what)] if what else []
