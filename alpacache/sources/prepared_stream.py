"""Rows of a prepared dataset that lies on the hub or in a hub's layout (parquet files), without downloading it first.

Ids are read first, from their column alone. Rows then come through `datasets` streams, one parquet file after the
other: going forward is cheap, going back means to read a file again from its beginning. Threads that load samples in
order still ask for rows slightly out of order, so rows that were passed on the way wait for the thread that is late.
"""

import os
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from alpacache.errors import BadClipError, DataError, SourceError
from alpacache.sources.prepared_rows import (
    CHANGES,
    MIXED,
    NEEDED,
    POSES,
    ROUTE,
    T0,
    changes_in,
    check_columns,
    features,
)
from alpacache.sources.retry import connection_errors, first_line
from alpacache.sources.table import check_groups

SPARE_ROWS = 16
"""Rows kept beyond one a live thread."""


class StreamedRows:
    """Rows by number. May be called from many threads, of which one reads at a time."""

    def __init__(self, place: str) -> None:
        """Read the ids. Raises `SourceError` for other columns, and what `datasets` raises.

        Only its parquet reader knows `columns`, so a repository in any other format is refused by the first line.
        """
        ids = _files(place, ["sample_id", CHANGES, T0])
        there = [CHANGES in (file.column_names or ()) for file in ids]
        if any(there) and not all(there):
            raise SourceError(f"{place}: {MIXED}.")
        timed = all(T0 in (file.column_names or ()) for file in ids)
        if not (all(there) and timed):
            ids = _files(place, ["sample_id", *([CHANGES] if all(there) else [])])
        self.place, self._columns = place, (*NEEDED, *([T0] if timed else []))
        whole = _files(place, self._columns)
        for file in whole:
            check_columns(file.column_names or (), place)
        poses = _files(place, ["sample_id", *POSES])
        told: set[tuple[str, ...] | None] = set()
        each = [[_noted(row, told) for row in file] for file in ids]
        self.changes = changes_in([None if row is None else list(row) for row in told], place)
        self.ids: Sequence[str] = list(chain.from_iterable(each))
        self._lengths = list(map(len, each))
        self._whole, self._poses = (Cursor(files, lengths=self._lengths) for files in (whole, poses))

    @cached_property
    def has_routes(self) -> bool:
        """True if there is a column of routes; from then on it is read with the others. To be asked before any row."""
        whole = _files(self.place, (*self._columns, ROUTE))
        there = all(ROUTE in (file.column_names or ()) for file in whole)
        if there:
            self._whole = Cursor(whole, lengths=self._lengths)
        return there

    def expect(self, numbers: Iterable[int]) -> None:
        """Keep no rows but these from now on; see `Cursor.expect`."""
        self._whole.expect(numbers)

    def row(self, number: int) -> dict[str, Any]:
        """A row by its number. Raises `DataError` if its stream breaks off."""
        return self._read(self._whole, number)

    def poses(self, number: int) -> dict[str, Any]:
        """The poses in a row, read without its pictures."""
        return self._read(self._poses, number)

    def _read(self, cursor: "Cursor", number: int) -> dict[str, Any]:
        """A row of one of the streams. Raises `DataError` if it breaks off."""
        import pyarrow as pa

        try:
            row = cursor.row(number)
        except (pa.ArrowException, ValueError, *connection_errors()) as error:
            text = f"streaming {self.ids[number]} failed ({first_line(error)}); the same command goes on."
            if not isinstance(error, ConnectionError) and (isinstance(error, ValueError) or Path(self.place).is_dir()):
                text = f"the file that holds {self.ids[number]} cannot be read ({first_line(error)}); fetch it again."
            raise DataError(f"hf:{self.place}: {text}") from error
        if row["sample_id"] != self.ids[number]:
            raise DataError(f"hf:{self.place} has changed since it was opened; run the same command again.")
        return row


