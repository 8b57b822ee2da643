"""Which samples a step takes: one global order for all processes, and what stands in for damaged samples."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from alpacache.cached_samples.dataset import CachedDataset, StratumShare
from alpacache.cached_samples.order import GlobalOrder, make_groups
from alpacache.cached_samples.sample_choice import ChosenSamples
from alpacache.driving.sample import SampleRef
from alpacache.driving.splits import count_overlapping
from alpacache.driving.strata import TURNS, Turn
from alpacache.errors import UsageError
from cache_store import SampleReadError


def check_overlap(
    data: CachedDataset, stores: Sequence[str], val: CachedDataset | None, *, val_store: str | None, allowed: bool
) -> list[str]:
    """Raise `UsageError` where stores hold the same samples, unless that is `allowed`.

    Returns what is to be warned of, with counts: such samples, and clips that training and validation share. A sample
    is the same whatever its cameras, frames or features.
    """
    owner: dict[str, int] = {}
    again: Counter[tuple[int, int]] = Counter()
    for place, indices in enumerate(data.store_ranges):
        for sample_id in map(data.sample_id, indices):
            if (first := owner.setdefault(sample_id, place)) != place:
                again[first, place] += 1
    lines = [
        f"{count} of {len(data.store_ranges[place])} samples of --store {stores[place]} are in {stores[first]} too: "
        "they would count twice"
        for (first, place), count in again.items()
    ]
    if lines and not allowed:
        listed = "\n  ".join(lines)
        raise UsageError(
            f"the stores overlap:\n  {listed}\nGive each sample once, or pass --on-overlap allow if that is what you "
            "want."
        )
    if val is not None:
        lines += _shared_road(_refs(data), _refs(val), val_store)
    return lines


def _shared_road(trained: Sequence[SampleRef], validated: Sequence[SampleRef], val_store: str | None) -> list[str]:
    """Say where validation sees drives, or even moments, that are trained on."""
    clips, val_clips = ({ref.clip_id for ref in refs} for refs in (trained, validated))
    if not (count := len(clips & val_clips)):
        return []
    if not (moments := count_overlapping(validated, trained)):
        return [
            f"{count} of {len(val_clips)} clips of --val {val_store} are trained on, at other times: none of "
            f"{len(validated)} windows overlaps one that is trained on, so the validation loss tells of these drives"
        ]
    return [
        f"{count} of {len(val_clips)} clips of --val {val_store} are trained on, and {moments} of its "
        f"{len(validated)} windows of 8 s overlap such that are: the validation loss would not tell what is learnt "
        "from what is learnt by heart (`--split train` and `--split val` share no clip, with --split-by time:60 no "
        "window)"
    ]


def _refs(data: CachedDataset) -> list[SampleRef]:
    return [SampleRef.parse(data.sample_id(index)) for index in range(len(data))]


def global_order(
    data: CachedDataset,
    stores: Sequence[tuple[str, float | None]],
    *,
    seed: int,
    by_curvature: bool,
    skip_damaged: bool,
) -> tuple[GlobalOrder, dict[int, SampleReadError]]:
    """The order of all samples of a run, and the samples whose curvature could not be read, which keep their places.

    `stores` has the path of each store and its share of every epoch, all None to take every sample once. `by_curvature`
    gives straight, gentle and sharp futures equal shares. Weights of chosen samples count within these shares. Raises
    the first damaged one's error unless `skip_damaged`.
    """
    weighted: list[tuple[range, float]] = []
    for indices, (path, weight) in zip(data.store_ranges, stores, strict=True):
        if weight is not None and not indices:
            what = "committed" if data.chosen is None else "chosen"
            raise UsageError(f"store {path} has no {what} sample for its share; leave it out.")
        if weight is not None:
            weighted.append((indices, weight))
    of_samples = None if data.chosen is None else data.chosen.weights
    if not weighted and not by_curvature and of_samples is None:
        return GlobalOrder(seed, len(data)), {}
    turns, damaged = _turns(data, skip_damaged) if by_curvature else (None, {})
    # Without weights the stores are one pool: curvature counts, not where a sample lies.
    groups = make_groups(weighted or [(range(len(data)), 1.0)], turns, of_samples=of_samples)
    return GlobalOrder(seed, len(data), groups=groups), damaged


def _turns(data: CachedDataset, skip_damaged: bool) -> tuple[list[Turn], dict[int, SampleReadError]]:
    """Each sample's stratum, and the errors of those that cannot be read, which count as of the first stratum."""
    turns = data.turns
    damaged = {index: turn for index, turn in enumerate(turns) if isinstance(turn, SampleReadError)}
    if damaged and (not skip_damaged or len(damaged) * 2 > len(data)):
        raise next(iter(damaged.values()))
    return [TURNS[0] if isinstance(turn, SampleReadError) else turn for turn in turns], damaged


