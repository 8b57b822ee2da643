"""One sample's way into memory: the checks at once, the bulk as independent tasks that any thread may run.

Uncompressed chunks go from the file straight into place. Compressed ones are left to zarr.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store import checksum
from cache_store.errors import FormatError
from cache_store.format.commit_record import CommitRecord
from cache_store.format.field import SMALL, Field
from cache_store.format.sample_check import check_array, check_group, rows_by_record
from cache_store.format.sample_group import chunk_keys, packed_directory
from cache_store.format.stored_object import TRAILER_BYTES
from cache_store.storage.storage import Storage

_ALIGNMENT = 64
"""Of an array in a caller's buffer: a cache line."""
_MOST_PADDING_BYTES = 64
"""At the end of an array of single bytes there are fewer than it has chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRead:
    """Arrays that hold their values when all tasks have run."""

    arrays: dict[str, NDArray[Any]]
    tasks: list[Callable[[], None]]
    """In any order, in any threads; each raises `CorruptSampleError` or `FormatError` and names sample and field."""
    unchecked: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """What the caller still has to check: of a field `[chunks, 3]`, the first byte in its array, the bytes and their
    CRC-32C."""


def plan(
    storage: Storage,
    record: CommitRecord,
    fields: Mapping[str, Field],
    wanted: Sequence[str],
    out: Mapping[str, NDArray[Any]],
    unchecked: Sequence[str] = (),
    *,
    by_record: bool = False,
) -> SampleRead:
    """Check the metadata of the wanted fields; text and packed fields are read at once.

    Data of the `unchecked` fields are left to the caller to check, where they are stored as they are: uncompressed.
    `by_record`: where values lie is taken from the commit record, which says all of it but for text and compressed
    fields; the `zarr.json` documents, which say it to other readers, are left to `verify`.
    """
    check_out(record, fields, wanted, out)
    in_group = [name for name in wanted if fields[name].layout != "array"]
    small = _read_group(storage, record, fields, in_group, by_record=by_record) if in_group else {}
    arrays: dict[str, NDArray[Any]] = {}
    tasks: list[Callable[[], None]] = []
    left: dict[str, NDArray[np.int64]] = {}
    for name in wanted:
        if name in small:
            arrays[name] = small[name]
            if name in out:
                out[name][...] = small[name]
                arrays[name] = out[name]
        else:
            if by_record and fields[name].compression == "none":
                rows = rows_by_record(storage, record, name, fields[name])
            else:
                rows = check_array(storage, record, name, fields, name)
            given = out.get(name)
            array = np.empty(record.shapes[name], fields[name].stored_dtype) if given is None else given
            arrays[name] = array
            if name in unchecked:
                left |= _left_unchecked(record, name, fields[name], rows, array)
            tasks += _array_tasks(storage, record, name, fields[name], rows, array, check_data=name not in left)
    return SampleRead(arrays=arrays, tasks=tasks, unchecked=left)


def check_out(
    record: CommitRecord, fields: Mapping[str, Field], wanted: Sequence[str], out: Mapping[str, NDArray[Any]]
) -> None:
    """Raise `ValueError` unless each given array can take its field as it is stored."""
    for name, array in out.items():
        if name not in wanted or fields[name].layout == "text":
            raise ValueError(f"out has field {name!r}, which is not read or is text; read: {', '.join(wanted)}.")
        dtype, shape = fields[name].stored_dtype, record.shapes[name]
        if not (array.dtype == dtype and array.shape == shape and array.flags.c_contiguous and array.flags.writeable):
            raise ValueError(
                f"out of field {name!r} of sample {record.sample_id!r} must be a writable C-contiguous "
                f"{dtype.name}{list(shape)}, got {array.dtype.name}{list(array.shape)}."
            )


def buffer_bytes(record: CommitRecord, fields: Mapping[str, Field], wanted: Sequence[str]) -> int:
    """What `carve` takes for these fields of a sample."""
    return _places(record, fields, wanted)[1]


def carve(
    record: CommitRecord, fields: Mapping[str, Field], wanted: Sequence[str], buffer: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    """Arrays for the wanted fields (text has none), one after the other in a caller's flat uint8 buffer."""
    places, size = _places(record, fields, wanted)
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size < size:
        raise ValueError(
            f"sample {record.sample_id!r} needs a flat uint8 buffer of {size} bytes, got "
            f"{buffer.dtype.name}{list(buffer.shape)}."
        )
    return {
        name: buffer[start : start + math.prod(record.shapes[name]) * fields[name].stored_dtype.itemsize]
        .view(fields[name].stored_dtype)
        .reshape(record.shapes[name])
        for name, start in places.items()
    }


