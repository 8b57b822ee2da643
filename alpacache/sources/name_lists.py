"""Lists that users give in files: names line by line, or columns of a csv or parquet table.

Clips and samples are named so, with moments and weights beside them. A table of `eval`, `samples.parquet`, is such a
list as it stands, and so is what pandas makes of it.
"""

import csv
import io
import re
from collections.abc import Collection, Sequence
from fnmatch import translate
from pathlib import Path

from alpacache.errors import BadClipError, UsageError
from alpacache.regular_file import read_regular
from alpacache.sources.table import check_table

_MOST_BYTES = 256 * 2**20
_LISTED = 3


def read_names(file: str, columns: Sequence[str], *, what: str) -> list[str]:
    """Names in a file: its lines that are not empty, or the first of `columns` that its table has.

    `what` begins the messages: `--only ids.csv`. Raises `UsageError` for a file that cannot be read or names nothing.
    """
    if not file.lower().endswith(".txt"):
        table = read_table(file, columns, what=what)
        for column in columns:
            if column in table:
                return _given([name.strip() for name in table[column]], what)
        raise UsageError(f"{what} has no column {' or '.join(columns)}.")
    try:
        text = read_regular(Path(file), limit_bytes=_MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} cannot be read ({_reason(error)}).") from error
    return _given([line.strip() for line in text.splitlines() if line.strip()], what)


def read_table(file: str, columns: Sequence[str], *, what: str) -> dict[str, list[str]]:
    """Read those columns that a csv file with a head, or a parquet file, has: as texts, empty for no value.

    Raises `UsageError` for a file that cannot be read, two columns of one name, and rows of other lengths.
    """
    try:
        read = _read_parquet if file.lower().endswith(".parquet") else _read_csv
        return read(Path(file), columns, what)
    except UsageError:
        raise
    except BadClipError as error:  # which says what it is about
        raise UsageError(str(error)) from error
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{what} cannot be read ({_reason(error)}).") from error


def fitting(name: str, known: Collection[str]) -> list[str]:
    """The known names that a name is, or else that it fits as a pattern with `*` and `?`."""
    if name in known:
        return [name]
    return list(filter(re.compile(translate(name)).match, known)) if any(sign in name for sign in "*?[") else []


def listed(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(name[:120] for name in names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.rstrip(".")


def _given(names: list[str], what: str) -> list[str]:
    if not names:
        raise UsageError(f"{what} names nothing.")
    if "" in names:
        raise UsageError(
            f"{what} has {names.count('')} rows without a name, the first of them row {1 + names.index('')}."
        )
    return names


def _read_csv(file: Path, columns: Sequence[str], what: str) -> dict[str, list[str]]:
    text = read_regular(file, limit_bytes=_MOST_BYTES).decode("utf-8-sig")
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    if not rows:
        raise UsageError(f"{what} is empty; expected a line with the names of columns, and rows.")
    head = [name.strip() for name in rows[0]]
    _check_columns(head, what)
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(head):
            raise UsageError(
                f"{what}: row {number} has {len(row)} values; expected {len(head)}, as the head has names."
            )
    return {name: [row[place] for row in rows[1:]] for place, name in enumerate(head) if name in columns}


def _read_parquet(file: Path, columns: Sequence[str], what: str) -> dict[str, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_table(file, where=what)
    try:
        names = pq.read_schema(file).names
        _check_columns(names, what)
        table = pq.read_table(file, columns=[name for name in names if name in columns], use_threads=False)
    except pa.ArrowException as error:
        raise UsageError(f"{what} cannot be read ({_reason(error)}).") from error
    values = {name: table.column(name).to_pylist() for name in table.column_names}
    return {name: ["" if value is None else str(value) for value in column] for name, column in values.items()}


def _check_columns(names: Sequence[str], what: str) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"{what} has several columns {listed(twice)}; keep the one that is right.")
