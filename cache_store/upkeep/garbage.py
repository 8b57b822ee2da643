"""Garbage collection: attempts that no commit record names, and temporaries, once they are old enough.

Nobody can tell a slow writer's attempt from a killed one's, so only age decides, by the storage's own clock. Even if
the limit was too short, nothing acknowledged is lost: an attempt is first moved aside, and moved back if its record has
appeared meanwhile; a writer that finds its attempt gone withdraws its record and fails.

That a record is not there is believed only if no listing shows it and several readings say so. Attempts at a sample
whose record cannot be read are kept, and those whose record a repair has set aside, until told to drop them.
"""

from collections.abc import Container
from dataclasses import dataclass

from cache_store.errors import FormatError, UnreachableStoreError
from cache_store.format import codec_tables, commit_record, store_root
from cache_store.format.names import CODECS, COMMITS, SAMPLES, key_of_attempt, list_aside, list_keys
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
    """Number of files in `staging/`, and of tables of codecs that the root does not name."""
    size_bytes: int
    kept_young: int
    """Number of attempts and temporaries without a record that have not reached the age."""
    kept_unclear: int
    """Number of attempts at samples whose record cannot be read; `verify` with `repair` settles what they are."""
    set_aside: int
    """Number of records that a repair had set aside: dropped if that was asked for, else kept with their attempts."""


def collect_garbage(
    path: StorePath, *, min_age_s: float = 24 * 3600.0, dry_run: bool = False, drop_set_aside: bool = False
) -> GarbageReport:
    """Remove what no record names and nothing has touched for `min_age_s`: by default far longer than an attempt takes.

    `drop_set_aside` removes for good what repairs have set aside, too. Safe beside readers and writers, and beside
    other collectors.
    """
    storage = open_storage(path)
    root = store_root.read(storage)
    now = storage.clock_ns() / 1e9
    removed, temporaries, size, young, unclear = [], 0, 0, 0, 0
    # All are listed before any record is: a record that appears meanwhile is seen.
    attempts = sorted(filter(key_of_attempt, storage.names(SAMPLES)))
    aside, listed = list_aside(storage), set(list_keys(storage, COMMITS))
    kept = set() if drop_set_aside else set(aside.values())
    for name in attempts:
        key = key_of_attempt(name)
        if key in listed:
            committed = _is_committed(storage, root, name, listed=True)
            unclear += committed is None
            if committed is not False:
                continue
        if key in kept:
            continue
        attempt_bytes, changed = storage.extent(f"{SAMPLES}/{name}")
        if now - changed < min_age_s:
            young += 1
        elif dry_run or (  # it cannot be set aside where its writer gave up, or another collector was first
            storage.set_aside(f"{SAMPLES}/{name}", f"{STAGING}/{_ASIDE}{name}") and _finish(storage, root, name, listed)
        ):
            removed.append(name)
            size += attempt_bytes
    spare = {f"{CODECS}/{name}" for name in storage.names(CODECS)} if CODECS in storage.names("") else set()
    if (tables := codec_tables.name_in(root.identity)) is not None:
        spare.discard(codec_tables.path_of(tables))
    staged = sorted(storage.names(STAGING, flat=True))
    for name in staged if not dry_run else ():
        if name.startswith(_ASIDE):
            _finish(storage, root, name.removeprefix(_ASIDE), listed)
    # Tables are of writers that lost the race for the root, or were killed before it.
    for left in (*sorted(spare), *(f"{STAGING}/{name}" for name in staged if not name.startswith(_ASIDE))):
        left_bytes, changed = storage.extent(left)
        if now - changed < min_age_s:
            young += 1
            continue
        temporaries += 1
        size += left_bytes
        if not dry_run:
            storage.delete([left])
    if drop_set_aside and not dry_run:
        storage.delete(aside)
    return GarbageReport(
        attempts=tuple(removed),
        temporaries=temporaries,
        size_bytes=size,
        kept_young=young,
        kept_unclear=unclear,
        set_aside=len(aside),
    )


def _is_committed(storage: Storage, root: StoreRoot, name: str, *, listed: bool) -> bool | None:
    """Tell whether the attempt's sample has a record that names this attempt; None where that cannot be told.

    `listed`: whether a listing shows the record, so that its absence would be a passing fault.
    """
    try:
        record = commit_record.read(storage, root, key_of_attempt(name), waits_s=None if listed else (0.0, 0.0))
    except FileNotFoundError:
        return None if listed else False
    except UnreachableStoreError:
        raise
    except (FormatError, OSError):
        return None
    return record.folder == f"{SAMPLES}/{name}"


def _finish(storage: Storage, root: StoreRoot, name: str, listed: Container[str]) -> bool:
    """Remove what was moved aside (by a killed collector, too), unless it was committed at the last moment."""
    key, aside = key_of_attempt(name), f"{STAGING}/{_ASIDE}{name}"
    folder = f"{SAMPLES}/{name}" if key else ""
    if folder and _is_committed(storage, root, name, listed=key in listed) is not False:
        storage.put_back(folder, aside)
        return False
    storage.drop(folder, aside)
    return True
