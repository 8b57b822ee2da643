"""Names in a store: its folders, and a short safe ASCII file name for any sample id ('/', '..', any script or length).

Samples lie flat in one folder. Readers list only `commits/`, which has to be listed whole with or without fan-out, and
today's file systems index their folders, so 256 subfolders would add operations to each write and save none.
"""

import hashlib
import re
import secrets

from cache_store.errors import FormatError
from cache_store.storage.local_storage import ROOT_DOCUMENT, STAGING
from cache_store.storage.storage import Storage

METADATA = ROOT_DOCUMENT
"""Metadata of every group and array, that of the store itself included."""
SAMPLES = "samples"
COMMITS = "commits"
QUARANTINE = "quarantine"
FOLDERS = (SAMPLES, COMMITS, QUARANTINE, STAGING)
INDEX = "index"
CODECS = "codecs"
"""Folder of the tables of a codec that was calibrated; only a store with such a codec has it."""
ASIDE = "aside"
"""Folder of the records that a repair has taken out of their places; made by the first repair that finds any."""

MAX_ID_BYTES = 4096
_READABLE_CHARACTERS = 32
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,32}-[0-9a-f]{32}")
_ATTEMPT = re.compile(r"[0-9a-f]{16}")


def sample_key(sample_id: str) -> str:
    """A readable start (unsafe characters as `_`) and 128 bits of SHA-256, which alone tell ids apart."""
    if not isinstance(sample_id, str) or not sample_id:
        raise ValueError(f"a sample id is a non-empty string, got {sample_id!r}.")
    try:
        encoded = sample_id.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"sample id {sample_id!r} is not valid Unicode: {error}.") from error
    if len(encoded) > MAX_ID_BYTES:
        raise ValueError(f"sample id {sample_id[:60]!r}... takes {len(encoded)} bytes; the limit is {MAX_ID_BYTES}.")
    return f"{_UNSAFE.sub('_', sample_id[:_READABLE_CHARACTERS])}-{hashlib.sha256(encoded).hexdigest()[:32]}"


def check_key(sample_id: str, key: str, where: str) -> None:
    """Raise `FormatError` unless this is the key of the sample that an untrusted record names."""
    try:
        right_key = sample_key(sample_id)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error
    if right_key != key:
        raise FormatError(f"{where} is the record of sample {sample_id!r}, whose file name is {right_key}.json.")


def record_path(folder: str, key: str) -> str:
    """Path of a sample's record in `COMMITS` or `QUARANTINE`."""
    return f"{folder}/{key}.json"


def is_key(name: str) -> bool:
    """Tell whether a file stem can be a sample's key."""
    return _KEY.fullmatch(name) is not None


def is_attempt(name: str) -> bool:
    """Tell whether a name from a record can be an attempt."""
    return _ATTEMPT.fullmatch(name) is not None


def key_of_attempt(folder: str) -> str:
    """Key of an attempt's folder in `samples/`; empty for any other name."""
    key, _, attempt = folder.rpartition(".")
    return key if is_key(key) and is_attempt(attempt) else ""


def list_keys(storage: Storage, folder: str) -> list[str]:
    """Sorted keys that have a record in this folder of a store; files of other names are no records."""
    stems = (name.removesuffix(".json") for name in storage.names(folder, flat=True) if name.endswith(".json"))
    return sorted(filter(is_key, stems))


def aside_path(record: str) -> str:
    """A new place in `ASIDE` for the record with this path."""
    folder, _, name = record.partition("/")
    return f"{ASIDE}/{folder}.{name.removesuffix('.json')}.{secrets.token_hex(8)}.json"


def list_aside(storage: Storage) -> dict[str, str]:
    """The commit records that were set aside: path -> key of the sample."""
    if ASIDE not in storage.names(""):
        return {}
    names = storage.names(ASIDE, flat=True)
    places = {f"{ASIDE}/{name}": name.removeprefix(f"{COMMITS}.").removesuffix(".json") for name in sorted(names)}
    return {path: key for path, attempt in places.items() if (key := key_of_attempt(attempt))}
