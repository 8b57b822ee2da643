"""Verification of a store: what is damaged, what cannot be read, what is left over.

Repair sets aside what is damaged and nothing else; no byte is ever guessed. It moves records only: the objects stay
where they are, and no collector takes them until it is told to, so that a person may look at them, or put them back.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from cache_store.concurrency import in_order
from cache_store.errors import FormatError, UnreachableStoreError
from cache_store.format import codec_tables, quarantine_record, store_root
from cache_store.format.commit_record import CommitRecord
from cache_store.format.names import (
    COMMITS,
    QUARANTINE,
    SAMPLES,
    aside_path,
    key_of_attempt,
    list_aside,
    list_keys,
    record_path,
    sample_key,
)
from cache_store.format.quarantine_record import QuarantineRecord
from cache_store.format.store_root import PLAIN_GROUP, PLAIN_GROUP_PATH, StoreRoot
from cache_store.storage.local_files import unreachable
from cache_store.storage.local_storage import STAGING
from cache_store.storage.storage import Storage, StorePath, open_storage
from cache_store.upkeep.inspection import Damage, Inspection, SampleInspection, content_of

ROUNDS_S = (0.0, 0.1, 0.3, 0.6, 1.0)
"""Pauses before all that was not whole is read again."""
REPAIR_ROUNDS_S = (*ROUNDS_S, 1.0, 2.0, 3.0)
"""The same before anything is set aside: nine readings over eight seconds or more. On a line where one answer in twenty
is wrong, one whole object in 5e11 would fail them all, and two of them would have to agree besides."""
_NO_GROUP = f"is not {PLAIN_GROUP.decode()}; only other Zarr readers use it."
_DEEP_THREADS = 8
"""Objects in memory at a time, where reading several at once is worth it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """State of a store as `verify` saw it."""

    deep: bool
    samples: int
    """Number of commit records looked at, the damaged ones included."""
    size_bytes: int
    """Bytes of the objects that the readable records name."""
    damaged: tuple[Damage, ...]
    """Objects that no reading found whole."""
    unreadable: tuple[Damage, ...]
    """Objects that could not be read, or not twice alike, which proves no damage, or could not be repaired."""
    passing: int
    """Number of objects that were not read rightly at first and were whole when read again."""
    orphans: tuple[str, ...]
    """Folders in `samples/` of running writers or killed ones: no record names them, nor is kept for them."""
    stale_temporaries: int
    """Number of files in `staging/`, of running or of killed writers."""
    quarantined: int
    set_aside: int
    """Number of commit records that repairs have set aside, this one included."""
    repaired: tuple[str, ...] = ()
    """Damaged files that were set aside or made anew, relative to the root: commit records (their samples can be
    extracted again), quarantine records, `samples/zarr.json`."""
    restored: tuple[str, ...] = ()
    """Commit records that were put back, as their samples are whole."""

    @property
    def ok(self) -> bool:
        """True if nothing was damaged or unreadable; after a repair verify again."""
        return not self.damaged and not self.unreadable


def verify(path: StorePath, *, deep: bool = False, repair: bool = False, restore: bool = False) -> VerifyReport:
    """Check all records and the presence and size of all objects; with `deep` also every byte against its checksum.

    The tables of a learnt codec are always read.

    What is not whole is read again, several times over some seconds, before it counts as damaged. With `repair` the
    commit records of damaged samples and all damaged records are set aside, so that the samples are absent and can be
    written again; not to be run beside another repair. What was not given out is left alone. With `restore` the samples
    that were set aside are first read whole, and put back where they are sound and were not written again.
    Raises `StoreNotFoundError`, `UnreachableStoreError` where the store stops answering, or `FormatError` if the root
    itself cannot be read; all other damage is in the report.
    """
    storage = open_storage(path)
    root = store_root.read(storage)
    restored = _restore(storage, root) if restore else ()
    commit_keys = list_keys(storage, COMMITS)
    _check_mounted(storage, commit_keys)
    threads = min(storage.threads, _DEEP_THREADS) if deep else storage.threads
    tally = _Tally()
    group = Inspection(storage, PLAIN_GROUP_PATH, _plain_group, missing=FormatError(_NO_GROUP)).look()
    samples = (SampleInspection(storage, root, key, deep=deep) for key in commit_keys)
    bad = [sample for sample in in_order(Inspection.look, samples, threads) if not tally.take(sample)]
    failures = [
        Inspection(storage, record_path(QUARANTINE, key), partial(quarantine_record.from_bytes, storage, key)).look()
        for key in list_keys(storage, QUARANTINE)
    ]
    rounds_s = REPAIR_ROUNDS_S if repair else ROUNDS_S
    _look_again(storage, root, [group, *bad, *failures], rounds_s, threads)
    deque(map(tally.take, bad), maxlen=0)
    failures = [item for item in failures if not item.gone]  # released, or committed since the folder was listed
    suspects = [group, *bad, *failures]
    judged = [(item, *item.judge()) for item in suspects]
    tables = _look_at_tables(storage, root)
    repaired, refused = _repair(storage, [item for item, damaged, _ in judged if damaged]) if repair else ((), ())
    aside = list_aside(storage)
    kept = {*aside.values(), *(set(commit_keys) - tally.committed)}
    attempts = sorted(filter(key_of_attempt, storage.names(SAMPLES)))
    records: list[QuarantineRecord] = [item.value for item in failures if item.value is not None]
    return VerifyReport(
        deep=deep,
        samples=len(commit_keys),
        size_bytes=tally.size_bytes,
        damaged=(*tables[0], *(damage for _, damaged, _ in judged for damage in damaged)),
        unreadable=(*tables[1], *(damage for _, _, unreadable in judged for damage in unreadable), *refused),
        passing=sum(item.passed for item in suspects),
        orphans=tuple(name for name in attempts if name not in tally.folders and key_of_attempt(name) not in kept),
        stale_temporaries=sum(1 for _ in storage.names(STAGING, flat=True)),
        quarantined=sum(not item.released and sample_key(item.sample_id) not in tally.committed for item in records),
        set_aside=len(aside),
        repaired=repaired,
        restored=restored,
    )


