"""A field: one named array (or text) that samples of a store have, with its dtype, axes, units and layout."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cache_store.document import take
from cache_store.errors import FormatError

Layout = Literal["array", "packed", "text"]
Compression = Literal["none", "zstd"]

STORED_DTYPES = {
    **{name: name for name in ("bool", "float16", "float32", "float64")},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": "uint16",
}
"""Logical dtype -> dtype of the stored bits; numpy has no bfloat16."""
_STORED = {name: np.dtype(stored).newbyteorder("<") for name, stored in STORED_DTYPES.items()}
SMALL = "small"
"""The array that holds all packed fields of a sample; no field may take its name."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
_CHUNK_COST_BYTES = 65536
"""Price of one more file, so that a few padding rows do not double the number of chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Schema of one field; the lengths of its axes may differ from sample to sample."""

    name: str
    dtype: str
    """A numpy dtype name, `bfloat16` (stored as its uint16 bits), or `str` for text."""
    axes: tuple[str, ...] = ()
    """One name per axis, outermost first. Text has none (one string) or one (a list of strings)."""
    units: str = "1"
    layout: Layout = "array"
    """`array`: a Zarr array of its own. `packed`: with other small fields in one array. `text`: in the metadata."""
    required: bool = True
    chunk_mb: float = 16
    """Limit of a chunk in 10^6 bytes, but at least one index of axis 0; the store's first writer decides."""
    compression: Compression = "none"
    """Compression of an `array` field. zstd saves space but rules out direct reads. The first writer decides."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "chunk_mb", float(self.chunk_mb))
        where = f"field {self.name!r}"
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or self.name.lower() == SMALL:
            raise ValueError(f"{where}: a name is a letter and at most 99 letters, digits or '_.-', and not {SMALL!r}.")
        if self.layout not in get_args(Layout):
            raise ValueError(f"{where}: layout {self.layout!r} is none of {', '.join(get_args(Layout))}.")
        if self.compression not in get_args(Compression) or (self.compression != "none" and self.layout != "array"):
            choices = " or ".join(get_args(Compression))
            raise ValueError(f"{where}: compression is {choices} (none where not array), got {self.compression!r}.")
        known = ("str",) if self.layout == "text" else tuple(STORED_DTYPES)
        if self.dtype not in known:
            raise ValueError(f"{where}: dtype {self.dtype!r} is none of {', '.join(known)} (layout {self.layout!r}).")
        if not all(isinstance(axis, str) and axis for axis in self.axes) or not isinstance(self.units, str):
            raise ValueError(f"{where}: axes and units are non-empty strings, got {self.axes!r} and {self.units!r}.")
        most_axes = 1 if self.layout == "text" else 32
        if len(self.axes) > most_axes:
            raise ValueError(f"{where}: at most {most_axes} axes in layout {self.layout!r}, got {self.axes!r}.")
        if not 0 < self.chunk_mb <= 1000:
            raise ValueError(f"{where}: chunk_mb is above 0 and at most 1000, got {self.chunk_mb}.")

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Dtype of the bits that are stored and read, little-endian."""
        return _STORED[self.dtype]

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of an array of this shape in memory, which is what its values take in the store, too."""
        return math.prod(shape) * self.stored_dtype.itemsize

    def chunk_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Whole indices of axis 0, so that a chunk is one contiguous slab of the array.

        Zarr stores the last chunk of an array at full size, so of the chunk sizes between half and the whole of
        `chunk_mb` this takes the one that wastes least.
        """
        if not shape:
            return ()
        rows, slab_bytes = shape[0], self.size_bytes(shape[1:])
        most = max(1, int(self.chunk_mb * 1e6) // max(1, slab_bytes))
        if rows <= most:
            return chunk_of_rows(max(1, rows), shape)
        least = max(1, most // 2)
        candidates = [math.ceil(rows / n) for n in range(math.ceil(rows / most), math.ceil(rows / least) + 1)]

        def cost_bytes(size: int) -> int:
            chunks = math.ceil(rows / size)
            return (chunks * size - rows) * slab_bytes + chunks * _CHUNK_COST_BYTES

        return chunk_of_rows(min(candidates, key=lambda size: (cost_bytes(size), -size)), shape)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "axes": list(self.axes)}

    @classmethod
    def from_json(cls, document: Any, where: str) -> "Field":
        keys = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(document, dict) or document.keys() != keys:
            raise FormatError(f"{where}: a field of the schema has exactly the keys {', '.join(sorted(keys))}.")
        take(document, "axes", list, where)
        take(document, "required", bool, where)
        try:
            return cls(**document)
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{where}: {error}") from error


def chunk_of_rows(rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a chunk of so many indices of axis 0: Zarr has no length 0."""
    return (rows, *(max(1, length) for length in shape[1:])) if shape else ()
