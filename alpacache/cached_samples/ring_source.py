"""What the ring reads next: the samples of the batches to come, in their order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import KV_SHAPE, POSE_FIELDS
from alpacache.cached_samples.targets import BatchTargets
from alpacache.errors import DataError
from alpacache.gpu.host_memory import Bytes, Slabs
from cache_store.sample_read import SampleRead

CHUNKS = "chunks"
"""Key of what is to be checked on the device, as `SampleRead.unchecked` has it, among the arrays of a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One place of the global order, as the prefetcher is asked for it."""

    position: int
    index: int
    is_new: bool
    """Its target and lengths are not known yet, nor its bytes in memory."""
    ends_batch: bool
    place: int
    """In its batch."""
    targets: BatchTargets
    """Of its batch."""


class RingSource:
    """What the prefetcher reads from: the stores of a dataset, of each sample what is not known yet."""

    def __init__(self, dataset: CachedDataset, slabs: Slabs | None, *, unchecked: Sequence[str]) -> None:
        self._dataset, self._slabs, self._unchecked = dataset, slabs, unchecked
        shape = () if dataset.codec is None else (KV_SHAPE,)
        self._fields = ("kv", "prefix_len", "start_position", *shape, *POSE_FIELDS)
        self._size_bytes = lru_cache(maxsize=4096)(dataset.layout.size_bytes)

    def views(self, wanted: Wanted, buffer: Bytes, fields: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        reader, sample_id = self._dataset.locate(wanted.index)
        if self._slabs is not None:
            if not wanted.is_new:
                return {}
            buffer = self._slabs.place(reader.buffer_bytes(sample_id, ["kv"]))
        return reader.views(sample_id, buffer, ["kv"])

    def plan(
        self, wanted: Wanted, fields: Sequence[str] | None = None, *, out: Mapping[str, NDArray[Any]] | None = None
    ) -> SampleRead:
        reader, sample_id = self._dataset.locate(wanted.index)
        if not wanted.is_new:
            if not out:
                return SampleRead(arrays={}, tasks=[])
            read = reader.plan(sample_id, ["kv"], out=out, unchecked=self._unchecked, by_record=True)
            return SampleRead(arrays=_with_chunks(read), tasks=read.tasks)
        read = reader.plan(sample_id, self._fields, out=out, unchecked=self._unchecked, by_record=True)
        self._check(sample_id, read.arrays)
        wanted.targets.add(wanted.place, wanted.index, [read.arrays[name] for name in POSE_FIELDS])
        return SampleRead(arrays=_with_chunks(read), tasks=read.tasks)

    def _check(self, sample_id: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """The device decodes by the layout and the number of tokens alone: they must be those of the bytes."""
        tokens = int(arrays["prefix_len"])
        shape = arrays["kv"].shape if self._dataset.codec is None else tuple(arrays[KV_SHAPE].tolist())
        expected = self._dataset.layout.shape(tokens)
        if shape != expected or tokens < 1 or arrays["kv"].nbytes != self._size_bytes(tokens):
            raise DataError(
                f"sample {sample_id!r} has keys and values {list(shape)} in {arrays['kv'].nbytes} bytes and "
                f"{tokens} tokens; with the first sample's layers, heads and channels {list(expected)} is expected. "
                "Extract it again, or leave its store out."
            )


def _with_chunks(read: SampleRead) -> dict[str, NDArray[Any]]:
    return read.arrays | ({CHUNKS: read.unchecked["kv"]} if "kv" in read.unchecked else {})
