"""The Zarr v3 group of one sample: the objects that the values of its fields become.

The objects are made here rather than by zarr, so that the same arrays always give the same bytes, each file can be
forced to the medium, and no zarr import is needed. Any Zarr v3 reader opens the result.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.checksum import crc32c
from cache_store.document import to_bytes
from cache_store.format import compression
from cache_store.format.commit_record import TRAILER_BYTES, StoredObject
from cache_store.format.compression import Buffer
from cache_store.format.field import SMALL, STORED_DTYPES, Field
from cache_store.format.names import METADATA

MAX_SMALL_BYTES = 16 * 10**6
_ALIGNMENT = 8
_ENCODERS = 4
"""Threads that checksum a sample's chunks: in one thread that takes a tenth of a fast disk's time."""
_FILL: dict[str, Any] = {"b": False, "f": 0.0}
SMALL_ARRAY = Field(name="packed", dtype="uint8", axes=("byte",))
"""Schema of the array of all packed fields, which is one chunk."""
assert SMALL_ARRAY.chunk_mb * 1e6 >= MAX_SMALL_BYTES

Value = NDArray[Any] | str | list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGroup:
    """All objects of one sample with their bytes, ready to write."""

    shapes: Mapping[str, tuple[int, ...]]
    objects: Mapping[str, StoredObject]
    """Every object by its path."""
    files: Sequence[tuple[str, tuple[Buffer, ...]]]
    """Path and buffers of each object; arrays are views, not copies."""


def check_values(sample_id: str, values: Mapping[str, object], fields: Mapping[str, Field]) -> dict[str, Value]:
    """Bring the values into schema order as arrays and strings, or raise a `ValueError` that names sample and field."""
    unknown = sorted(values.keys() - fields.keys())
    absent = [name for name, field in fields.items() if field.required and name not in values]
    if unknown or absent:
        problem = f"unknown fields {unknown}, missing required fields {absent}"
        raise ValueError(f"sample {sample_id!r}: {problem}; the store has {', '.join(fields)}.")
    return {
        name: _check_value(f"sample {sample_id!r}, field {name!r}", field, values[name])
        for name, field in fields.items()
        if name in values
    }


def encode(sample_id: str, values: Mapping[str, Value], fields: Mapping[str, Field]) -> SampleGroup:
    """Make the group of a sample whose values passed `check_values`."""
    jobs: list[tuple[str, Field | None, tuple[Buffer, ...]]] = []

    def add_array(name: str, field: Field, array: NDArray[Any]) -> None:
        chunk_shape = field.chunk_shape(array.shape)
        metadata = array_metadata(field, array.shape, chunk_shape)
        jobs.append((f"{name}/{METADATA}", None, (to_bytes(metadata, f"field {name!r}"),)))
        raw, size = np.ascontiguousarray(array).reshape(-1).view(np.uint8), field.size_bytes(chunk_shape)
        for index, key in enumerate(chunk_keys(array.shape, chunk_shape[0] if chunk_shape else 1)):
            slab = raw[index * size : (index + 1) * size]
            padding = bytes(size - len(slab))  # Zarr stores the last chunk at full size
            jobs.append((f"{name}/{key}", field, (slab, padding) if padding else (slab,)))

    shapes = {name: (len(value),) if isinstance(value, list) else np.shape(value) for name, value in values.items()}
    directory, small_bytes = packed_directory(shapes, fields)
    text = {name: value for name, value in values.items() if fields[name].layout == "text"}
    metadata = to_bytes(group_metadata(sample_id, directory, text), f"the text of sample {sample_id!r}")
    jobs.append((METADATA, None, (metadata,)))
    if directory:
        add_array(SMALL, SMALL_ARRAY, _pack(values, directory, small_bytes))
    for name, value in values.items():
        if fields[name].layout == "array":
            assert isinstance(value, np.ndarray)
            add_array(name, fields[name], value)
    with ThreadPoolExecutor(_ENCODERS, "encode") as pool:  # checksums and compression release the interpreter lock
        encoded = list(pool.map(_encode_object, *zip(*jobs, strict=True)))
    objects = {stored.path: stored for stored, _ in encoded}
    return SampleGroup(shapes=shapes, objects=objects, files=[(stored.path, parts) for stored, parts in encoded])


def _encode_object(
    path: str, field: Field | None, parts: tuple[Buffer, ...]
) -> tuple[StoredObject, tuple[Buffer, ...]]:
    """Make one object with its checksum: a document, or a chunk of a field."""
    if field is not None:
        parts = compression.encode(field, parts)
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    if field is not None:
        parts = (*parts, crc.to_bytes(TRAILER_BYTES, "little"))
    return StoredObject(path=path, size=sum(map(len, parts)), crc32c=f"{crc:08x}"), parts


def group_metadata(sample_id: str, directory: list[dict[str, Any]], text: object) -> dict[str, Any]:
    """The one `zarr.json` that format version 1 allows for the group of a sample with this text."""
    attributes = {"sample_id": sample_id, "small": directory, "text": text}
    return {"attributes": attributes, "node_type": "group", "zarr_format": 3}


def array_metadata(field: Field, shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> dict[str, Any]:
    """The one `zarr.json` that format version 1 allows for an array of this field, shape and chunk shape."""
    dtype = field.stored_dtype
    endian = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
    return {
        "attributes": {"logical_dtype": field.dtype, "units": field.units},
        "chunk_grid": {"configuration": {"chunk_shape": list(chunk_shape)}, "name": "regular"},
        "chunk_key_encoding": {"configuration": {"separator": "."}, "name": "default"},
        "codecs": [{"name": "bytes", **endian}, *compression.codecs(field), {"name": "crc32c"}],
        "data_type": dtype.name,
        "dimension_names": list(field.axes),
        "fill_value": _FILL.get(dtype.kind, 0),
        "node_type": "array",
        "shape": list(shape),
        "zarr_format": 3,
    }


def chunk_keys(shape: tuple[int, ...], rows: int) -> Iterator[str]:
    """Yield the chunk keys of an array that is cut along axis 0 alone."""
    if not shape:
        yield "c"
    elif math.prod(shape):
        for index in range(math.ceil(shape[0] / rows)):
            yield ".".join(["c", str(index), *("0" for _ in shape[1:])])


def packed_directory(
    shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Field]
) -> tuple[list[dict[str, Any]], int]:
    """List where each packed field of a sample lies in the array `small`, and give that array's length in bytes."""
    directory: list[dict[str, Any]] = []
    end = 0
    for name, shape in shapes.items():
        field = fields[name]
        if field.layout == "packed":
            start = end + -end % _ALIGNMENT
            dtype = STORED_DTYPES[field.dtype]  # asking numpy for its name takes longer than all the rest
            directory.append({"dtype": dtype, "name": name, "offset": start, "shape": list(shape)})
            end = start + field.size_bytes(shape)
    return directory, end


