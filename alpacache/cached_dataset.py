"""Cached samples for stage two: one or several stores as one indexed set, read ahead by threads."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from alpacache.action_space import UnicycleActionSpace
from alpacache.alpamayo import Checkpoint, EncodedPrefix, PrefixFeatures
from alpacache.errors import UsageError
from alpacache.features import KV_SHAPE, POSE_FIELDS, PREFIX_FIELDS, CachedSample, from_arrays
from alpacache.identity import check_same_model, store_codec
from cache_store import CacheReader, KVCodec, differences

_SHARED = ("model", "prompt", "processor", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingItem:
    """One sample with its target, at one place of the global order."""

    position: int
    sample_id: str
    prefix: PrefixFeatures | EncodedPrefix
    action: Tensor
    """`[64, 2]` normalised, float32."""


class CachedDataset:
    """All committed samples of the given stores, in order of store and id. `load` is safe in threads."""

    def __init__(self, stores: Sequence[str | Path], checkpoint: Checkpoint, *, in_memory: bool = False) -> None:
        readers = [CacheReader(store) for store in stores]
        codecs: list[KVCodec | None] = []
        for store, reader in zip(stores, readers, strict=True):
            check_same_model(checkpoint, reader.identity, store=str(store))
            codecs.append(store_codec(reader.identity, store=str(store)))
        _check_mixable(list(stores), readers)
        self._index = [
            (reader, codec, sample_id)
            for reader, codec in zip(readers, codecs, strict=True)
            for sample_id in reader.sample_ids
        ]
        if not self._index:
            raise UsageError(f"no committed sample in {', '.join(map(str, stores))}; run `alpacache extract` first.")
        self._kept: dict[int, CachedSample] | None = {} if in_memory else None

    def __len__(self) -> int:
        return len(self._index)

    def sample_id(self, index: int) -> str:
        return self._index[index][2]

    def load(self, index: int) -> CachedSample:
        """Read one sample's prefix and poses. Raises `CorruptSampleError` where a stored byte is not as committed."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        reader, codec, sample_id = self._index[index]
        fields = (*PREFIX_FIELDS, *POSE_FIELDS) if codec is None else (*PREFIX_FIELDS, KV_SHAPE, *POSE_FIELDS)
        sample = from_arrays(sample_id, reader.read(sample_id, fields=fields), codec=codec)
        if self._kept is not None:
            self._kept[index] = sample
        return sample

    def front_jpeg(self, index: int) -> bytes | None:
        """The front camera's small picture, where the sample has one."""
        reader, _, sample_id = self._index[index]
        if "front_jpeg" not in reader.fields_of(sample_id):
            return None
        picture: bytes = reader.read(sample_id, fields=["front_jpeg"])["front_jpeg"].tobytes()
        return picture


def _check_mixable(stores: Sequence[str | Path], readers: Sequence[CacheReader]) -> None:
    """Stores trained together may differ in cameras, frames and codec, not in what the VLM was and how it was asked."""
    first = {key: readers[0].identity[key] for key in _SHARED}
    for store, reader in zip(stores, readers, strict=True):
        if lines := differences(first, {key: reader.identity[key] for key in _SHARED}):
            raise UsageError(f"store {store} cannot be mixed with {stores[0]}:\n  " + "\n  ".join(lines))


def target(sample: CachedSample, space: UnicycleActionSpace) -> Tensor:
    """The action `[64, 2]` to learn. Solved sample by sample, so that no batch changes a bit of it."""
    return space.to_action(sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot)


class BatchLoader:
    """Batches of the global order, a few read ahead. Measures how long its consumer waits."""

    def __init__(
        self,
        dataset: CachedDataset,
        space: UnicycleActionSpace,
        places: Iterator[Sequence[tuple[int, int]]],
        *,
        threads: int = 4,
        ahead: int = 2,
    ) -> None:
        """`places` yields batches of (position, sample index)."""
        self._dataset, self._space, self._places = dataset, space, places
        self._threads, self._ahead = threads, ahead
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[list[TrainingItem]]:
        with ThreadPoolExecutor(self._threads, "load") as pool:
            queue: deque[list[Future[TrainingItem]]] = deque()
            try:
                while True:
                    while len(queue) <= self._ahead and (batch := next(self._places, None)) is not None:
                        queue.append([pool.submit(self._item, *place) for place in batch])
                    if not queue:
                        return
                    started = time.monotonic()
                    items = [future.result() for future in queue.popleft()]
                    self.waited_s += time.monotonic() - started
                    yield items
            finally:
                for futures in queue:
                    for future in futures:
                        future.cancel()

    def _item(self, position: int, index: int) -> TrainingItem:
        sample = self._dataset.load(index)
        action = target(sample, self._space)
        return TrainingItem(position=position, sample_id=sample.sample_id, prefix=sample.prefix, action=action)