def _places(record: CommitRecord, fields: Mapping[str, Field], wanted: Sequence[str]) -> tuple[dict[str, int], int]:
    places, end = {}, 0
    for name in wanted:
        if fields[name].layout != "text":
            places[name] = end
            size = math.prod(record.shapes[name]) * fields[name].stored_dtype.itemsize
            end += size + -size % _ALIGNMENT
    return places, end


def _array_tasks(
    storage: Storage, record: CommitRecord, array: str, field: Field, rows: int, out: NDArray[Any], *, check_data: bool
) -> list[Callable[[], None]]:
    if not out.size:
        return []
    if field.compression != "none":
        from cache_store.zarr_objects import read_array  # zarr takes a third of a second to import

        return [partial(read_array, storage, record, array, field.name, out)]
    raw = out.reshape(-1).view(np.uint8)
    size = rows * math.prod(out.shape[1:]) * out.itemsize
    folder = record.folder
    storage.check_parents(f"{folder}/{array}/c")
    return [
        partial(
            record.objects[f"{array}/{key}"].load_into,
            raw[index * size : (index + 1) * size],
            storage,
            folder,
            sample_id=record.sample_id,
            field=field.name,
            parents_checked=True,
            check_data=check_data,
        )
        for index, key in enumerate(chunk_keys(out.shape, rows))
    ]


def _left_unchecked(
    record: CommitRecord, array: str, field: Field, rows: int, out: NDArray[Any]
) -> dict[str, NDArray[np.int64]]:
    """The array's chunks as `SampleRead.unchecked` has them; nothing if it cannot be checked as it lies in memory."""
    objects = [record.objects[f"{array}/{key}"] for key in chunk_keys(out.shape, rows)]
    sizes = [stored.size - TRAILER_BYTES for stored in objects]
    padding = sum(sizes) - out.nbytes
    if field.compression != "none" or not objects or not 0 <= padding <= _MOST_PADDING_BYTES:
        return {}
    crc32cs = [int(stored.crc32c, 16) for stored in objects]
    starts = np.cumsum([0, *sizes[:-1]])
    sizes[-1] -= padding
    crc32cs[-1] = checksum.without_zeros(crc32cs[-1], padding)
    return {array: np.column_stack([starts, sizes, crc32cs]).astype(np.int64)}


def _read_group(
    storage: Storage, record: CommitRecord, fields: Mapping[str, Field], wanted: Sequence[str], *, by_record: bool
) -> dict[str, NDArray[Any]]:
    packed = [name for name in wanted if fields[name].layout == "packed"]
    result: dict[str, NDArray[Any]] = {}
    if not by_record or len(packed) < len(wanted):
        text = check_group(storage, record, fields, ", ".join(wanted))
        result = {name: np.array(text[name], np.str_) for name in wanted if name in text}
    if packed:
        names = ", ".join(packed)
        if not by_record:
            check_array(storage, record, SMALL, fields, names)
        directory, size = packed_directory(record.shapes, fields)
        offsets = {entry["name"]: entry["offset"] for entry in directory}
        data = np.empty(size, np.uint8)
        if size:
            chunk = record.objects.get(f"{SMALL}/c.0")
            if chunk is None or chunk.size != size + TRAILER_BYTES:
                raise FormatError(
                    f"sample {record.sample_id!r}, field {names!r}: {storage.where(f'{record.folder}/{SMALL}')}: the "
                    f"packed fields take one chunk of {size + TRAILER_BYTES} bytes; the record names another."
                )
            chunk.load_into(data, storage, record.folder, sample_id=record.sample_id, field=names)
        for name in packed:
            dtype, shape = fields[name].stored_dtype, record.shapes[name]
            end = offsets[name] + math.prod(shape) * dtype.itemsize
            result[name] = data[offsets[name] : end].copy().view(dtype).reshape(shape)
    return result
