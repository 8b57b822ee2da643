"""Rows of a prepared dataset that lies on the hub or in a hub's layout (parquet files), without downloading it first.

Ids are read first, from their column alone. Rows then come through `datasets` streams, one parquet file after the
other: going forward is cheap, going back means opening a file again, so rows that several threads ask for in nearly
the right order are kept for a moment.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from alpacache.errors import DataError, SourceError
from alpacache.sources.prepared_rows import NEEDED, POSES, check_columns, features

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
        whole = _files(place, NEEDED)
        for file in whole:
            check_columns(file.column_names or (), place)
        self._whole, self._poses = _Cursor(whole), _Cursor(_files(place, ["sample_id", *POSES]))
        each = [[row["sample_id"] for row in file] for file in ids]
        self.ids: Sequence[str] = list(chain.from_iterable(each))
        self._starts = list(accumulate(map(len, each[:-1]), initial=0))
        """Number of the first row of each file."""

    def row(self, number: int) -> dict[str, Any]:
        """What is read of a row; raises `DataError` where the stream breaks off."""
        return self._read(self._whole, number)

    def poses(self, number: int) -> dict[str, Any]:
        """Id and poses of a row; its pictures are not fetched."""
        return self._read(self._poses, number)

    def _read(self, cursor: "_Cursor", number: int) -> dict[str, Any]:
        from alpacache.sources.pai_cache import connection_errors, said

        file = max(place for place, start in enumerate(self._starts) if start <= number)
        try:
            row = cursor.row(file, number - self._starts[file])
        except connection_errors() as error:
            raise DataError(
                f"hf:{self.place}: streaming {self.ids[number]} failed ({said(error)}); the same command goes on."
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


def undecoded(rows: Any, place: str) -> Any:
    """The same rows, pictures left as the bytes they are.

    Raises `SourceError` where another column is one of pictures or the like: `datasets` would open whatever path or
    address a row names.
    """
    from datasets.features.features import require_decoding

    pictures = features()["frames"]
    if rows.features.get("frames", pictures) != pictures:
        rows = rows.cast_column("frames", pictures)
    for column, kind in rows.features.items():
        if require_decoding(kind):
            raise SourceError(f"{place}: column {column} is of type {kind}; was it written by `alpacache prepare`?")
    return rows


def _files(place: str, columns: Sequence[str]) -> list[Any]:
    """One stream of these columns a parquet file, in a fixed order; of the others nothing is read."""
    import datasets

    builder = datasets.load_dataset_builder(place, columns=list(columns))
    _refuse_outside_files([file for files in builder.config.data_files.values() for file in files], place)
    loaded = builder.as_streaming_dataset()
    splits = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    splits = [undecoded(split, place) for split in splits]
    return [split.shard(num_shards=split.num_shards, index=n) for split in splits for n in range(split.num_shards)]


def _refuse_outside_files(files: Iterable[str], place: str) -> None:
    """A card may name files anywhere; a directory's own lie in it, a repository's on the hub."""
    roots = (os.path.normpath(Path.cwd() / place), Path(place).resolve()) if Path(place).is_dir() else ()
    for file in files:
        path = Path(os.path.normpath(file))
        if not (any(path.is_relative_to(root) for root in roots) if roots else file.startswith("hf://")):
            raise SourceError(f"hf:{place}: its README.md names a file outside of it: {file!r}.")