class Cursor:
    """A place in a sequence of files, each of which can only be read forwards.

    Each row is read once as long as the order in which it is asked for is off by no more rows than are kept. Threads
    that take their rows from one queue are late by one row each, so one row a live thread is kept, and `SPARE_ROWS`.
    Nothing waits but for the one thread that reads.
    """

    def __init__(self, files: Sequence[Iterable[dict[str, Any]]], *, lengths: Sequence[int]) -> None:
        """`lengths` is the number of rows of each file. Rows are numbered through all files."""
        self._files, self._lock = files, threading.Lock()
        self._starts = list(accumulate(lengths[:-1], initial=0))
        self._file, self._next = -1, 0
        self._stream: Iterator[dict[str, Any]] = iter(())
        self._passed: OrderedDict[int, dict[str, Any]] = OrderedDict()  # rows read on the way to others
        self._taken: OrderedDict[int, dict[str, Any]] = OrderedDict()  # rows that may be asked for again
        self._expected: Counter[int] | None = None

    def expect(self, numbers: Iterable[int]) -> None:
        """Keep no rows but these from now on, and each only until it was asked for as often as it is named."""
        with self._lock:
            self._expected = Counter(numbers)

    def row(self, number: int) -> dict[str, Any]:
        """A row by its number. Raises `DataError` if its file is shorter than that."""
        with self._lock:
            row = self._passed.pop(number, None) or self._taken.pop(number, None) or self._read(number)
            if self._expected is not None:
                self._expected[number] -= 1
            if self._is_expected(number):
                self._keep(self._taken, number, row)
            return row

    def _read(self, number: int) -> dict[str, Any]:
        """Read on to a row; first, of files that are left for it, the rows that late threads will still ask for."""
        begun = self._file >= 0 or self._expected is not None
        left = range(self._next, self._starts[self._file_of(number)]) if begun else ()
        late = list(islice(filter(self._is_expected, left), self._room() + 1))
        for each in late if len(late) <= self._room() else ():
            self._keep(self._passed, each, self._read_to(each))
        return self._read_to(number)

    def _read_to(self, number: int) -> dict[str, Any]:
        file = self._file_of(number)
        if file != self._file or number < self._next:
            self._file, self._next, self._stream = file, self._starts[file], iter(self._files[file])
        while True:
            try:
                row = next(self._stream)
            except StopIteration:
                count, self._file = self._next - self._starts[file], -1
                raise DataError(f"a file ended after {count} rows; it has changed since it was opened.") from None
            except BaseException:
                self._file = -1  # a stream that broke off is opened again
                raise
            self._next += 1
            if self._next > number:
                return row
            if self._is_expected(self._next - 1):
                self._keep(self._passed, self._next - 1, row)

    def _keep(self, rows: OrderedDict[int, dict[str, Any]], number: int, row: dict[str, Any]) -> None:
        rows[number] = row
        while len(rows) > self._room():
            rows.popitem(last=False)

    def _is_expected(self, number: int) -> bool:
        return self._expected is None or self._expected[number] > 0

    def _file_of(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def _room(self) -> int:
        """Number of passed rows, and of taken ones, that may be kept."""
        rows = SPARE_ROWS + threading.active_count()
        return rows if self._expected is None else 4 * rows  # expected ones are few: they leave when asked for


def undecoded(rows: Any, place: str) -> Any:
    """The same rows with pictures left as encoded bytes. Raises `SourceError` if another column is one of pictures or
    the like: `datasets` would open whatever path or address a row names.
    """
    from datasets.features.features import require_decoding

    pictures = features()["frames"]
    if rows.features.get("frames", pictures) != pictures:
        rows = rows.cast_column("frames", pictures)
    for column, kind in rows.features.items():
        if require_decoding(kind):
            raise SourceError(f"{place}: column {column} is of type {kind}; was it written by `alpacache prepare`?")
    return rows


def _noted(row: dict[str, Any], told: set[tuple[str, ...] | None]) -> Any:
    """A row's id; what it says of changes goes to `told`, a few values however many rows there are."""
    if len(told) < 2:
        changes = row.get(CHANGES)
        told.add(tuple(map(str, changes)) if isinstance(changes, list) else None)
    return row["sample_id"]


def _files(place: str, columns: Sequence[str]) -> list[Any]:
    """A stream of these columns for each parquet file, in a fixed order; no other column is read."""
    import datasets

    builder = datasets.load_dataset_builder(place, columns=list(columns))
    files = [file for files in builder.config.data_files.values() for file in files]
    _refuse_outside_files(files, place)
    for file in files if Path(place).is_dir() else ():
        _check_unfolding(Path(file), columns)
    loaded = builder.as_streaming_dataset()
    splits = [undecoded(split, place) for split in (loaded.values() if isinstance(loaded, dict) else [loaded])]
    return [split.shard(num_shards=split.num_shards, index=n) for split in splits for n in range(split.num_shards)]


def _check_unfolding(file: Path, columns: Sequence[str]) -> None:
    try:
        check_groups(file, columns, where=str(file))
    except BadClipError as error:
        raise SourceError(str(error)) from error


def _refuse_outside_files(files: Iterable[str], place: str) -> None:
    """A card may name files anywhere; a directory's own lie in it, a repository's on the hub."""
    roots = (os.path.normpath(Path.cwd() / place), Path(place).resolve()) if Path(place).is_dir() else ()
    for file in files:
        path = Path(os.path.normpath(file))
        if not (any(path.is_relative_to(root) for root in roots) if roots else file.startswith("hf://")):
            raise SourceError(f"hf:{place}: its README.md names a file outside of it: {file!r}.")