def _look_at_tables(storage: Storage, root: StoreRoot) -> tuple[tuple[Damage, ...], tuple[Damage, ...]]:
    """Read the tables of the store's codec: damage, which no repair can mend, and what is unreadable.

    Always every byte: they are one object, without which no sample decodes, and no record has their size.
    """
    name = codec_tables.name_in(root.identity)
    if name is None:
        return (), ()
    path = codec_tables.path_of(name)
    try:
        codec_tables.read(storage, name)
    except FormatError as error:
        return (Damage(sample_id="", object=path, field="", what=str(error)),), ()
    except OSError as error:
        return (), (Damage(sample_id="", object=path, field="", what=str(error)),)
    return (), ()


class _Tally:
    """Totals of the readable commit records."""

    def __init__(self) -> None:
        self.committed: set[str] = set()
        """Keys."""
        self.folders: set[str] = set()
        """Their attempts in `samples/`."""
        self.size_bytes = 0

    def take(self, sample: Inspection) -> bool:
        """Count a sample whose record was read, once; returns whether it is whole."""
        record = sample.value
        if isinstance(record, CommitRecord) and (key := sample_key(record.sample_id)) not in self.committed:
            self.committed.add(key)
            self.folders.add(record.folder.rpartition("/")[2])
            self.size_bytes += record.size_bytes
        return sample.whole


def _look_again(
    storage: Storage, root: StoreRoot, suspects: Iterable[Inspection], rounds_s: Sequence[float], threads: int
) -> None:
    """Read what is not whole again after each pause. Raises `UnreachableStoreError` if it is the store that is gone."""
    for wait_s in rounds_s:
        if not (failing := [item for item in suspects if not item.whole]):
            return
        time.sleep(wait_s)
        deque(in_order(Inspection.look, failing, threads), maxlen=0)
    try:
        same = store_root.read(storage) == root
    except (OSError, FormatError) as error:
        raise unreachable(storage.place, FileNotFoundError()) from error
    if not same:
        raise unreachable(storage.place, FileNotFoundError())


def _check_mounted(storage: Storage, commit_keys: Sequence[str]) -> None:
    """Raise `UnreachableStoreError` where there are records and no data at all: a disk of its own, not mounted."""
    if commit_keys and not any(map(key_of_attempt, storage.names(SAMPLES))):
        what = f"{storage.where(SAMPLES)} is empty, and there are the records of {len(commit_keys)} samples"
        remedy = "If it lies on a disk of its own, mount that; if the data are gone, remove the store and extract again"
        raise UnreachableStoreError(f"{what}. {remedy}. Nothing was changed.")


def _restore(storage: Storage, root: StoreRoot) -> tuple[str, ...]:
    """Put back the records that were set aside, each if every byte of its sample is right and it has no other."""
    restored = []
    for path, key in list_aside(storage).items():
        name = record_path(COMMITS, key)
        sample = SampleInspection(storage, root, key, deep=True, name=path)
        _look_again(storage, root, [sample.look()], ROUNDS_S, 1)
        if sample.whole and isinstance(sample.content, bytes) and storage.put_if_absent(name, sample.content):
            storage.delete([path])
            restored.append(name)
    return tuple(restored)


def _repair(storage: Storage, broken: Iterable[Inspection]) -> tuple[tuple[str, ...], tuple[Damage, ...]]:
    """Set the broken records aside, each only if it still is what was judged (a sample may have been written anew).

    Returns what was repaired, and what could not be.
    """
    repaired, refused = [], []
    for item in sorted(broken, key=lambda item: item.name):
        try:
            if item.name == PLAIN_GROUP_PATH:
                storage.put(item.name, [PLAIN_GROUP])
            elif content_of(storage, item.name) == item.content:
                storage.move(item.name, aside_path(item.name))
            else:
                continue
        except FileNotFoundError:
            continue
        except UnreachableStoreError:
            raise
        except OSError as error:
            what = f"could not be repaired ({error.strerror or error}); see to the permissions and the disk."
            refused.append(Damage(sample_id="", object=item.name, field="", what=what))
            continue
        repaired.append(item.name)
    return tuple(repaired), tuple(refused)


def _plain_group(data: bytes) -> bytes:
    if data != PLAIN_GROUP:
        raise FormatError(_NO_GROUP)
    return data
