"""Garbage collection: attempts that no commit record names, and temporaries, once they are old enough.

Nobody can tell a slow writer's attempt from a killed one's, so only age decides, by the storage's own clock. Even if
the limit was too short, nothing acknowledged is lost: an attempt is first moved aside, and moved back if its record has
appeared meanwhile; a writer that finds its attempt gone withdraws its record and fails.
"""

from dataclasses import dataclass

from cache_store.format import commit_record, store_root
from cache_store.format.names import SAMPLES, key_of_attempt
from cache_store.format.store_root import StoreRoot
from cache_store.storage.local_storage import STAGING
from cache_store.storage.storage import Storage, StorePath, open_storage

_ASIDE = "garbage."


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbageReport:
    """Garbage that was removed, or would be."""

    attempts: tuple[str, ...]
    """Names of folders in `samples/`."""
    temporaries: int
    """Number of files in `staging/`."""
    size_bytes: int
    kept_young: int
    """Number of attempts and temporaries without a record that have not reached the age."""


def collect_garbage(path: StorePath, *, min_age_s: float = 24 * 3600.0, dry_run: bool = False) -> GarbageReport:
    """Remove what no record names and nothing has touched for `min_age_s`: by default far longer than an attempt takes.

    Raises `FormatError` if any commit record is damaged: its attempt could not be told from garbage; run `verify` with
    `repair` first. Safe beside readers and writers, and beside other collectors.
    """
    storage = open_storage(path)
    root = store_root.read(storage)
    now = storage.clock_ns() / 1e9
    removed, temporaries, size, young = [], 0, 0, 0
    # All are listed before any record is read: a record that appears meanwhile is seen.
    for name in sorted(filter(key_of_attempt, storage.names(SAMPLES))):
        if _is_committed(storage, root, name):
            continue
        attempt_bytes, changed = storage.extent(f"{SAMPLES}/{name}")
        if now - changed < min_age_s:
            young += 1
        elif dry_run or (  # it cannot be set aside where its writer gave up, or another collector was first
            storage.set_aside(f"{SAMPLES}/{name}", f"{STAGING}/{_ASIDE}{name}") and _finish(storage, root, name)
        ):
            removed.append(name)
            size += attempt_bytes
    for name in sorted(storage.names(STAGING, flat=True)):
        if name.startswith(_ASIDE):
            if not dry_run:
                _finish(storage, root, name.removeprefix(_ASIDE))
            continue
        temporary_bytes, changed = storage.extent(f"{STAGING}/{name}")
        if now - changed < min_age_s:
            young += 1
            continue
        temporaries += 1
        size += temporary_bytes
        if not dry_run:
            storage.delete([f"{STAGING}/{name}"])
    return GarbageReport(attempts=tuple(removed), temporaries=temporaries, size_bytes=size, kept_young=young)


def _is_committed(storage: Storage, root: StoreRoot, name: str) -> bool:
    try:
        record = commit_record.read(storage, root, key_of_attempt(name))
    except FileNotFoundError:
        return False
    return record.folder == f"{SAMPLES}/{name}"


def _finish(storage: Storage, root: StoreRoot, name: str) -> bool:
    """Remove what was moved aside (by a killed collector, too), unless it was committed at the last moment."""
    folder, aside = f"{SAMPLES}/{name}" if key_of_attempt(name) else "", f"{STAGING}/{_ASIDE}{name}"
    if folder and _is_committed(storage, root, name):
        storage.put_back(folder, aside)
        return False
    storage.drop(folder, aside)
    return True
