"""Which samples a step takes: one global order for all processes, and what happens to damaged ones."""

from collections.abc import Iterator

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.order import GlobalOrder, make_groups
from alpacache.driving.strata import TURNS, Turn
from alpacache.errors import UsageError
from alpacache.training.config import TrainConfig
from cache_store import CorruptSampleError


def global_order(config: TrainConfig, data: CachedDataset) -> GlobalOrder:
    """Which sample is at which place of the run."""
    return order_and_damage(config, data)[0]


def order_and_damage(config: TrainConfig, data: CachedDataset) -> tuple[GlobalOrder, dict[int, CorruptSampleError]]:
    """The order, and which samples were found damaged by it; these are at places of their own until left out."""
    weighted: list[tuple[range, float]] = []
    stores = zip(data.store_ranges, config.store_paths, config.store_weights, strict=True)
    for indices, store, weight in stores:
        if weight is not None and not indices:
            raise UsageError(f"store {store} has no committed sample for its share; leave it out.")
        if weight is not None:
            weighted.append((indices, weight))
    if not weighted and config.balance == "none":
        return GlobalOrder(config.seed, len(data)), {}
    turns, damaged = _turns(config, data) if config.balance == "curvature" else (None, {})
    # Without weights the stores are one pool: curvature counts, not where a sample lies.
    groups = make_groups(weighted or [(range(len(data)), 1.0)], turns)
    return GlobalOrder(config.seed, len(data), groups=groups), damaged


def _turns(config: TrainConfig, data: CachedDataset) -> tuple[list[Turn], dict[int, CorruptSampleError]]:
    """Each sample's stratum; a damaged one that the run is to leave out counts as of the first."""
    found = data.turns
    damaged = {index: turn for index, turn in enumerate(found) if isinstance(turn, CorruptSampleError)}
    if damaged and (config.on_damage == "stop" or len(damaged) * 2 > len(data)):
        raise next(iter(damaged.values()))
    return [TURNS[0] if isinstance(turn, CorruptSampleError) else turn for turn in found], damaged


def batches_of(order: GlobalOrder, batch_size: int, *, first: int, end: int) -> Iterator[list[tuple[int, int]]]:
    """(position, sample index) of each batch from step `first` on."""
    for step in range(first, end):
        yield [(position, order[position]) for position in range(step * batch_size, (step + 1) * batch_size)]
