"""Which samples a step takes: one global order for all processes."""

import math
from collections.abc import Iterator, Sequence

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.order import GlobalOrder, make_groups
from alpacache.driving.strata import TURNS, Turn
from alpacache.errors import UsageError
from cache_store import CorruptSampleError


def total_steps(steps: int | None, epochs: float | None, *, samples: int, batch_size: int) -> int:
    """Steps of a whole run, of which either steps or epochs are given."""
    return steps or math.ceil((epochs or 0) * samples / batch_size)


def global_order(
    data: CachedDataset,
    stores: Sequence[tuple[str, float | None]],
    *,
    seed: int,
    by_curvature: bool,
    skip_damaged: bool,
) -> tuple[GlobalOrder, dict[int, CorruptSampleError]]:
    """The order of all samples of a run, and the samples whose curvature could not be read.

    Those keep their places in the order until they are left out.

    Args:
        data: samples of one or several stores.
        stores: path of each store and its share of every epoch; all shares None to take every sample once.
        by_curvature: straight, gentle and sharp futures get equal shares.
        skip_damaged: whether damaged samples are left out; otherwise the first one's error is raised.
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
