"""Sorted sample ids in a few bytes each: a million Python strings would take more memory than some models."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray


class SampleIds(Sequence[str]):
    """An immutable sorted sequence of distinct ids, kept as one run of UTF-8 (whose order is that of code points)."""

    __slots__ = ("ends", "text")

    def __init__(self, text: bytes, ends: NDArray[np.uint64]) -> None:
        """`text`: all ids, sorted, one after the other; `ends`: where each ends."""
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, ids: Iterable[str]) -> "SampleIds":
        encoded = sorted({sample_id.encode() for sample_id in ids})
        return cls(b"".join(encoded), np.cumsum([len(item) for item in encoded], dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._bytes(range(len(self))[index]).decode()

    def __contains__(self, sample_id: object) -> bool:
        if not isinstance(sample_id, str):
            return False
        try:
            wanted = sample_id.encode()
        except UnicodeEncodeError:
            return False
        place = bisect_left(range(len(self)), wanted, key=self._bytes)
        return place < len(self) and self._bytes(place) == wanted

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise([0, *self.ends.tolist()]):
            yield self.text[start:end].decode()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SampleIds):
            return self.text == other.text and np.array_equal(self.ends, other.ends)
        return isinstance(other, Sequence) and not isinstance(other, str) and tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return f"SampleIds({', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''}; {len(self)})"

    def _bytes(self, place: int) -> bytes:
        start = int(self.ends[place - 1]) if place else 0
        return self.text[start : int(self.ends[place])]
