"""Samples whose stored bytes are damaged: they stop a run, or are left out and counted."""

from collections.abc import Mapping
from typing import Any, Literal

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import POSE_FIELDS
from cache_store import CorruptSampleError


class DamagedSamples:
    """The samples that a run leaves out, and what takes their places."""

    def __init__(self, data: CachedDataset, on_damage: Literal["stop", "skip"]) -> None:
        self._data, self._skips = data, on_damage == "skip"
        self._indices: set[int] = set()

    def __len__(self) -> int:
        return len(self._indices)

    def __contains__(self, index: int) -> bool:
        return index in self._indices

    def add(self, index: int) -> None:
        """Leave a sample out."""
        self._indices.add(index)

    def leave_out(self, error: CorruptSampleError) -> None:
        """Leave the sample of an error out. Raises the error where damage stops the run, or is half of all samples.

        Of several samples of this id, in several stores, it leaves out those that are damaged.
        """
        if not self._skips:
            raise error
        same_id = {index for index in range(len(self._data)) if self._data.sample_id(index) == error.sample_id}
        new = same_id - self._indices
        if len(same_id) > 1:
            new = {index for index in new if self._is_damaged(index)}
        if not new or (len(self) + len(new)) * 2 > len(self._data):
            raise error
        self._indices |= new

    def _is_damaged(self, index: int) -> bool:
        reader, sample_id = self._data.locate(index)
        try:
            reader.read(sample_id, (*self._data.prefix_fields, *POSE_FIELDS))
        except CorruptSampleError:
            return True
        return False

    def replace(self, batch: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """A batch of (position, sample index) with the next sample in place of each that is left out."""
        return [(position, self._next_sound(index)) for position, index in batch]

    def _next_sound(self, index: int) -> int:
        while index in self._indices:
            index = (index + 1) % len(self._data)
        return index

    def state(self) -> dict[str, list[Any]]:
        """The part of a checkpoint's state that `load` reads, and the ids for people."""
        ids = sorted(self._data.sample_id(index) for index in self._indices)
        return {"damaged": ids, "damaged_indices": sorted(self._indices)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Leave out what a checkpoint's run did."""
        self._indices = set(state["damaged_indices"])
