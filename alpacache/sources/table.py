"""Parquet tables that others wrote, decoded within a budget that footer and schema are held against first.

Some hundred kilobytes of parquet can unfold to gigabytes: a page of zeros, or rows that all repeat one long text of a
dictionary. So nothing is decoded before what it would take is known.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError
from alpacache.regular_file import lfs_pointer, regular_size

MAX_FILE_BYTES = 2**30
MAX_ROWS = 4_000_000
"""Most rows of a table: more than an hour of poses at 1 kHz."""
MAX_DECODED_BYTES = 2**30
MAX_RATE_HZ = 2_000
"""Most rows a second of a recording of more than `FEW_ROWS`; localisation gives 10 to 200."""
FEW_ROWS = 100_000
"""Rows up to which no rate is too much work: where times are in another unit, `check` says so."""
_READ_AT_ONCE = 65_536
_MAX_RATIO = 100
"""Largest ratio of unfolded to packed bytes: pictures, which make up the bytes of samples, do not shrink."""
_INDEX_BYTES = 16
"""Compressed bytes that an index into a dictionary takes at most, a value that is written out at least."""


def read_columns(file: Path | BinaryIO, names: Sequence[str], *, where: str) -> dict[str, NDArray[Any]]:
    """Columns of numbers of a recording's table, one of them `timestamp`: int64, whole microseconds.

    Raises `BadClipError`, which begins with `where` (`wrong_shape`, `not_finite` for a row without a timestamp,
    `unsafe_path` for what is no regular file, `unsafe_size` for what is beyond the limits of this module).
    """
    with _opened(file, where=where) as parquet:
        kinds = parquet.schema_arrow
        for name in names:
            count = kinds.names.count(name)
            if count > 1:
                raise BadClipError("wrong_shape", f"{where} has {count} columns {name}; keep the one that is right.")
        absent = [name for name in names if name not in kinds.names]
        if absent or not parquet.metadata.num_rows:
            reason = f"lacks the columns {', '.join(absent)}" if absent else "has no rows"
            raise BadClipError("wrong_shape", f"{where} {reason}; expected {', '.join(names)}.")
        for name in names:
            _check_number(name, kinds.field(name).type, where=where)
        _check_budget(parquet.metadata, names, where=where)
        table = parquet.read(columns=list(names), use_threads=False)  # samples are read in threads already
    stamps = table.column("timestamp")
    if stamps.null_count:
        raise BadClipError("not_finite", f"{where}: {stamps.null_count} rows have no timestamp.")
    arrays = {name: _numbers(table.column(name)) for name in names}
    if (largest := int(arrays["timestamp"].max())) > np.iinfo(np.int64).max:
        reason = f"column timestamp holds {largest}, beyond 64-bit signed integers"
        raise BadClipError("wrong_shape", f"{where}: {reason}; write microseconds as int64.")
    _check_rate(arrays["timestamp"], where=where)
    return arrays | {"timestamp": arrays["timestamp"].astype(np.int64)}


def _numbers(column: Any) -> NDArray[Any]:
    """Values of a column of numbers, nulls as NaN; Arrow's own `to_numpy` would import pandas, for all of a second."""
    if column.null_count:
        column = column.cast("float64", safe=False).fill_null(math.nan)
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def no_texts() -> tuple[NDArray[np.int64], Any]:
    """The result of `read_texts` for a table without rows."""
    import pyarrow as pa

    return np.empty(0, np.int64), pa.nulls(0)


def read_texts(file: Path, name: str, *, where: str) -> tuple[NDArray[np.int64], Any] | None:
    """Timestamps (us) of a table and its column of texts as an Arrow array of a dictionary; None without the column.

    Both are empty for a table without rows and for a column without a value, to which pandas gives the type null, or
    double with NaN. No text is unfolded for each row that repeats it. Raises `BadClipError` as `read_columns` does, and
    for a column that is no text (`wrong_shape`).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    nothing = no_texts()
    with _opened(file, where=where) as parquet:
        kinds = parquet.schema_arrow
        if (count := kinds.names.count(name)) != 1:
            if count:
                raise BadClipError("wrong_shape", f"{where} has {count} columns {name}; keep the one that is right.")
            return None
        kind = kinds.field(name).type
        if not parquet.metadata.num_rows or pa.types.is_null(kind):
            return nothing
    if pa.types.is_floating(kind) and np.isnan(read_columns(file, ("timestamp", name), where=where)[name]).all():
        return nothing
    if not _is_text(kind):
        raise BadClipError("wrong_shape", f"{where}: column {name} is {str(kind)[:60]}; expected text.")
    stamps = read_columns(file, ("timestamp",), where=where)["timestamp"]
    _check_texts(file, [name], where=where)
    with _refused(where):
        texts = pq.ParquetFile(file, read_dictionary=[name]).read(columns=[name]).column(name)
    return nothing if texts.null_count == len(texts) else (stamps, texts)


def check_table(file: Path | BinaryIO, *, where: str) -> None:
    """Raise `BadClipError` (as `read_columns`) unless a table, texts included, can be decoded as a whole.

    For tables that other code reads, such as the devkit of PhysicalAI-AV.
    """
    with _opened(file, where=where) as parquet:
        kinds = parquet.schema_arrow
        _check_budget(parquet.metadata, None, where=where)
    _check_texts(file, [field.name for field in kinds if _is_text(field.type)], where=where)


def check_groups(file: Path, names: Sequence[str], *, where: str) -> None:
    """Raise `BadClipError` (as `read_columns`) unless these columns can be decoded one row group after the other.

    For tables of samples, which may be larger than memory as a whole. The first of `names` is read as a whole.
    """
    with _opened(file, where=where, limit_bytes=None) as parquet:
        metadata = parquet.metadata
        texts = [field.name for field in parquet.schema_arrow if field.name == names[0] and _is_text(field.type)]
        _check_rows(metadata, where=where)
        for column in _columns(metadata, names):
            packed, size = column.total_compressed_size, column.total_uncompressed_size
            unfolded = max(size, 8 * column.num_values)
            is_text = column.has_dictionary_page and column.physical_type == "BYTE_ARRAY"
            if is_text and column.path_in_schema not in texts:
                pages = packed - max(0, column.data_page_offset - column.dictionary_page_offset)
                if pages < _INDEX_BYTES * column.num_values:  # all values are those of the dictionary
                    unfolded = max(unfolded, size * column.num_values)
            if unfolded > MAX_DECODED_BYTES and (unfolded > size or size > _MAX_RATIO * packed):
                reason = f"{column.path_in_schema} unfolds from {packed:,} to up to {unfolded:,} bytes in a row group"
                raise BadClipError("unsafe_size", f"{where}: {reason}; at most {MAX_DECODED_BYTES:,} are read.")
    _check_texts(file, texts, where=where)


def _check_texts(file: Path | BinaryIO, texts: Sequence[str], *, where: str) -> None:
    """Hold the size of all texts in these columns, each as often as it stands there, against the limit."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    size = 0
    with _refused(where):
        # As a dictionary, no value is unfolded for each row that repeats it.
        table = pq.ParquetFile(file, read_dictionary=texts) if texts else None
        for batch in table.iter_batches(_READ_AT_ONCE, columns=texts) if table else ():
            for column in batch.columns:
                if pa.types.is_dictionary(column.type):
                    size += pc.sum(pc.take(pc.binary_length(column.dictionary), column.indices)).as_py() or 0
                else:
                    size += column.nbytes
            if size > MAX_DECODED_BYTES:
                raise BadClipError("unsafe_size", f"{where} unfolds to more than {MAX_DECODED_BYTES:,} bytes of text.")


