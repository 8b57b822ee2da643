"""A document of a store under inspection, and of a commit record its sample, too: what of it was not found whole yet.

Nothing is condemned on one reading. What is not whole is read again, each time freshly and alone, as often and as late
as the caller likes. It is damaged if no reading found it whole and two said the same of it: a line that flips bits says
something else each time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.errors import CorruptSampleError, FormatError, UnreachableStoreError, UnreadableSampleError
from cache_store.format import commit_record
from cache_store.format.commit_record import CommitRecord, StoredObject
from cache_store.format.field import SMALL
from cache_store.format.names import COMMITS, record_path
from cache_store.format.store_root import StoreRoot
from cache_store.format.stored_sample import StoredSample
from cache_store.storage.storage import Storage

_AT_ONCE = (0.0,) * 8
"""Further tries of a document of which every byte was found right a moment ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is not as it was written, or cannot be read."""

    sample_id: str
    """Empty where it concerns the store as a whole, or a record too damaged to tell."""
    object: str
    """Path of the file, relative to the root."""
    field: str
    """Field that cannot be read; empty where it is all of them."""
    what: str
    """For a person: got, expected."""


class Inspection:
    """A document: `look` until it is whole, or long enough, then `judge`."""

    def __init__(
        self, storage: Storage, name: str, parse: Callable[[bytes], Any], *, missing: FormatError | None = None
    ) -> None:
        """`parse` raises `FormatError` for bytes that are not right; `missing`: what absence means, if it is damage."""
        self.storage, self.name = storage, name
        self.content: bytes | str = b""
        """Content that was judged, as `content_of` has it."""
        self.value: Any = None
        """The parsed document, once it was read rightly."""
        self.failed: set[str] = set()
        """Objects that were not whole when first read."""
        self.gone = False
        """True if it was not there when last read."""
        self._parse, self._missing = parse, missing
        self._findings: list[tuple[Damage, bool]] = []
        """Finding of the last look, and whether it is about the bytes and not about the way to them."""
        self._said: Counter[Damage] = Counter()

    @property
    def whole(self) -> bool:
        """True if the last look left nothing to be desired."""
        return not self._findings

    @property
    def passed(self) -> int:
        """Number of objects that failed at first and were found whole later."""
        return len(self.failed - {damage.object for damage, _ in self._findings})

    def look(self) -> "Inspection":
        """Read what was not found whole yet; returns itself."""
        self._findings = []
        if self.value is None:
            self._forget(self.name)
            self.gone = False
            try:
                self.content = content_of(self.storage, self.name)
                if isinstance(self.content, str):
                    raise FormatError(self.content)
                self.value = self._parse(self.content)
            except UnreachableStoreError:
                raise
            except (FormatError, OSError) as error:
                self.gone = isinstance(error, FileNotFoundError)
                self._find(self._missing if self.gone and self._missing else error, self.name)
                return self
        self._look_further()
        return self

    def judge(self) -> tuple[list[Damage], list[Damage]]:
        """Objects that are damaged, and those that only could not be read."""
        damaged, unreadable = [], []
        for damage, of_bytes in self._findings:
            if of_bytes and self._said[damage] > 1:
                damaged.append(damage)
            elif of_bytes:
                other = "No two readings said the same: suspect the memory, the line or the disk's controller."
                unreadable.append(replace(damage, what=f"{damage.what} {other}"))
            else:
                unreadable.append(damage)
        return damaged, unreadable

    def _look_further(self) -> None:
        pass

    def _forget(self, name: str) -> None:
        if name in self.failed:
            self.storage.forget(name)

    def _find(self, found: Exception | str, name: str, *, sample_id: str = "", field: str = "") -> None:
        """Note what is wrong with an object: an error, or in words what its bytes are not."""
        error = found.__cause__ if isinstance(found, UnreadableSampleError) and found.__cause__ else found
        of_bytes = isinstance(error, str | FormatError | CorruptSampleError)
        what = str(error)
        if isinstance(error, FileNotFoundError):
            what = "is gone since its folder was listed; verify again."
        elif isinstance(error, OSError) and not of_bytes:
            what = f"cannot be read ({error.strerror or error}); repair leaves it. See to the permissions and the disk."
        damage = Damage(sample_id=sample_id, object=name, field=field, what=what)
        self.failed.add(name)
        self._said[damage] += 1
        self._findings.append((damage, of_bytes))


class SampleInspection(Inspection):
    """A commit record and all objects that it names."""

    def __init__(self, storage: Storage, root: StoreRoot, key: str, *, deep: bool, name: str = "") -> None:
        """`name`: where the record is, unless in its place."""
        parse = partial(commit_record.from_bytes, storage, root, key)
        super().__init__(storage, name or record_path(COMMITS, key), parse)
        self._fields, self._deep = root.fields, deep
        self._pending: list[StoredObject] | None = None

    def _look_further(self) -> None:
        record: CommitRecord = self.value
        sample = StoredSample(self.storage, record, self._fields, waits_s=())
        objects = list(record.objects.values()) if self._pending is None else self._pending
        self._pending = [stored for stored in objects if not self._is_whole(sample, stored)]
        if not self._pending and self._deep:
            try:
                check_documents(replace(sample, waits_s=_AT_ONCE))
            except UnreachableStoreError:
                raise
            except (FormatError, OSError) as error:
                self._find(error, record.folder, sample_id=record.sample_id)

    def _is_whole(self, sample: StoredSample, stored: StoredObject) -> bool:
        name = f"{sample.record.folder}/{stored.path}"
        field = "" if stored.array in ("", SMALL) else stored.array
        found: Exception | str = ""
        self._forget(name)
        try:
            if self._deep:
                sample.load(stored, field)
            elif (size := self.storage.size_bytes(name)) != stored.size:
                found = f"has {size} bytes, expected {stored.size}."
        except UnreachableStoreError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            found = "is missing."
        except (FormatError, OSError) as error:
            found = error
        if found:
            self._find(found, name, sample_id=sample.record.sample_id, field=field)
        return not found


def check_documents(sample: StoredSample) -> None:
    """Raise `FormatError`, or what reading does, unless the sample's Zarr metadata are those of its commit record."""
    record, fields = sample.record, sample.fields
    arrays = [name for name in record.shapes if fields[name].layout == "array"]
    if any(fields[name].layout == "packed" for name in record.shapes):
        arrays.append(SMALL)
    sample.check_group("")
    for array in arrays:
        sample.check_array(array, array)
    if {stored.array for stored in record.objects.values()} != {"", *arrays}:
        raise FormatError(f"the record names objects of other arrays than {arrays}.")


def content_of(storage: Storage, name: str) -> bytes | str:
    """Bytes of a record; the refusal where it is refused unread (too large, a link)."""
    try:
        return storage.read_document(name, MAX_DOCUMENT_BYTES)
    except FormatError as error:
        return str(error)
