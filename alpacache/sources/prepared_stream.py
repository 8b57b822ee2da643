"""Rows of a prepared dataset that lies on the hub or in a hub's layout (parquet files), without downloading it first.

Ids are read first, from their column alone. Rows then come through `datasets` streams, one parquet file after the
other: going forward is cheap, going back means opening a file again, so rows that several threads ask for in nearly
the right order are kept for a moment.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

from alpacache.errors import DataError
from alpacache.sources.prepared_rows import POSES, check_columns, features

ROWS_KEPT = 16
"""Of the rows passed last, whole ones: at most so many times a sample's PNG bytes in RAM."""


class StreamedRows:
    """Rows by number; may be called from many threads, which wait for each other."""

    def __init__(self, place: str) -> None:
        """Read the ids. Raises `SourceError` for other columns, and what `datasets` raises.

        Only its parquet reader knows `columns`, so a repository in any other format is refused by the first line.
        """
        ids = _files(place, ["sample_id"])
        self.place = place
        self._whole, self._poses = _Cursor(_files(place, None)), _Cursor(_files(place, ["sample_id", *POSES]))
        each = [[row["sample_id"] for row in file] for file in ids]
        self.ids: Sequence[str] = list(chain.from_iterable(each))
        self._starts = list(accumulate(map(len, each[:-1]), initial=0))
        """Number of the first row of each file."""

    def row(self, number: int) -> dict[str, Any]:
        """All of a row; raises `DataError` where the stream breaks off."""
        return self._read(self._whole, number)

    def poses(self, number: int) -> dict[str, Any]:
        """Id and poses of a row; its pictures are not fetched."""
        return self._read(self._poses, number)

    def _read(self, cursor: "_Cursor", number: int) -> dict[str, Any]:
        from alpacache.sources.pai_cache import connection_errors

        file = max(place for place, start in enumerate(self._starts) if start <= number)
        try:
            row = cursor.row(file, number - self._starts[file])
        except connection_errors() as error:
            raise DataError(
                f"hf:{self.place}: streaming {self.ids[number]} failed ({error}); the same command goes on from here."
            ) from error
        if row["sample_id"] != self.ids[number]:
            raise DataError(f"hf:{self.place} has changed since it was opened; run the same command again.")
        return row


class _Cursor:
    """A place in the files, and the rows that were passed last."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files, self._lock = files, threading.Lock()
        self._file, self._next = -1, 0
        self._stream: Iterator[dict[str, Any]] = iter(())
        self._kept: OrderedDict[tuple[int, int], dict[str, Any]] = OrderedDict()

    def row(self, file: int, number: int) -> dict[str, Any]:
        with self._lock:
            while (file, number) not in self._kept:
                self._advance(file, number)
            self._kept.move_to_end((file, number))
            return self._kept[file, number]

    def _advance(self, file: int, number: int) -> None:
        if file != self._file or number < self._next:
            self._file, self._next, self._stream = file, 0, iter(self._files[file])
        try:
            row = next(self._stream)
        except StopIteration:
            raise DataError(f"a file ended after {self._next} rows; it has changed since it was opened.") from None
        except BaseException:
            self._file = -1  # a stream that broke off is opened again
            raise
        self._kept[file, self._next] = row
        self._next += 1
        while len(self._kept) > ROWS_KEPT:
            self._kept.popitem(last=False)


def _files(place: str, columns: list[str] | None) -> list[Any]:
    """One stream a parquet file, in a fixed order."""
    import datasets

    loaded = datasets.load_dataset(place, streaming=True, columns=columns)
    splits = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    if columns is None:
        splits = [_with_embedded_pictures(split, place) for split in splits]
    return [split.shard(num_shards=split.num_shards, index=n) for split in splits for n in range(split.num_shards)]


def _with_embedded_pictures(rows: Any, place: str) -> Any:
    """Columns as expected; pictures are left as the bytes they are."""
    check_columns(rows.column_names or (), place)
    pictures = features()["frames"]
    return rows if rows.features["frames"] == pictures else rows.cast_column("frames", pictures)
