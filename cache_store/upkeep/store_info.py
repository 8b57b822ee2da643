"""Summary of a store from its root and records alone: sizes by field, counts, identity and provenance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache_store.concurrency import in_order
from cache_store.document import to_bytes
from cache_store.errors import SampleReadError
from cache_store.format import store_root
from cache_store.format.commit_record import TRAILER_BYTES, CommitRecord
from cache_store.format.field import Field
from cache_store.format.sample_group import Value, array_metadata, chunk_keys, encode
from cache_store.reader import CacheReader
from cache_store.storage.storage import StorePath

METADATA = "(metadata)"
"""Entry for the bytes that belong to no numeric field: text, Zarr metadata, padding of packed fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """Summary of a store."""

    path: str
    format_version: int
    samples: int
    """Number of committed samples whose record can be read."""
    size_bytes: int
    """Bytes of all objects of committed samples."""
    size_by_field: Mapping[str, int]
    """Bytes by field, and under `(metadata)` the rest; the sum is `size_bytes`."""
    samples_by_field: Mapping[str, int]
    """Number of samples that have each field."""
    quarantined: int
    quarantined_by_kind: Mapping[str, int]
    unreadable: tuple[str, ...]
    """Faults of commit records that cannot be read; other samples are none the worse."""
    fields: Mapping[str, Field]
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]


def info(path: StorePath) -> StoreInfo:
    """Read the records of a store and add up."""
    reader = CacheReader(path)
    sizes = dict.fromkeys([*reader.fields, METADATA], 0)
    counts = dict.fromkeys(reader.fields, 0)
    unreadable = [error for error in reader.unreadable if not error.sample_id]
    samples = 0

    def read(sample_id: str) -> CommitRecord | SampleReadError:
        try:
            return reader.record(sample_id)
        except SampleReadError as error:
            return error

    for record in in_order(read, reader.sample_ids, reader.threads):
        if isinstance(record, SampleReadError):
            unreadable.append(record)
            continue
        samples += 1
        rest = record.size_bytes
        for name, shape in record.shapes.items():
            field, size = reader.fields[name], 0
            if field.layout == "array":
                size = sum(stored.size for stored in record.of_array(name))
            elif field.layout == "packed":
                size = field.size_bytes(shape)
            counts[name] += 1
            sizes[name] += size
            rest -= size
        sizes[METADATA] += rest
    kinds = [failure.kind for failure in reader.quarantined.values()]
    return StoreInfo(
        path=str(reader.path),
        format_version=store_root.FORMAT_VERSION,
        samples=samples,
        size_bytes=sum(sizes.values()),
        size_by_field=sizes,
        samples_by_field=counts,
        quarantined=len(kinds),
        unreadable=tuple(map(str, unreadable)),
        quarantined_by_kind={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        fields=reader.fields,
        identity=reader.identity,
        provenance=reader.provenance,
    )


def sample_size(
    sample_id: str, small: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Field]
) -> dict[str, int]:
    """Bytes by field, as `info` counts them, of one sample with these packed and text values and plain arrays."""
    values = {name: small[name] for name in fields if name in small}
    group = encode(sample_id, values, fields)
    sizes = {name: fields[name].size_bytes(group.shapes[name]) for name in values if fields[name].layout == "packed"}
    rest = sum(stored.size for stored in group.objects.values()) - sum(sizes.values())
    for name, shape in shapes.items():
        field, chunk = fields[name], fields[name].chunk_shape(shape)
        chunks = sum(1 for _ in chunk_keys(shape, chunk[0] if chunk else 1))
        metadata = to_bytes(array_metadata(field, shape, chunk), f"field {name!r}")
        sizes[name] = chunks * (field.size_bytes(chunk) + TRAILER_BYTES) + len(metadata)
    return {name: sizes[name] for name in fields if name in sizes} | {METADATA: rest}
