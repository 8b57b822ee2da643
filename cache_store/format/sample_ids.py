"""Sorted sample ids in a few bytes each: a million Python strings would take more memory than some models."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray


class SampleIds(Sequence[str]):
    """An immutable sorted sequence of distinct ids, kept as one run of UTF-8 (whose order is that of code points)."""

    __slots__ = ("_ends", "_text")

    def __init__(self, text: bytes, ends: NDArray[np.uint64]) -> None:
        """`text`: all ids, sorted, one after the other; `ends`: where each ends."""
        self._text = text
        self._ends = ends

    @classmethod
    def of(cls, ids: Iterable[str]) -> "SampleIds":
        encoded = sorted({sample_id.encode() for sample_id in ids})
        return cls(b"".join(encoded), np.cumsum([len(item) for item in encoded], dtype=np.uint64))

    @property
    def text(self) -> bytes:
        return self._text

    @property
    def ends(self) -> NDArray[np.uint64]:
        return self._ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]
        return self._bytes(place).decode()

    def __contains__(self, sample_id: object) -> bool:
        if not isinstance(sample_id, str):
            return False
        try:
            wanted = sample_id.encode()
        except UnicodeEncodeError:
            return False
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._bytes(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low < len(self) and self._bytes(low) == wanted

    def __iter__(self):  # type: ignore[no-untyped-def]  # Iterator[str], as Sequence has it
        for start, end in pairwise([0, *self._ends.tolist()]):
            yield self._text[start:end].decode()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SampleIds):
            return self._text == other._text and np.array_equal(self._ends, other._ends)
        return isinstance(other, Sequence) and not isinstance(other, str) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return f"SampleIds({', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''}; {len(self)})"

    def __reduce__(self) -> tuple[object, ...]:
        return SampleIds, (self._text, self._ends)

    def _bytes(self, place: int) -> bytes:
        start = int(self._ends[place - 1]) if place else 0
        return self._text[start : int(self._ends[place])]
