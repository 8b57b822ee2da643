"""The file name of a sample: any id (with '/', '..', any script, any length) becomes a short safe ASCII name.

Samples lie flat in one folder. Readers list only `commits/`, which has to be listed whole with or without fan-out,
and today's file systems index their folders, so 256 subfolders would add operations to each write and save none.
"""

import hashlib
import re

from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.storage.storage import Storage

MAX_ID_BYTES = 4096
_READABLE_CHARACTERS = 32
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,32}-[0-9a-f]{32}")
_ATTEMPT = re.compile(r"[0-9a-f]{16}")

assert MAX_ID_BYTES < MAX_DOCUMENT_BYTES


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


def is_key(name: str) -> bool:
    """Whether a file stem can be a sample's key."""
    return _KEY.fullmatch(name) is not None


def is_attempt(name: str) -> bool:
    """Whether a name from a record can be an attempt."""
    return _ATTEMPT.fullmatch(name) is not None


def keys(storage: Storage, folder: str) -> list[str]:
    """The keys that have a record in this folder of a store; other names are no records."""
    found = (name.removesuffix(".json") for name in storage.names(folder, flat=True) if name.endswith(".json"))
    return sorted(key for key in found if is_key(key))
