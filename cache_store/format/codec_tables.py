"""Tables of a codec that a calibration found: one object of a store, named by its hash, which the identity holds.

It is there before the root that names it, and never changes. A writer that was killed between the two, or that lost the
race for the root, leaves one that nothing names; the garbage collector takes it.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from cache_store.errors import FormatError
from cache_store.format.names import CODECS
from cache_store.rereading import reread
from cache_store.storage.local_files import opening
from cache_store.storage.storage import Storage, StorePath, open_storage

MAX_BYTES = 1 << 34
"""Far above what the tables of a released model take, some hundred MB."""
_NAME = re.compile("[0-9a-f]{64}")


def name_in(identity: Mapping[str, Any]) -> str | None:
    """Hash of the tables that a store's identity names; None where its codec has none."""
    definition = identity.get("codec_definition")
    name = definition.get("tables_sha256") if isinstance(definition, Mapping) else None
    return name if isinstance(name, str) and is_name(name) else None


def is_name(text: str) -> bool:
    """Tell whether an object of the folder can be tables."""
    return _NAME.fullmatch(text) is not None


def path_of(name: str) -> str:
    """Place of tables in a store, by their hash."""
    return f"{CODECS}/{name}"


def check(data: bytes, name: str, where: str) -> bytes:
    """The same bytes. Raises `FormatError` where they are not those of this hash."""
    if (found := hashlib.sha256(data).hexdigest()) != name:
        raise FormatError(
            f"{where} has SHA-256 {found[:16]}..., its name says {name[:16]}...: the tables of the codec are damaged, "
            "and no keys and values can be decoded without them. Restore the file from a copy of the store."
        )
    return data


def put(storage: Storage, data: bytes) -> str:
    """Store tables, unless they are there; returns their hash."""
    name = hashlib.sha256(data).hexdigest()
    storage.make_folders([CODECS])
    storage.put_if_absent(path_of(name), data)
    return name


def read(storage: Storage, name: str) -> bytes:
    """Tables by their hash, every byte checked. Raises `FormatError` where they are absent or damaged."""
    path = path_of(name)

    def read_once() -> bytes:
        return check(storage.read_document(path, MAX_BYTES), name, storage.where(path))

    with opening(storage.place):
        try:
            return reread(read_once, partial(storage.forget, path))
        except FileNotFoundError as error:
            raise FormatError(
                f"{storage.where(path)}, the tables of the store's codec, is missing (was the store copied only in "
                "part?); copy the store again with `alpacache copy`."
            ) from error


def read_at(path: StorePath, name: str) -> bytes:
    """`read` of the store at a path."""
    return read(open_storage(path), name)
