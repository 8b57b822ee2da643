"""The root of a store: format version, schema, identity and provenance, in the attributes of the root Zarr group."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cache_store.document import MAX_DOCUMENT_BYTES, canonical_json, check_seal, differences, parse, seal, take
from cache_store.errors import FormatError, IdentityMismatchError, StoreNotFoundError
from cache_store.format import codec_tables
from cache_store.format.field import Field
from cache_store.format.names import ASIDE, CODECS, FOLDERS, INDEX, METADATA, SAMPLES
from cache_store.rereading import reread
from cache_store.storage.local_files import opening
from cache_store.storage.storage import Storage

FORMAT_VERSION = 1
ATTRIBUTE = "cache_store"
PLAIN_GROUP_PATH = f"{SAMPLES}/{METADATA}"
PLAIN_GROUP = b'{"attributes":{},"node_type":"group","zarr_format":3}'
"""Content of `samples/zarr.json`: Zarr v3 wants every folder above an array to be a group."""
OPENING = b'{"attributes":{'
"""Beginning of the root document, before the seal: no text of a user's identity can come before that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRoot:
    """Settings that all samples of a store share."""

    fields: Mapping[str, Field]
    identity: Mapping[str, Any]
    """The settings that make samples comparable; different ones never share a store."""
    provenance: Mapping[str, Any]
    """Anything else the first writer recorded (library versions, hardware); a difference only warns."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of schema and identity; every commit record names it."""
        settings = {"fields": self._schema(), "identity": self.identity}
        return hashlib.sha256(canonical_json(settings).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        body = {
            "format_version": FORMAT_VERSION,
            "fields": self._schema(),
            "identity": self.identity,
            "provenance": self.provenance,
            "fingerprint": self.fingerprint,
        }
        document = {"attributes": {ATTRIBUTE: body}, "node_type": "group", "zarr_format": 3}
        return seal(document, "the root metadata", opening=OPENING)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "StoreRoot":
        document = parse(data, where)
        attributes = document.get("attributes")
        body = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
        if not isinstance(body, dict):
            raise FormatError(f"{where} is not the root of a store: its attributes have no {ATTRIBUTE!r}.")
        version = take(body, "format_version", int, where)
        if version > FORMAT_VERSION:
            known = FORMAT_VERSION
            raise FormatError(f"{where} has format version {version}; this library reads up to {known}. Update it.")
        check_seal(data, where)
        schema = [Field.from_json(item, where) for item in take(body, "fields", list, where)]
        try:
            fields = by_name(schema)
        except ValueError as error:
            raise FormatError(f"{where}: {error}") from error
        identity, provenance = take(body, "identity", dict, where), take(body, "provenance", dict, where)
        root = cls(fields=fields, identity=identity, provenance=provenance)
        if version != FORMAT_VERSION or take(body, "fingerprint", str, where) != root.fingerprint:
            raise FormatError(f"{where}: format version {version} or the settings fingerprint is not a valid one.")
        return root

    def check(self, given: "StoreRoot", where: Path | str) -> list[str]:
        """Raise if schema or identity of the given root differ; return the differences in provenance."""
        lines = [f"identity.{line}" for line in differences(given.identity, self.identity)]
        lines += [f"fields.{line}" for line in _field_differences(given.fields, self.fields)]
        if lines:
            raise mismatch(where, lines)
        return [f"provenance.{line}" for line in differences(given.provenance, self.provenance)]

    def _schema(self) -> list[dict[str, Any]]:
        return [field.to_json() for field in self.fields.values()]


def by_name(fields: Sequence[Field]) -> dict[str, Field]:
    """The schema as a mapping. Names must differ on a file system that ignores case, too."""
    if len({field.name.casefold() for field in fields}) != len(fields) or not fields:
        raise ValueError(f"a store needs fields with different names, got {[field.name for field in fields]}.")
    return {field.name: field for field in fields}


def _field_differences(expected: Mapping[str, Field], actual: Mapping[str, Field]) -> list[str]:
    """Differences of two schemas, but for what later writers take from the store: chunk size and compression."""
    lone = [
        f"{name}: expected {_words(expected.get(name))}, found {_words(actual.get(name))}"
        for name in expected.keys() ^ actual.keys()
    ]
    one, other = (
        {name: replace(fields[name], chunk_mb=1, compression="none").to_json() for name in expected.keys() & actual}
        for fields in (expected, actual)
    )
    return sorted([*lone, *differences(one, other)])


def _words(field: Field | None) -> str:
    """A field as people tell it apart from others: `bfloat16 [token, channel]`."""
    return "nothing" if field is None else f"{field.dtype} [{', '.join(field.axes)}]"


def mismatch(where: Path | str, lines: Sequence[str]) -> IdentityMismatchError:
    """Error that names every difference between what a caller expects and what the store holds."""
    listed = "\n  ".join(lines)
    return IdentityMismatchError(
        f"the store at {where} was made with other settings (expected: this run, found: the store):\n  {listed}\n"
        "Use the same settings, or another store.",
        lines,
    )


def read(storage: Storage) -> StoreRoot:
    """Read the root of an existing store."""

    def read_root() -> StoreRoot:
        data = storage.read_document(METADATA, MAX_DOCUMENT_BYTES)
        return StoreRoot.from_bytes(data, f"root metadata {storage.where(METADATA)}")

    with opening(storage.place):
        try:
            return reread(read_root, partial(storage.forget, METADATA))
        except (FileNotFoundError, NotADirectoryError) as error:
            remedy = "check the path, see that its disk or share is mounted, or write samples there first"
            raise StoreNotFoundError(f"there is no store at {storage.place} (no {METADATA}); {remedy}.") from error


def make(storage: Storage, data: bytes, tables: bytes | None = None) -> bool:
    """Make a store with this root metadata, unless there is one: then `False` and nothing changes.

    `tables`: those of the codec that the root names; they are there before it is.

    Raises `StoreAddressError` for a path where none can be, and `FormatError` for a folder of other things.
    """
    with opening(storage.place):
        if storage.exists(METADATA):
            return False
        strangers = sorted(set(storage.names("")) - {*FOLDERS, METADATA, INDEX, ASIDE, CODECS})
        if strangers:
            problem = f"is neither empty nor a store (it contains {', '.join(strangers[:5])})"
            raise FormatError(f"{storage.place} {problem}; give a path of its own to a new store.")
        storage.check_exclusive()
        storage.make_folders(FOLDERS)
        storage.put_if_absent(PLAIN_GROUP_PATH, PLAIN_GROUP)
        if tables is not None:
            codec_tables.put(storage, tables)
        return storage.put_if_absent(METADATA, data)
