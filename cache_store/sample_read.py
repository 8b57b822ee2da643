"""Reading one sample: the checks at once, the bulk as independent tasks that any thread may run.

Uncompressed chunks go from the file straight into place; compressed ones are decoded into it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_store.checksum import without_zeros
from cache_store.errors import FormatError
from cache_store.format.commit_record import TRAILER_BYTES, StoredObject
from cache_store.format.field import SMALL, Field
from cache_store.format.sample_group import chunk_keys, packed_directory
from cache_store.format.stored_sample import StoredSample
from cache_store.storage.local_storage import ByteArray

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Ranges: TypeAlias = Mapping[str, Sequence[tuple[int, int]]]
"""Rising ranges (first, end) of axis 0 that are read of a field of layout `array`, to lie one behind the other."""
_ALIGNMENT = 64
"""Alignment of an array in a caller's buffer: a cache line."""
_MOST_PADDING_BYTES = 64
"""Padding up to which a caller may check data: an array of single bytes has less than it has chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRead:
    """Arrays that hold their values once all tasks have run."""

    arrays: dict[str, NDArray[Any]]
    tasks: list[Callable[[], None]]
    """For any order and any threads; each raises `CorruptSampleError` or `FormatError` and names sample and field."""
    unchecked: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Checks left to the caller: for a field `[chunks, 3]`, first byte in its array, number of bytes, their CRC-32C."""


def plan(
    sample: StoredSample,
    wanted: Sequence[str],
    out: Arrays,
    unchecked: Sequence[str],
    *,
    by_record: bool,
    ranges: Ranges | None = None,
) -> SampleRead:
    """Check the metadata of the wanted fields; text and packed fields are read at once. See `CacheReader.plan`.

    Only uncompressed data that is read as a whole can be left `unchecked`; `by_record` goes for all but text and
    compressed fields.
    """
    fields, ranges = sample.fields, ranges or {}
    check_out(sample, wanted, out, ranges)
    in_group = [name for name in wanted if fields[name].layout != "array"]
    small = _read_group(sample, in_group, by_record=by_record) if in_group else {}
    read = SampleRead(arrays={}, tasks=[])
    for name in wanted:
        if name in small:
            if name in out:
                out[name][...] = small[name]
            read.arrays[name] = out.get(name, small[name])
            continue
        direct = fields[name].compression == "none"
        rows = sample.rows_by_record(name) if by_record and direct else sample.check_array(name, name)
        shape = sample.record.shapes[name]
        array = out[name] if name in out else np.empty(_shape(sample, name, ranges), fields[name].stored_dtype)
        read.arrays[name] = array
        chunks = [sample.record.objects[f"{name}/{key}"] for key in chunk_keys(shape, rows)]
        if name in ranges:
            read.tasks.extend(_range_tasks(sample, name, chunks, rows, array, ranges[name]))
            continue
        if name in unchecked and direct and (table := _check_table(chunks, array)) is not None:
            read.unchecked[name] = table
        read.tasks.extend(_tasks(sample, name, chunks, rows, array, check_data=name not in read.unchecked))
    return read


def check_out(sample: StoredSample, wanted: Sequence[str], out: Arrays, ranges: Ranges) -> None:
    """Raise `ValueError` for ranges that there are not, and arrays that cannot take their field as it is stored."""
    for name in ranges.keys() & set(wanted):
        _shape(sample, name, ranges)
    for name, array in out.items():
        if name not in wanted or sample.fields[name].layout == "text":
            raise ValueError(f"out has field {name!r}, which is not read or is text; read: {', '.join(wanted)}.")
        dtype, shape = sample.fields[name].stored_dtype, _shape(sample, name, ranges)
        if not (array.dtype == dtype and array.shape == shape and array.flags.c_contiguous and array.flags.writeable):
            where = f"out of field {name!r} of sample {sample.record.sample_id!r}"
            expected, got = f"{dtype.name}{list(shape)}", f"{array.dtype.name}{list(array.shape)}"
            raise ValueError(f"{where} must be a writable C-contiguous {expected}, got {got}.")


def buffer_bytes(sample: StoredSample, wanted: Sequence[str], ranges: Ranges | None = None) -> int:
    """Bytes that `carve` takes for these fields of a sample."""
    sizes = [sample.fields[name].size_bytes(shape) for name, shape in _numeric(sample, wanted, ranges or {})]
    return sum(size + -size % _ALIGNMENT for size in sizes)


def carve(
    sample: StoredSample, wanted: Sequence[str], buffer: ByteArray, ranges: Ranges | None = None
) -> dict[str, NDArray[Any]]:
    """Place arrays for the wanted fields (text has none) one after the other in a caller's flat uint8 buffer."""
    needed = buffer_bytes(sample, wanted, ranges)
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size < needed:
        got = f"{buffer.dtype.name}{list(buffer.shape)}"
        raise ValueError(f"sample {sample.record.sample_id!r} needs a flat uint8 buffer of {needed} bytes, got {got}.")
    arrays, start = {}, 0
    for name, shape in _numeric(sample, wanted, ranges or {}):
        arrays[name] = _view(buffer, start, sample.fields[name], shape)
        start += arrays[name].nbytes + -arrays[name].nbytes % _ALIGNMENT
    return arrays


def _numeric(sample: StoredSample, wanted: Sequence[str], ranges: Ranges) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, _shape(sample, name, ranges)) for name in wanted if sample.fields[name].layout != "text"]


