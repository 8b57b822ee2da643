"""The quarantine record: a sample that could not be made, why, and how often it was tried.

It is replaced rather than put if absent: of two failures at once one count may be lost. A commit record outranks it.
"""

import dataclasses
import hashlib
import logging
from dataclasses import dataclass
from functools import partial

from cache_store.document import MAX_DOCUMENT_BYTES, check_seal, parse, seal, take
from cache_store.errors import FormatError, UnreachableStoreError
from cache_store.format.names import QUARANTINE, check_key, record_path, sample_key
from cache_store.rereading import reread
from cache_store.storage.local_files import writing
from cache_store.storage.storage import Storage

_log = logging.getLogger(__name__)
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
    """Number of failures, over all runs."""
    released: bool
    """Marked for another try; not quarantined now."""


def read(storage: Storage, key: str) -> QuarantineRecord | None:
    """Read the record with this key, if there is one; again if that fails. Raises `FormatError` or `OSError`."""
    name = record_path(QUARANTINE, key)

    def read_record() -> QuarantineRecord | None:
        try:
            data = storage.read_document(name, MAX_DOCUMENT_BYTES)
        except FileNotFoundError:
            return None
        return from_bytes(storage, key, data)

    return reread(read_record, partial(storage.forget, name))


def read_if_sound(storage: Storage, key: str) -> QuarantineRecord | None:
    """Do the same, but take a record that cannot be read for none, with a warning: it holds no data."""
    try:
        return read(storage, key)
    except UnreachableStoreError:
        raise
    except (FormatError, OSError) as error:
        _log.warning("%s", error)
        return None


def from_bytes(storage: Storage, key: str, data: bytes) -> QuarantineRecord:
    """The record with this key from the untrusted bytes of its file."""
    where = f"quarantine record {storage.where(record_path(QUARANTINE, key))}"
    try:
        check_seal(data, where)
        document = parse(data, where)
        values = {
            field.name: take(document, field.name, field.type, where)  # type: ignore[arg-type]  # plain classes here
            for field in dataclasses.fields(QuarantineRecord)
        }
        check_key(values["sample_id"], key, where)
    except FormatError as error:
        raise FormatError(f"{error} It holds no data: remove the file and the sample is tried again.") from error
    return QuarantineRecord(**values)


def write(storage: Storage, record: QuarantineRecord) -> None:
    """Write the record durably, over an earlier one of the same sample."""
    what = f"the quarantine record of sample {record.sample_id!r}"
    data = seal(dataclasses.asdict(record), what)
    with writing(what, len(data), storage.place):
        storage.put(record_path(QUARANTINE, sample_key(record.sample_id)), [data])


def write_failure(storage: Storage, sample_id: str, kind: str, reason: str, traceback_text: str) -> None:
    """Record that a sample failed, once more if it has failed before."""
    before = read_if_sound(storage, sample_key(sample_id))
    encodable = traceback_text.encode(errors="backslashreplace")
    record = QuarantineRecord(
        sample_id=sample_id,
        kind=kind,
        reason=reason.encode(errors="backslashreplace").decode()[:MAX_REASON_CHARACTERS],
        traceback=encodable.decode()[-MAX_TRACEBACK_CHARACTERS:],
        traceback_sha256=hashlib.sha256(encodable).hexdigest(),
        attempts=before.attempts + 1 if before else 1,
        released=False,
    )
    write(storage, record)
