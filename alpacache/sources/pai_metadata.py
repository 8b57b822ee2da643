"""Metadata of a local PhysicalAI-AV tree, put in order before the devkit joins it.

The devkit joins its tables by clip, and stops for all clips where one is listed twice or has no chunk. Here such a clip
is set aside with its reason, and the others are read. A table that needs no change stays as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alpacache.errors import BadClipError, SourceError
from alpacache.sources.retry import first_line
from alpacache.sources.table import check_table

MAX_CHUNK = 10**9
_ID, _CHUNK, _VALID, _POSES = "clip_id", "chunk", "clip_is_valid", "egomotion"

Faults = dict[str, str]
"""Clip -> why nothing can be read of it."""


def read_by_clip(file: Path, needed: Sequence[str] = (), *, name: str = "") -> tuple[Any, bool]:
    """A table (`pandas.DataFrame`) by clip, and whether it lies so in the file; `name` is what errors call it.

    Raises `SourceError` if it cannot be read within the limits of `table`, or lacks a column.
    """
    import pandas as pd

    name = name or str(file)
    try:
        check_table(file, where=name)
        table = pd.read_parquet(file)
    except BadClipError as error:
        raise SourceError(str(error)) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{name} cannot be read ({first_line(error)}); fetch it again.") from error
    is_so = _ID not in table.columns
    if not is_so:
        table = table.set_index(_ID)
    absent = [name for name in needed if name not in table.columns]
    if absent or pd.api.types.is_numeric_dtype(table.index):
        absent = absent or [_ID]
        there = ", ".join(map(str, table.columns[:20]))
        raise SourceError(f"{name} lacks the column {', '.join(absent)}; it has {there}. Fetch it again.")
    return table, is_so


def sound_index(table: Any, name: str) -> tuple[Any, Faults]:
    """The clip index, each clip once with a whole chunk number, and the clips that are left out of it."""
    import pandas as pd

    faults: Faults = {}
    table = table[table.index.notna()]
    chunk = pd.to_numeric(table[_CHUNK], errors="coerce").to_numpy("float64", na_value=np.nan)
    for clip in table.index[~((chunk >= 0) & (chunk <= MAX_CHUNK) & (np.floor(chunk) == chunk))]:
        faults[str(clip)] = f"{name} gives no chunk for it; expected a whole number. Fetch the table again."
    if _VALID in table.columns:
        for clip in table.index[~table[_VALID].isin([True, False])]:
            faults[str(clip)] = f"{name} does not say whether it is valid. Fetch the table again."
    for clip, count in table.index[table.index.duplicated(keep=False)].value_counts().items():
        faults[str(clip)] = f"{name} lists it {count} times; keep the row that is right."
    kept = ~table.index.astype(str).isin(list(faults))
    sound = table[kept].assign(**{_CHUNK: chunk[kept].astype(np.int64)})
    if _VALID in sound.columns:
        sound = sound.assign(**{_VALID: sound[_VALID].astype(bool)})
    return sound, faults


def sound_presence(table: Any, index: Any, name: str) -> tuple[Any, Faults]:
    """The features that each clip has, none unknown, and clips of which it is not known whether they have poses."""
    faults: Faults = {}
    columns = [
        name for name in table.columns if str(table[name].dtype) == "bool" or table[name].dropna().isin([0, 1]).all()
    ]
    table = table[columns][table.index.notna()]
    if _POSES in columns:
        listed = index[index[_VALID]] if _VALID in index.columns else index
        for clip in listed.index.difference(table.index):
            faults[str(clip)] = f"{name} has no row for it. Fetch the table again."
        for clip in table.index[table[_POSES].isna()]:
            faults[str(clip)] = f"{name} does not say whether it has {_POSES}. Fetch the table again."
    copies = table[table.index.duplicated(keep=False)]
    for clip in copies[~copies.reset_index().duplicated(keep=False).to_numpy()].index.unique():
        faults[str(clip)] = f"{name} lists it several times and not alike; keep the row that is right."
    table = table[~table.index.duplicated()]
    if not all(str(kind) == "bool" for kind in table.dtypes):
        table = table.astype(object).where(table.notna(), False).astype(bool)
    return table, faults


def sound_splits(table: Any, index: Any) -> Any:
    """The labels of clips that the index has, one each."""
    return table[~table.index.duplicated() & table.index.isin(index.index)]
