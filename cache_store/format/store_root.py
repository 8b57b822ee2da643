"""The root of a store: format version, schema, identity and provenance, in the attributes of the root Zarr group."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_store.difference import differences
from cache_store.document import MAX_DOCUMENT_BYTES, canonical_copy, canonical_json, check_seal, parse, seal, take
from cache_store.errors import FormatError, IdentityMismatchError, StoreNotFoundError
from cache_store.format import commit_record, quarantine_record
from cache_store.format.field import Field
from cache_store.storage import local_storage
from cache_store.storage.room import place_of
from cache_store.storage.storage import Storage

FORMAT_VERSION = 1
DOCUMENT = "zarr.json"
SAMPLES = "samples"
STAGING = local_storage.STAGING
INDEX = "index"
FOLDERS = (SAMPLES, commit_record.FOLDER, quarantine_record.FOLDER, STAGING)
ATTRIBUTE = "cache_store"
PLAIN_GROUP = b'{"attributes":{},"node_type":"group","zarr_format":3}'
"""`samples/zarr.json`: Zarr v3 wants every folder above an array to be a group."""
_OPENING = b'{"attributes":{'
"""Attributes come first and the seal first in them, before anything that a user's identity could contain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRoot:
    """What holds for all samples of a store."""

    fields: Mapping[str, Field]
    identity: Mapping[str, Any]
    """The settings that make samples comparable; different ones never share a store."""
    provenance: Mapping[str, Any]
    """What else the first writer recorded (library versions, hardware); a difference only warns."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of schema and identity; every commit record names it."""
        return hashlib.sha256(
            canonical_json({"fields": self._schema(), "identity": self.identity}).encode()
        ).hexdigest()

    def to_bytes(self) -> bytes:
        body = {
            "format_version": FORMAT_VERSION,
            "fields": self._schema(),
            "identity": self.identity,
            "provenance": self.provenance,
            "fingerprint": self.fingerprint,
        }
        document = {"attributes": {ATTRIBUTE: body}, "node_type": "group", "zarr_format": 3}
        return seal(document, "the root metadata", opening=_OPENING)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "StoreRoot":
        document = parse(data, where)
        attributes = document.get("attributes")
        body = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
        if not isinstance(body, dict):
            raise FormatError(f"{where} is not the root of a store: its attributes have no {ATTRIBUTE!r}.")
        version = take(body, "format_version", int, where)
        if version > FORMAT_VERSION:
            raise FormatError(
                f"{where} has format version {version}; this library reads up to {FORMAT_VERSION}. Update it."
            )
        check_seal(data, where)
        fields = [Field.from_json(item, where) for item in take(body, "fields", list, where)]
        root = cls(
            fields=by_name(fields),
            identity=take(body, "identity", dict, where),
            provenance=take(body, "provenance", dict, where),
        )
        if version != FORMAT_VERSION or take(body, "fingerprint", str, where) != root.fingerprint:
            raise FormatError(f"{where}: format version {version} or the settings fingerprint is not a valid one.")
        return root

    def check(self, given: "StoreRoot", where: Path | str) -> list[str]:
        """Raise if the given schema or identity is another one; return the differences in provenance."""
        lines = [f"identity.{line}" for line in differences(given.identity, self.identity)]
        lines += [f"fields.{line}" for line in differences(given.comparable_schema(), self.comparable_schema())]
        if lines:
            raise mismatch(where, lines)
        return [f"provenance.{line}" for line in differences(given.provenance, self.provenance)]

    def comparable_schema(self) -> dict[str, dict[str, Any]]:
        """The schema by name, without what later writers take from the store: chunk size and compression."""
        schema = {name: field.to_json() for name, field in self.fields.items()}
        for field in schema.values():
            del field["chunk_mb"], field["compression"]
        return schema

    def _schema(self) -> list[dict[str, Any]]:
        return [field.to_json() for field in self.fields.values()]


def by_name(fields: Sequence[Field]) -> dict[str, Field]:
    """The schema as a mapping; names must differ on a file system that ignores case, too."""
    if len({field.name.casefold() for field in fields}) != len(fields) or not fields:
        raise ValueError(f"a store needs fields with different names, got {[field.name for field in fields]}.")
    return {field.name: field for field in fields}


def mismatch(where: Path | str, lines: Sequence[str]) -> IdentityMismatchError:
    """The error that names every difference between what a caller expects and what the store holds."""
    listed = "\n  ".join(lines)
    return IdentityMismatchError(
        f"the store at {where} was made with other settings (expected: this run, found: the store):\n  {listed}\n"
        "Use the same settings, or another store.",
        lines,
    )


def read(storage: Storage) -> StoreRoot:
    """The root of an existing store."""
    with place_of(storage.place):
        try:
            data = storage.read_document(DOCUMENT, MAX_DOCUMENT_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreNotFoundError(
                f"there is no store at {storage.place} (no {DOCUMENT}); check the path or write samples there first."
            ) from error
    where = f"root metadata {storage.where(DOCUMENT)}"
    try:
        return StoreRoot.from_bytes(data, where)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def open_or_create(storage: Storage, given: StoreRoot) -> tuple[StoreRoot, list[str]]:
    """The root as the store has it (the first writer's), and the given root's differences in provenance."""
    given = replace(
        given,
        identity=canonical_copy(given.identity, "identity"),
        provenance=canonical_copy(given.provenance, "provenance"),
    )
    data = given.to_bytes()
    if make(storage, data):
        return given, []
    root = read(storage)
    return root, root.check(given, storage.place)


def make(storage: Storage, data: bytes) -> bool:
    """A store with this root metadata, unless there is one: then `False` and nothing changes.

    Raises `StoreAddressError` for a path where none can be.
    """
    with place_of(storage.place):
        if storage.exists(DOCUMENT):
            return False
        make_layout(storage)
        return storage.put_if_absent(DOCUMENT, data)


def make_layout(storage: Storage) -> None:
    """All that a store consists of before its root metadata; what other writers have made already stays."""
    strangers = sorted(set(storage.names("")) - {*FOLDERS, DOCUMENT, INDEX})
    if strangers:
        raise FormatError(
            f"{storage.place} is neither empty nor a store (it contains {', '.join(strangers[:5])}); "
            "give a path of its own to a new store."
        )
    storage.check_exclusive()
    storage.make_folders(FOLDERS)
    storage.put_if_absent(f"{SAMPLES}/{DOCUMENT}", PLAIN_GROUP)
