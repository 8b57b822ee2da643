"""Which samples a step takes: one global order for all processes, and what stands in for damaged samples."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import POSE_FIELDS
from alpacache.cached_samples.order import GlobalOrder, make_groups
from alpacache.driving.strata import TURNS, Turn
from alpacache.errors import UsageError
from cache_store import CorruptSampleError


def global_order(
    data: CachedDataset,
    stores: Sequence[tuple[str, float | None]],
    *,
    seed: int,
    by_curvature: bool,
    skip_damaged: bool,
) -> tuple[GlobalOrder, dict[int, CorruptSampleError]]:
    """The order of all samples of a run, and the samples whose curvature could not be read, which keep their places.

    `stores` has the path of each store and its share of every epoch, all None to take every sample once. `by_curvature`
    gives straight, gentle and sharp futures equal shares. Raises the first damaged one's error unless `skip_damaged`.
    """
    weighted: list[tuple[range, float]] = []
    for indices, (path, weight) in zip(data.store_ranges, stores, strict=True):
        if weight is not None and not indices:
            raise UsageError(f"store {path} has no committed sample for its share; leave it out.")
        if weight is not None:
            weighted.append((indices, weight))
    if not weighted and not by_curvature:
        return GlobalOrder(seed, len(data)), {}
    turns, damaged = _turns(data, skip_damaged) if by_curvature else (None, {})
    # Without weights the stores are one pool: curvature counts, not where a sample lies.
    groups = make_groups(weighted or [(range(len(data)), 1.0)], turns)
    return GlobalOrder(seed, len(data), groups=groups), damaged


def _turns(data: CachedDataset, skip_damaged: bool) -> tuple[list[Turn], dict[int, CorruptSampleError]]:
    """Each sample's stratum, and the errors of those that are damaged, which count as of the first stratum."""
    turns = data.turns
    damaged = {index: turn for index, turn in enumerate(turns) if isinstance(turn, CorruptSampleError)}
    if damaged and (not skip_damaged or len(damaged) * 2 > len(data)):
        raise next(iter(damaged.values()))
    return [TURNS[0] if isinstance(turn, CorruptSampleError) else turn for turn in turns], damaged


def batches_of(order: GlobalOrder, batch_size: int, *, first: int, end: int) -> Iterator[list[tuple[int, int]]]:
    """(position, sample index) of each sample of the batches of steps `first` to `end`."""
    for step in range(first, end):
        yield [(position, order[position]) for position in range(step * batch_size, (step + 1) * batch_size)]


class DamagedSamples:
    """The samples that a run leaves out because their stored bytes are damaged, and what takes their places."""

    def __init__(self, data: CachedDataset, on_damage: Literal["stop", "skip"]) -> None:
        self._data, self._skips = data, on_damage == "skip"
        self.indices: set[int] = set()

    def leave_out(self, error: CorruptSampleError) -> None:
        """Leave the sample of an error out. Raises the error where damage stops the run, or is half of all samples.

        Of several samples of this id, in several stores, it leaves out those that are damaged.
        """
        if not self._skips:
            raise error
        same_id = {index for index in range(len(self._data)) if self._data.sample_id(index) == error.sample_id}
        new = same_id - self.indices
        if len(same_id) > 1:
            new = set(filter(self._is_damaged, new))
        if not new or len(self.indices | new) * 2 > len(self._data):
            raise error
        self.indices |= new

    def _is_damaged(self, index: int) -> bool:
        reader, sample_id = self._data.locate(index)
        try:
            reader.read(sample_id, (*self._data.prefix_fields, *POSE_FIELDS))
        except CorruptSampleError:
            return True
        return False

    def replace(self, batch: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """A batch of (position, sample index) with the next sound sample in place of each that is left out."""
        return [(position, self._next_sound(index)) for position, index in batch]

    def _next_sound(self, index: int) -> int:
        while index in self.indices:
            index = (index + 1) % len(self._data)
        return index

    def state(self) -> dict[str, list[Any]]:
        """What a checkpoint records: the indices, and the ids for people."""
        ids = sorted(self._data.sample_id(index) for index in self.indices)
        return {"damaged": ids, "damaged_indices": sorted(self.indices)}
