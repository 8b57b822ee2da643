"""Checks of a stored sample's metadata against its commit record and the schema, before anything is allocated for it.

Format version 1 leaves a writer one choice only, the rows of a chunk; everything else is compared as a whole, so that
a hostile or foreign document is refused rather than interpreted.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from cache_store.document import canonical_json, parse
from cache_store.errors import FormatError
from cache_store.format.commit_record import CommitRecord
from cache_store.format.compression import MAX_OVERHEAD_BYTES
from cache_store.format.field import SMALL, Field
from cache_store.format.sample_group import METADATA, SMALL_ARRAY, array_metadata, chunk_keys, packed_directory
from cache_store.format.stored_object import TRAILER_BYTES
from cache_store.storage.storage import Storage


def check_group(
    storage: Storage, record: CommitRecord, fields: Mapping[str, Field], wanted: str
) -> dict[str, str | list[str]]:
    """Text fields from the group's checked `zarr.json`."""
    where = f"sample {record.sample_id!r}: {storage.where(f'{record.folder}/{METADATA}')}"
    data = record.objects[METADATA].load(storage, record.folder, sample_id=record.sample_id, field=wanted)
    document = parse(data.tobytes(), where)
    directory, _ = packed_directory(record.shapes, fields)
    attributes = document.get("attributes")
    text = attributes.get("text") if isinstance(attributes, dict) else None
    expected = {
        "attributes": {"sample_id": record.sample_id, "small": directory, "text": text},
        "node_type": "group",
        "zarr_format": 3,
    }
    shapes = {name: shape for name, shape in record.shapes.items() if fields[name].layout == "text"}
    if (
        canonical_json(document) != canonical_json(expected)
        or not isinstance(text, dict)
        or text.keys() != shapes.keys()
    ):
        raise FormatError(f"{where} is not the metadata of this sample in format 1.")
    for name, shape in shapes.items():
        items = text[name] if shape else [text[name]]
        if (
            not isinstance(items, list)
            or not all(isinstance(item, str) for item in items)
            or (len(items),) != (shape or (1,))
        ):
            raise FormatError(
                f"{where}: the text of field {name!r} has not the shape {list(shape)} of the commit record."
            )
    return text


def check_array(storage: Storage, record: CommitRecord, array: str, fields: Mapping[str, Field], wanted: str) -> int:
    """Rows a chunk; raises unless the `zarr.json` is the one expected and the record names exactly its chunks."""

    def where() -> str:
        place = storage.where(f"{record.folder}/{array}/{METADATA}")
        return f"sample {record.sample_id!r}, field {wanted!r}: {place}"

    stored = record.objects.get(f"{array}/{METADATA}")
    if stored is None:
        raise FormatError(f"{where()} is not named by the commit record.")
    data = stored.load(storage, record.folder, sample_id=record.sample_id, field=wanted).tobytes()
    field = SMALL_ARRAY if array == SMALL else fields[array]
    shape = (packed_directory(record.shapes, fields)[1],) if array == SMALL else record.shapes[array]
    try:
        rows = _rows_of(data, field, shape)
    except FormatError as error:
        raise FormatError(f"{where()}: {error}") from error
    if rows < 1:
        raise FormatError(f"{where()} is not the metadata of a {field.dtype} array of shape {list(shape)} in format 1.")
    _check_chunks(record, array, field, shape, rows, where)
    return rows


def rows_by_record(storage: Storage, record: CommitRecord, array: str, field: Field) -> int:
    """Rows a chunk of an uncompressed field, from the sizes in the record; raises unless those fit its shape."""

    def where() -> str:
        return f"sample {record.sample_id!r}, field {array!r}: {storage.where(f'{record.folder}/{array}')}"

    shape = record.shapes[array]
    row_bytes = math.prod(_chunk_shape(1, shape)) * field.stored_dtype.itemsize
    sizes = [stored.size for stored in record.of_array(array) if stored.is_chunk]
    rows = max(1, (sizes[0] - TRAILER_BYTES) // row_bytes) if sizes else 1
    _check_chunks(record, array, field, shape, rows, where)
    return rows


def _check_chunks(
    record: CommitRecord, array: str, field: Field, shape: tuple[int, ...], rows: int, where: Callable[[], str]
) -> None:
    size = math.prod(_chunk_shape(rows, shape)) * field.stored_dtype.itemsize + TRAILER_BYTES
    count = math.ceil(shape[0] / rows) * bool(math.prod(shape)) if shape else 1
    chunks = {item.path.rpartition("/")[2]: item.size for item in record.of_array(array) if item.is_chunk}
    compressed = field.compression != "none"
    sizes = dict.fromkeys(chunks, 0) if compressed else chunks
    expected = dict.fromkeys(islice(chunk_keys(shape, rows), len(chunks) + 1), 0 if compressed else size)
    too_large = compressed and max(chunks.values(), default=0) > size + MAX_OVERHEAD_BYTES
    if len(chunks) != count or sizes != expected or too_large:
        raise FormatError(
            f"{where()}: shape {list(shape)} takes {count} chunks of {size} bytes; the record names others."
        )


@lru_cache(maxsize=1024)
def _rows_of(data: bytes, field: Field, shape: tuple[int, ...]) -> int:
    """Rows a chunk from an array's metadata; 0 unless it is the one document that field and shape allow.

    Samples of one shape share one document, so most are known already.
    """
    document = parse(data, METADATA)
    rows = _chunk_rows(document, shape)
    expected = array_metadata(field, shape, _chunk_shape(rows, shape))
    return rows if canonical_json(document) == canonical_json(expected) else 0


def _chunk_shape(rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (rows, *(max(1, length) for length in shape[1:])) if shape else ()


def _chunk_rows(document: dict[str, Any], shape: tuple[int, ...]) -> int:
    """Length of a chunk along axis 0 as the metadata has it; 0 if that is not to be found."""
    try:
        rows = document["chunk_grid"]["configuration"]["chunk_shape"][0] if shape else 1
    except (KeyError, TypeError, IndexError):
        return 0
    return rows if type(rows) is int and rows < 2**48 else 0