def _pack(values: Mapping[str, Value], directory: list[dict[str, Any]], size: int) -> NDArray[np.uint8]:
    if size > MAX_SMALL_BYTES:
        raise ValueError(f"the packed fields take {size} bytes; the limit is {MAX_SMALL_BYTES}. Use layout array.")
    data = np.zeros(size, np.uint8)
    for entry in directory:
        raw = np.ascontiguousarray(values[entry["name"]]).reshape(-1).view(np.uint8)
        data[entry["offset"] : entry["offset"] + len(raw)] = raw
    return data


def _check_value(where: str, field: Field, value: object) -> Value:
    if field.layout == "text":
        return _check_text(where, field, value)
    if not isinstance(value, np.ndarray | np.generic):
        raise ValueError(f"{where} should be a numpy array of {field.stored_dtype.name}, got {type(value).__name__}.")
    array = np.asarray(value)
    if array.dtype != field.stored_dtype or array.ndim != len(field.axes):
        expected = f"{field.stored_dtype.name}{list(field.axes)}"
        raise ValueError(f"{where} should be {expected}, got {array.dtype.name} with shape {list(array.shape)}.")
    return array


def _check_text(where: str, field: Field, value: object) -> Value:
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    items = plain if field.axes else [plain]
    if isinstance(items, tuple):
        items = list(items)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        kind = "a list of str" if field.axes else "a str"
        raise ValueError(f"{where} should be {kind}, got {type(value).__name__}.")
    for item in items:
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: text must be valid Unicode: {error}.") from error
        if "\0" in item:
            raise ValueError(f"{where}: numpy strings cannot end in NUL characters, so text must not contain any.")
    return items if field.axes else str(items[0])
