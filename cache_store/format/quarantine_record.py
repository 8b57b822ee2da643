"""The quarantine record: a sample that could not be made, why, and how often it was tried.

It is replaced, not put-if-absent: of two writers that fail at once one count may be lost, which does no harm. A commit
record always outranks it.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from cache_store.document import MAX_DOCUMENT_BYTES, check_seal, parse, seal, take
from cache_store.errors import FormatError
from cache_store.format.sample_key import sample_key
from cache_store.storage.storage import Storage

FOLDER = "quarantine"
MAX_REASON_CHARACTERS = 2000
MAX_TRACEBACK_CHARACTERS = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRecord:
    """Why a sample is not in the store."""

    sample_id: str
    kind: str
    """A short stable word for counting."""
    reason: str
    """For a person: what is wrong, where, what would help."""
    traceback: str
    """The end of the traceback."""
    traceback_sha256: str
    """Digest of the whole traceback: equal ones failed alike."""
    attempts: int
    """How often it failed, over all runs."""
    released: bool
    """Marked for another try; not quarantined now."""

    @classmethod
    def of_failure(
        cls, sample_id: str, *, kind: str, reason: str, traceback_text: str, attempts: int
    ) -> "QuarantineRecord":
        return cls(
            sample_id=sample_id,
            kind=kind,
            reason=_encodable(reason)[:MAX_REASON_CHARACTERS],
            traceback=_encodable(traceback_text)[-MAX_TRACEBACK_CHARACTERS:],
            traceback_sha256=hashlib.sha256(_encodable(traceback_text).encode()).hexdigest(),
            attempts=attempts,
            released=False,
        )

    def to_bytes(self) -> bytes:
        document = {name: getattr(self, name) for name in _TYPES}
        return seal(document, f"the quarantine record of sample {self.sample_id!r}")

    @classmethod
    def from_bytes(cls, data: bytes, where: str, *, key: str) -> "QuarantineRecord":
        check_seal(data, where)
        document: dict[str, Any] = parse(data, where)
        values = {name: take(document, name, kind, where) for name, kind in _TYPES.items()}
        try:
            right_key = sample_key(values["sample_id"])
        except ValueError as error:
            raise FormatError(f"{where}: {error}") from error
        if right_key != key:
            raise FormatError(f"{where} is the record of another sample, {values['sample_id']!r}.")
        return cls(**values)


_TYPES: dict[str, type] = {
    "sample_id": str,
    "kind": str,
    "reason": str,
    "traceback": str,
    "traceback_sha256": str,
    "attempts": int,
    "released": bool,
}


def read(storage: Storage, key: str) -> QuarantineRecord | None:
    """The record with this key, if there is one."""
    relative = f"{FOLDER}/{key}.json"
    try:
        data = storage.read_document(relative, MAX_DOCUMENT_BYTES)
    except FileNotFoundError:
        return None
    return checked(storage, key, data)


def checked(storage: Storage, key: str, data: bytes) -> QuarantineRecord:
    """The record with this key from the untrusted bytes of its file."""
    where = f"quarantine record {storage.where(f'{FOLDER}/{key}.json')}"
    try:
        return QuarantineRecord.from_bytes(data, where, key=key)
    except FormatError as error:
        raise FormatError(f"{error} It holds no data: remove the file and the sample is tried again.") from error


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
