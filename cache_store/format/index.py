"""The index of a store: its sample ids in one file, so that a million samples open in a moment. Never the truth.

It may be missing, damaged or stale at any time; readers then list the commit records as if there were none. It is
fresh if the folder `commits/` has the modification time that it had when it was listed, and that time was more than
a second past by then (file systems stamp coarsely). Even a fresh one only says which ids to offer: the record of a
sample is read and checked before the sample is.
"""

import struct
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from cache_store import rereading
from cache_store.checksum import crc32c
from cache_store.concurrency import in_order
from cache_store.errors import FormatError, SampleReadError, UnreachableStoreError
from cache_store.format import commit_record, store_root
from cache_store.format.names import COMMITS, INDEX, SAMPLES, list_keys, record_path, sample_key
from cache_store.format.store_root import StoreRoot
from cache_store.storage.local_files import writing
from cache_store.storage.storage import Storage, StorePath, open_storage

MAX_BYTES = 2**34
_HEADER = struct.Struct("<8sIIqQQ")
_MAGIC = b"csindex1"
_CHECKED_FROM = 16
"""First byte that the checksum covers."""
_SETTLED_NS = 10**9


class SampleIds(Sequence[str]):
    """Immutable sorted ids as one run of UTF-8, ordered as code points are: a million strings would take too much."""

    __slots__ = ("ends", "text")

    def __init__(self, text: bytes, ends: NDArray[np.uint64]) -> None:
        """`text`: all ids, sorted, one after the other; `ends`: where each ends."""
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, ids: Iterable[str]) -> "SampleIds":
        encoded = sorted({sample_id.encode() for sample_id in ids})
        return cls(b"".join(encoded), np.cumsum([len(item) for item in encoded], dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._bytes(range(len(self))[index]).decode()

    def __contains__(self, sample_id: object) -> bool:
        if not isinstance(sample_id, str):
            return False
        try:
            wanted = sample_id.encode()
        except UnicodeEncodeError:
            return False
        place = bisect_left(range(len(self)), wanted, key=self._bytes)
        return place < len(self) and self._bytes(place) == wanted

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise([0, *self.ends.tolist()]):
            yield self.text[start:end].decode()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SampleIds):
            return self.text == other.text and np.array_equal(self.ends, other.ends)
        return isinstance(other, Sequence) and not isinstance(other, str) and tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return f"SampleIds({', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''}; {len(self)})"

    def _bytes(self, place: int) -> bytes:
        start = int(self.ends[place - 1]) if place else 0
        return self.text[start : int(self.ends[place])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Content of the file."""

    ids: SampleIds
    listed_ns: int
    """Modification time of `commits/` when it was listed; 0 if it had not settled."""

    def is_fresh(self, storage: Storage) -> bool:
        return self.listed_ns != 0 and self.listed_ns == storage.folder_time_ns(COMMITS)


def build_index(path: StorePath) -> int:
    """Write the index of a store anew and return its number of samples; records that an old one has are not read.

    Waits up to a second for the folder's modification time to settle.
    """
    storage = open_storage(path)
    return build(storage, store_root.read(storage))


def build(storage: Storage, root: StoreRoot, known: Iterable[str] = ()) -> int:
    """Do the same for a store that is open already; records of known ids are not read either."""
    listed_ns = _settled_ns(storage)
    before = read(storage)
    ids, unreadable = list_ids(storage, root, SampleIds.of(chain(known, before.ids if before else ())))
    if any(not error.sample_id for error in unreadable):
        listed_ns = 0  # never fresh: readers have to see that a record is not among the ids
    body = _HEADER.pack(_MAGIC, 0, 0, listed_ns, len(ids), len(ids.text)) + ids.ends.tobytes() + ids.text
    checked = body[_CHECKED_FROM:]
    data = _MAGIC + struct.pack("<II", crc32c(checked), 0) + checked
    with writing("the index", len(data), storage.place):
        storage.put(INDEX, [data])
    return len(ids)


def list_ids(storage: Storage, root: StoreRoot, known: SampleIds) -> tuple[SampleIds, tuple[SampleReadError, ...]]:
    """List the ids of all committed samples; the records of ids that are not known are read and checked.

    Returns, too, what is wrong with the records that cannot be read, however often. Their samples are listed all the
    same, so that one bad record changes nothing for the others, unless not even the id can be told.
    """
    by_key: dict[str, str] = {sample_key(sample_id): sample_id for sample_id in known}

    def id_of(key: str) -> str | Exception:
        try:
            return by_key.get(key) or commit_record.read(storage, root, key, waits_s=()).sample_id
        except UnreachableStoreError:
            raise
        except (FormatError, OSError) as error:
            return error

    ids: list[str] = []
    failed: dict[str, Exception] = {}
    wanted = list_keys(storage, COMMITS)
    for wait_s in (*rereading.WAITS_S, None):  # many that fail wait together
        failed = {}
        for key, outcome in zip(wanted, in_order(id_of, wanted, storage.threads), strict=True):
            if isinstance(outcome, str):
                ids.append(outcome)
            else:
                failed[key] = outcome
        if not failed or wait_s is None:
            break
        time.sleep(wait_s)
        wanted = list(failed)
        for key in wanted:
            storage.forget(record_path(COMMITS, key))
    if not failed:
        return SampleIds.of(ids), ()
    there, attempts = set(list_keys(storage, COMMITS)), list(storage.names(SAMPLES))
    failed = {key: error for key, error in failed.items() if key in there}  # the others were removed meanwhile
    ids_of_failed = {key: by_key.get(key) or commit_record.find_id(storage, key, attempts) for key in failed}
    errors = [commit_record.unreadable(storage, key, error, ids_of_failed[key]) for key, error in failed.items()]
    return SampleIds.of([*ids, *filter(None, ids_of_failed.values())]), tuple(errors)


def read(storage: Storage) -> Index | None:
    """The index, or nothing if it is missing or not whole."""
    try:
        data = storage.read_document(INDEX, MAX_BYTES)
    except (FileNotFoundError, FormatError):
        return None
    if len(data) < _HEADER.size:
        return None
    magic, crc, reserved, listed_ns, count, text_bytes = _HEADER.unpack_from(data)
    good = magic == _MAGIC and reserved == 0 and len(data) == _HEADER.size + 8 * count + text_bytes
    if not good or crc != crc32c(memoryview(data)[_CHECKED_FROM:]):
        return None
    ends = np.frombuffer(data, "<u8", count, _HEADER.size).copy()
    text = data[_HEADER.size + 8 * count :]
    if (int(ends[-1]) if count else 0) != text_bytes or (count > 1 and not bool(np.all(ends[1:] > ends[:-1]))):
        return None
    return Index(ids=SampleIds(text, ends), listed_ns=listed_ns)


def _settled_ns(storage: Storage) -> int:
    """The modification time of `commits/` once it is a second old; 0 while other writers keep changing it."""
    for wait_s in (1.1, 0):
        listed_ns = storage.folder_time_ns(COMMITS)
        if listed_ns == 0 or storage.clock_ns() - listed_ns > _SETTLED_NS:
            return listed_ns
        time.sleep(wait_s)
    return 0