def choice_lines(chosen: ChosenSamples, strata: Mapping[str, StratumShare]) -> list[str]:
    """Say in lines what a choice of samples came to."""
    weighted = "" if chosen.weights is None else f", weights {chosen.weights.min():g} to {chosen.weights.max():g}"
    lines = [
        f"{len(chosen.indices)} of {chosen.of} samples are chosen{weighted}; by stratum, with its share of an epoch:"
    ]
    return lines + [f"{one.samples:7d} {one.share:6.1%}  {name}" for name, one in strata.items()]


def batches_of(order: GlobalOrder, batch_size: int, *, first: int, end: int) -> Iterator[list[tuple[int, int]]]:
    """(position, sample index) of each sample of the batches of steps `first` to `end`."""
    for step in range(first, end):
        yield [(position, order[position]) for position in range(step * batch_size, (step + 1) * batch_size)]


_EXCUSED = 3
"""Faults at one turn that may pass without a consequence."""


class DamagedSamples:
    """The samples that a run leaves out because they cannot be read, and what takes their places.

    A fault may pass: a sample that cannot be read is left out once, and tried again when it comes next. If that fails,
    too, it counts as damaged and is left out for good.
    """

    def __init__(self, data: CachedDataset, on_damage: Literal["stop", "skip"]) -> None:
        self._data, self._skips = data, on_damage == "skip"
        self.indices: set[int] = set()
        """Samples that are left out for good."""
        self.passing: set[int] = set()
        """Samples that could not be read once and could be later."""
        self._missed: dict[int, int] = {}
        """Samples that are to be tried again, and from which position on."""
        self._excused = (-1, 0)
        """Until where the last sample would have been left out that could be read at once, and how many were there."""

    def leave_out(self, error: SampleReadError, *, until: int = 0) -> bool | None:
        """Leave the sample of an error out at the positions before `until`, or for good if it was before.

        Returns whether it is for good; None where it is not left out at all, because it can be read now: it may have
        been read ahead long before its turn. Raises the error where damage stops the run, or is half of all samples.
        Of several samples of this id, in several stores, it leaves out those that cannot be read.
        """
        same_id = {index for index in range(len(self._data)) if self._data.sample_id(index) == error.sample_id}
        new = same_id - self.indices
        failing = set(filter(self._data.error_of, new))
        excused = self._excused[1] if self._excused[0] == until else 0
        if new and not failing and excused < _EXCUSED:
            self._excused = (until, excused + 1)
            self.passing |= new
            self._missed = {index: end for index, end in self._missed.items() if index not in new}
            return None
        new = failing or new
        if not self._skips or not new or len(self.indices | self._missed.keys() | new) * 2 > len(self._data):
            raise error
        again = new & self._missed.keys()
        for index in again:
            self.give_up(index)
        self._missed |= dict.fromkeys(new - again, until)
        return bool(again)

    @property
    def awaits(self) -> bool:
        """True if a sample is to be tried again."""
        return bool(self._missed)

    def delivered(self, batch: list[tuple[int, int]]) -> None:
        """Note that the samples in the places of a batch were read, those that were missed before among them."""
        for _, index in self.replace(batch):
            if self._missed.pop(index, None) is not None:
                self.passing.add(index)

    def settle(self) -> list[SampleReadError]:
        """Try what has not come again once more, and return the errors of those that are left out for good by it."""
        errors = {index: self._data.error_of(index) for index in self._missed}
        for index, error in errors.items():
            if error is not None:
                self.give_up(index)
        self.passing |= self._missed.keys()
        self._missed = {}
        return [error for error in errors.values() if error is not None]

    def give_up(self, index: int) -> None:
        """Leave a sample out for good."""
        self.indices.add(index)
        self.passing.discard(index)
        self._missed.pop(index, None)

    def replace(self, batch: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """A batch of (position, sample index) with the next sound sample in place of each that is left out."""
        return [(position, self._next_sound(index, position)) for position, index in batch]

    def _next_sound(self, index: int, position: int) -> int:
        while index in self.indices or position < self._missed.get(index, 0):
            index = (index + 1) % len(self._data)
        return index

    def state(self) -> dict[str, list[Any]]:
        """Return what a checkpoint records: indices, and readable sample ids."""
        ids = sorted(self._data.sample_id(index) for index in self.indices)
        return {"damaged": ids, "damaged_indices": sorted(self.indices)}