def _shape(sample: StoredSample, name: str, ranges: Ranges) -> tuple[int, ...]:
    """Shape of the array that a field, or what is read of it, takes. Raises `ValueError` for ranges that it lacks."""
    shape = sample.record.shapes[name]
    if name not in ranges:
        return shape
    length = shape[0] if shape and sample.fields[name].layout == "array" else 0
    edges = [edge for pair in ranges[name] for edge in pair]
    if not edges or edges != sorted(edges) or edges[0] < 0 or edges[-1] > length:
        raise ValueError(
            f"ranges of field {name!r} of sample {sample.record.sample_id!r} are {list(ranges[name])}; expected rising "
            f"ones within {length}, of a field of layout array."
        )
    return (sum(end - first for first, end in ranges[name]), *shape[1:])


def _view(buffer: ByteArray, start: int, field: Field, shape: tuple[int, ...]) -> NDArray[Any]:
    return buffer[start : start + field.size_bytes(shape)].view(field.stored_dtype).reshape(shape)


def _tasks(
    sample: StoredSample, name: str, chunks: Sequence[StoredObject], rows: int, array: NDArray[Any], *, check_data: bool
) -> list[Callable[[], None]]:
    """One task per chunk, which fills its slab of the array."""
    raw = array.reshape(-1).view(np.uint8)
    size = rows * math.prod(array.shape[1:]) * array.itemsize
    slabs = [raw[index * size : (index + 1) * size] for index in range(len(chunks))]
    load = partial(sample.decode_into, chunk_bytes=size)
    if sample.fields[name].compression == "none":
        load = partial(sample.load_into, parents_checked=True, check_data=check_data)
        for chunk in chunks[:1]:
            sample.check_parents(chunk, name)
    return [partial(load, slab, chunk, name) for slab, chunk in zip(slabs, chunks, strict=True)]


def _range_tasks(
    sample: StoredSample,
    name: str,
    chunks: Sequence[StoredObject],
    rows: int,
    array: NDArray[Any],
    ranges: Sequence[tuple[int, int]],
) -> list[Callable[[], None]]:
    """One task per chunk that holds some of the ranges; no other chunk is touched.

    A checksum is of a whole chunk, so one of which a part is wanted is read whole, beside its place.
    """
    raw, field = array.reshape(-1).view(np.uint8), sample.fields[name]
    shape = sample.record.shapes[name]
    row_bytes = field.size_bytes(shape[1:])
    copies: dict[int, list[tuple[int, int, int]]] = {}  # by chunk: first and end within it, place in the array
    place = 0
    for first, end in ranges:
        for index in range(first // rows, -(-end // rows)) if end > first else ():
            begin, stop = max(first, index * rows), min(end, (index + 1) * rows)
            copies.setdefault(index, []).append((begin - index * rows, stop - index * rows, place))
            place += stop - begin

    def fill(index: int) -> None:
        chunk, parts = chunks[index], copies[index]
        size = min(rows, shape[0] - index * rows) * row_bytes
        first, end, place = parts[0]
        whole = len(parts) == 1 and (end - first) * row_bytes == size
        target = raw[place * row_bytes :][:size] if whole else np.empty(size, np.uint8)
        if field.compression == "none":
            sample.load_into(target, chunk, name, parents_checked=False, check_data=True)
        else:
            sample.decode_into(target, chunk, name, chunk_bytes=rows * row_bytes)
        for first, end, place in () if whole else parts:
            part = target[first * row_bytes : end * row_bytes]
            raw[place * row_bytes :][: len(part)] = part

    return [partial(fill, index) for index in copies]


def _check_table(chunks: Sequence[StoredObject], array: NDArray[Any]) -> NDArray[np.int64] | None:
    """The array's chunks as `SampleRead.unchecked` has them; nothing if those in memory cannot be checked."""
    sizes = [chunk.size - TRAILER_BYTES for chunk in chunks]
    padding = sum(sizes) - array.nbytes
    if not chunks or not 0 <= padding <= _MOST_PADDING_BYTES:
        return None
    crcs = [int(chunk.crc32c, 16) for chunk in chunks]
    starts = np.cumsum([0, *sizes[:-1]])
    sizes[-1] -= padding
    crcs[-1] = without_zeros(crcs[-1], padding)
    return np.column_stack([starts, sizes, crcs]).astype(np.int64)


def _read_group(sample: StoredSample, wanted: Sequence[str], *, by_record: bool) -> dict[str, NDArray[Any]]:
    """Values of text and packed fields."""
    record, fields = sample.record, sample.fields
    packed = [name for name in wanted if fields[name].layout == "packed"]
    values: dict[str, NDArray[Any]] = {}
    if not by_record or len(packed) < len(wanted):
        text = sample.check_group(", ".join(wanted))
        values = {name: np.array(text[name], np.str_) for name in wanted if name in text}
    if not packed:
        return values
    names = ", ".join(packed)
    if not by_record:
        sample.check_array(SMALL, names)
    directory, size = packed_directory(record.shapes, fields)
    data = np.empty(size, np.uint8)
    if size:
        chunk = record.objects.get(f"{SMALL}/c.0")
        if chunk is None or chunk.size != size + TRAILER_BYTES:
            where = f"sample {record.sample_id!r}, field {names!r}: {sample.storage.where(f'{record.folder}/{SMALL}')}"
            expected = f"the packed fields take one chunk of {size + TRAILER_BYTES} bytes"
            raise FormatError(f"{where}: {expected}; the record names another.")
        sample.load_into(data, chunk, names, parents_checked=False, check_data=True)
    offsets = {entry["name"]: entry["offset"] for entry in directory}
    for name in packed:
        values[name] = _view(data, offsets[name], fields[name], record.shapes[name]).copy()
    return values