@contextmanager
def _opened(file: Path | BinaryIO, *, where: str, limit_bytes: int | None = MAX_FILE_BYTES) -> Iterator[Any]:
    """The table, opened; what is no regular file or no table is a `BadClipError`."""
    import pyarrow.parquet as pq

    if isinstance(file, Path):
        try:
            regular_size(file, limit_bytes=limit_bytes)
        except OSError as error:
            raise BadClipError("unsafe_path", f"{where} cannot be read: {error.strerror or error}.") from error
    with _refused(where, file), pq.ParquetFile(file) as parquet:
        yield parquet


@contextmanager
def _refused(where: str, file: Path | BinaryIO | None = None) -> Iterator[None]:
    """Turn what Arrow raises for a damaged table into a `BadClipError`; `file` is looked at for why it is none."""
    import pyarrow as pa

    try:
        yield
    except BadClipError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if pointer := lfs_pointer(file):
            raise BadClipError("wrong_shape", f"{where} is not a readable parquet file: {pointer}.") from error
        reason = str(error).partition("\n")[0][:200]
        raise BadClipError(
            "wrong_shape", f"{where} is not a readable parquet file ({reason}); copy it again."
        ) from error


def _check_number(name: str, kind: Any, *, where: str) -> None:
    import pyarrow as pa

    if not (pa.types.is_integer(kind) or (name != "timestamp" and pa.types.is_floating(kind))):
        reason = f"column {name} is {str(kind)[:60]}"
        raise BadClipError("wrong_shape", f"{where}: {reason}; expected numbers (timestamp: int64, us).")


def _check_rows(metadata: Any, *, where: str) -> None:
    rows = max(metadata.num_rows, sum(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)))
    if rows > MAX_ROWS:
        raise BadClipError("unsafe_size", f"{where} has {rows:,} rows; at most {MAX_ROWS:,} are read.")


def _columns(metadata: Any, names: Sequence[str] | None) -> Iterator[Any]:
    """Footer entries of these columns (None: of all), of nested ones of each leaf, in each row group."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            if names is None or column.path_in_schema.partition(".")[0] in names:
                yield column


def _check_budget(metadata: Any, names: Sequence[str] | None, *, where: str) -> None:
    """Hold rows, values and unpacked pages of these columns (None: of all) against the limits, by the footer alone."""
    _check_rows(metadata, where=where)
    lengths = {leaf.path: leaf.length for leaf in map(metadata.schema.column, range(metadata.num_columns))}
    size = 0
    for column in _columns(metadata, names):
        size += max(column.total_uncompressed_size, max(8, lengths[column.path_in_schema]) * column.num_values)
        if column.physical_type == "BYTE_ARRAY" and "." in column.path_in_schema:
            size += column.num_values * column.total_uncompressed_size  # each may be as long as all pages
    if size > MAX_DECODED_BYTES:
        most = f"at most {MAX_DECODED_BYTES:,} are read"
        raise BadClipError("unsafe_size", f"{where} unfolds to {size:,} bytes or more; {most}.")


def _check_rate(stamps: NDArray[Any], *, where: str) -> None:
    span_s = max(float(stamps.max()) - float(stamps.min()), 1.0) / 1e6
    if len(stamps) > FEW_ROWS and len(stamps) - 1 > MAX_RATE_HZ * span_s:
        reason = f"{len(stamps):,} rows within {span_s:.3g} s by their timestamps, more than {MAX_RATE_HZ:,} a second"
        remedy = "If timestamps are not in microseconds, convert them; else write every tenth or hundredth row."
        raise BadClipError("unsafe_size", f"{where} has {reason}. {remedy}")


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    return any(test(kind) for test in tests) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))
