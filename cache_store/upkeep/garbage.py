"""Garbage collection: attempts that no commit record names and temporaries, once they are old enough.

Nobody can tell a slow writer's attempt from a killed one's, so only age decides, by the storage's own clock. If the
limit was too short nothing acknowledged is lost all the same: an attempt is first moved aside, and moved back if its
record has appeared meanwhile; a writer that finds its attempt gone withdraws its record and fails.
"""

import os
from dataclasses import dataclass

from cache_store.format import commit_record, store_root
from cache_store.format.sample_key import is_attempt, is_key
from cache_store.storage.storage import Storage, open_storage

DEFAULT_MIN_AGE_S = 24 * 3600.0
"""Far longer than any attempt at a sample takes."""
_ASIDE = "garbage."


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbageReport:
    """What was removed, or would be."""

    attempts: tuple[str, ...]
    """Folders of `samples/`, by name."""
    temporaries: int
    """Files of `staging/`."""
    size_bytes: int
    kept_young: int
    """Attempts and temporaries without a record that have not reached the age."""


def collect_garbage(
    path: str | os.PathLike[str], *, min_age_s: float = DEFAULT_MIN_AGE_S, dry_run: bool = False
) -> GarbageReport:
    """Remove what no record names and nothing has touched for `min_age_s` seconds.

    Raises `FormatError` if any commit record is damaged: its attempt could not be told from garbage; run `verify` with
    `repair` first. Safe beside readers and writers, and beside other collectors.
    """
    storage = open_storage(path)
    root = store_root.read(storage)
    now = storage.clock_ns() / 1e9
    attempts = [name for name in storage.names(store_root.SAMPLES) if _key(name)]
    removed, temporaries, size, young = [], 0, 0, 0
    for name in sorted(attempts):  # listed before any record is read: a record that appears meanwhile is seen
        if _is_committed(storage, root, name):
            continue
        found_bytes, changed = storage.extent(f"{store_root.SAMPLES}/{name}")
        if now - changed < min_age_s:
            young += 1
        elif dry_run or _remove_attempt(storage, root, name):
            removed.append(name)
            size += found_bytes
    for name in sorted(storage.names(store_root.STAGING, flat=True)):
        entry = f"{store_root.STAGING}/{name}"
        if name.startswith(_ASIDE):
            if not dry_run:
                _finish(storage, root, name)
            continue
        found_bytes, changed = storage.extent(entry)
        if now - changed < min_age_s:
            young += 1
            continue
        temporaries += 1
        size += found_bytes
        if not dry_run:
            storage.delete([entry])
    return GarbageReport(attempts=tuple(removed), temporaries=temporaries, size_bytes=size, kept_young=young)


def _key(name: str) -> str:
    """The key of an attempt's folder, or nothing for another name."""
    key, _, attempt = name.rpartition(".")
    return key if is_key(key) and is_attempt(attempt) else ""


def _is_committed(storage: Storage, root: store_root.StoreRoot, name: str) -> bool:
    try:
        record = commit_record.read(storage, _key(name), fields=root.fields, fingerprint=root.fingerprint)
    except FileNotFoundError:
        return False
    return record.folder == f"{store_root.SAMPLES}/{name}"


def _remove_attempt(storage: Storage, root: store_root.StoreRoot, name: str) -> bool:
    aside = f"{_ASIDE}{name}"
    if not storage.set_aside(f"{store_root.SAMPLES}/{name}", f"{store_root.STAGING}/{aside}"):
        return False  # its writer gave up, or another collector was first
    return _finish(storage, root, aside)


def _finish(storage: Storage, root: store_root.StoreRoot, aside: str) -> bool:
    """Remove what was moved aside, unless it was committed at the last moment; also after a killed collector."""
    name = aside.removeprefix(_ASIDE)
    folder = f"{store_root.SAMPLES}/{name}"
    if _key(name) and _is_committed(storage, root, name):
        storage.put_back(folder, f"{store_root.STAGING}/{aside}")
        return False
    storage.drop(folder if _key(name) else "", f"{store_root.STAGING}/{aside}")
    return True
