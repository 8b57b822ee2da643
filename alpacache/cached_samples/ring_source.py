"""The host's half of the ring: what is read next, from which store, and what is remembered of samples read before.

A sample that comes again has its target, turn and lengths already, and with `in_memory` its bytes too. Where it comes
with the tail of a reasoning rollout, the tail is read beside the prefix, and is new or known by itself.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import KV_SHAPE, POSE_FIELDS
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.strata import TURNS, Turn, turns_ahead
from alpacache.errors import DataError, UsageError
from alpacache.gpu.device import limit_torch_to_one_thread, restored_torch_threads
from alpacache.gpu.host_memory import Bytes, Slabs, available_bytes, page_rounded
from alpacache.torchrun import this_process
from cache_store.prefetcher import PrefetchedSample
from cache_store.sample_read import SampleRead

CHUNKS, TAIL_CHUNKS = "chunks", "tail_chunks"
"""Keys, among the arrays of a sample, of what the device is to check: `SampleRead.unchecked` of prefix and tail."""
_REMEMBERED = 2**18
"""Samples whose target and lengths stay in memory after their first use, half a kilobyte each."""
_SPARE_BYTES = 2**31
"""RAM that samples kept in memory leave to the rest of a run."""
PoseArrays: TypeAlias = Sequence[NDArray[Any]]
"""One array for each of `features.POSE_FIELDS`, of one sample or of several stacked."""
Solve: TypeAlias = Callable[[Sequence[int], PoseArrays], tuple[Tensor, list[Turn]]]
"""From the indices of n samples and their poses to actions `[n, 64, 2]` and turns."""


class BatchTargets:
    """Targets of a batch's new samples, solved together while their prefixes are still being read.

    A solve is a hundred small operations, each of which lets go of the interpreter lock and then, beside a dozen
    reading threads, waits to get it back. So it is done for a whole batch at once and, on a GPU, by the thread that has
    read the last of its paths: the training loop, which the GPU waits for, finds it done.
    """

    def __init__(self, count: int, solve: Solve, *, ahead: bool) -> None:
        """`ahead`: whoever adds the last path solves; otherwise whoever asks for the result."""
        self._count, self._solve, self._ahead = count, solve, ahead
        self._lock, self._solved = threading.Lock(), Future[tuple[Tensor, list[Turn]]]()
        self._added: dict[int, tuple[int, PoseArrays]] = {}

    def add(self, place: int, index: int, poses: PoseArrays) -> None:
        """Note the path of the sample with that index; may be called in any thread."""
        with self._lock:
            self._added[place] = index, poses
            complete = len(self._added) == self._count
        if complete and self._ahead:
            limit_torch_to_one_thread()
            self._run()

    def result(self) -> tuple[Tensor, list[Turn]]:
        """Actions `[n, 64, 2]` and turns in the order of places, once all are added. Raises what solving has raised."""
        if not self._ahead:
            with restored_torch_threads():
                limit_torch_to_one_thread()  # a team of helpers would crowd out the reading threads
                self._run()
        return self._solved.result()

    def _run(self) -> None:
        try:
            indices, poses = zip(*(self._added[place] for place in sorted(self._added)), strict=True)
            self._solved.set_result(self._solve(indices, [np.stack(arrays) for arrays in zip(*poses, strict=True)]))
        except Exception as error:
            self._solved.set_exception(error)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One place of the global order, as the prefetcher is asked for it."""

    position: int
    index: int
    is_new: bool
    """True while its target and lengths are not known and its bytes are not in memory."""
    ends_batch: bool
    place: int
    """Place in the batch."""
    targets: BatchTargets
    tail: int | None = None
    """Place in `CachedDataset.tails_of` of the tail that it comes with."""
    tail_is_new: bool = False
    """The tail's lengths are not known yet, nor are its bytes in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrefix:
    """A sample's keys and values as the store has them, and what the expert is to attend to of them."""

    kv: Tensor
    """Bytes of stem and direct tail."""
    stored: int
    """Tokens of these."""
    stem: int
    """Number of them that are attended to: all without a tail."""
    tail_kv: Tensor | None = None
    """Bytes of the tail of a rollout."""
    tail: int = 0
    """Tokens of these."""
    start: int
    """Position of the first action token."""

    @property
    def tokens(self) -> int:
        """Tokens that are attended to."""
        return self.stem + self.tail


class RingSource:
    """Source of the prefetcher: the stores of a dataset, and of each sample what is not known yet."""

    def __init__(
        self, dataset: CachedDataset, space: UnicycleActionSpace, *, in_memory: bool, check_on_device: bool, ahead: bool
    ) -> None:
        """`ahead`: reading threads solve targets. Raises `UsageError` where `in_memory` finds too little RAM."""
        self._dataset, self._space, self._solve_ahead = dataset, space, ahead
        self._check_on_device = check_on_device
        shape = () if dataset.codec is None else (KV_SHAPE,)
        stem = () if dataset.tail_room is None else ("stem_len",)
        self._fields = ("kv", "prefix_len", "start_position", *stem, *shape, *POSE_FIELDS)
        self._tail_fields = ("kv", "start_position", *shape)
        self.slabs = _slabs(dataset) if in_memory else None
        """Memory of samples that stay."""
        self._kept: dict[tuple[int, int | None], Tensor] = {}
        """Bytes in memory, by sample and tail; the prefix is of tail None."""
        self._remembered = len(dataset) if in_memory else min(len(dataset), _REMEMBERED)
        self._actions = torch.empty(self._remembered, space.waypoints, 2)
        self._turns = np.zeros(self._remembered, np.uint8)
        self._counts = np.zeros((self._remembered, 3), np.int64)
        """Tokens of each prefix, position after it, tokens of the stem."""
        self._tails = 0 if dataset.tail_room is None else dataset.tail_bytes.shape[1]
        self._tail_counts = np.zeros((self._remembered, self._tails, 2), np.int64)
        """Tokens of each tail, and position after it."""

    def requests(self, batches: Iterator[Sequence[tuple[int, int]]], batch_size: int) -> Iterator[SampleRequest]:
        """Plan the reads for batches of (position, sample index), in order.

        Samples come back in this order, so one that is requested again is known by then.
        """
        seen, seen_tails = np.zeros(len(self._dataset), bool), np.zeros((self._remembered, self._tails), bool)
        for batch in batches:
            if not 0 < len(batch) <= batch_size:
                raise ValueError(f"a batch has 1 to {batch_size} samples, got {len(batch)}.")
            is_new = []
            for _, index in batch:
                is_new.append(index >= self._remembered or not seen[index])
                seen[index] = True
            targets = BatchTargets(sum(is_new), self._solve, ahead=self._solve_ahead)
            last = len(batch) - 1
            for place, (position, index) in enumerate(batch):
                tail, tail_is_new = self._dataset.tail_at(index, position), False
                if tail is not None:
                    tail_is_new = index >= self._remembered or not seen_tails[index, tail]
                    seen_tails[index : index + 1, tail] = True  # beyond the remembered ones nothing
                yield SampleRequest(
                    position,
                    index,
                    is_new[place],
                    ends_batch=place == last,
                    place=place,
                    targets=targets,
                    tail=tail,
                    tail_is_new=tail_is_new,
                )

    def views(
        self, request: SampleRequest, buffer: Bytes, fields: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Destination of the sample's KV: its own place in memory, else the buffer."""
        reader, sample_id = self._dataset.locate(request.index)
        names = ["kv"] if request.is_new or self.slabs is None else []
        if request.tail is not None and (request.tail_is_new or self.slabs is None):
            names.append(f"{self._dataset.tails_of(request.index)[request.tail]}kv")
        ranges = self._dataset.ranges(reader, sample_id, names)
        if self.slabs is None:
            return reader.views(sample_id, buffer, names, ranges=ranges)
        out: dict[str, NDArray[Any]] = {}
        for name in names:
            place = self.slabs.place(reader.buffer_bytes(sample_id, [name], ranges=ranges))
            out |= reader.views(sample_id, place, [name], ranges=ranges)
        return out

    def plan(
        self,
        request: SampleRequest,
        fields: Sequence[str] | None = None,
        *,
        out: Mapping[str, NDArray[Any]] | None = None,
    ) -> SampleRead:
        """The reads of a sample: all that training needs of a new one, else the KV, else nothing."""
        if not request.is_new and not out:
            return SampleRead(arrays={}, tasks=[])
        reader, sample_id = self._dataset.locate(request.index)
        tail = None if request.tail is None else self._dataset.tails_of(request.index)[request.tail]
        names = [*self._fields] if request.is_new else [name for name in out or () if name == "kv"]
        if tail is not None and request.tail_is_new:
            names += [f"{tail}{name}" for name in self._tail_fields]
        elif tail is not None and f"{tail}kv" in (out or ()):
            names.append(f"{tail}kv")
        unchecked = [name for name in names if name.endswith("kv")] if self._check_on_device else []
        ranges = self._dataset.ranges(reader, sample_id, names)
        read = reader.plan(sample_id, names, out=out, unchecked=unchecked, by_record=True, ranges=ranges)
        if request.is_new:
            self._check(request.index, read.arrays, "", int(read.arrays["prefix_len"]))
            request.targets.add(request.place, request.index, [read.arrays[name] for name in POSE_FIELDS])
        if tail is not None and request.tail_is_new:
            self._check(request.index, read.arrays, tail, self._tail_tokens(read.arrays, tail))
        keys = {CHUNKS: "kv", TAIL_CHUNKS: f"{tail}kv"}
        chunks = {key: read.unchecked[name] for key, name in keys.items() if name in read.unchecked}
        return SampleRead(arrays=read.arrays | chunks, tasks=read.tasks)

    def content(self, sample: PrefetchedSample[SampleRequest]) -> StoredPrefix:
        """A sample's bytes, their tokens and the position that follows them: as just read, or as remembered."""
        request, arrays = sample.sample_id, sample.arrays
        index, number = request.index, request.tail
        kv = self._bytes((index, None), arrays, "kv")
        if request.is_new:
            stored, start = int(arrays["prefix_len"]), int(arrays["start_position"])
            stem = int(arrays.get("stem_len", stored))
            if index < self._remembered:
                self._counts[index] = stored, start, stem
        else:
            stored, start, stem = self._counts[index].tolist()
        if number is None:
            return StoredPrefix(kv=kv, stored=stored, stem=stored, start=start)
        tail = self._dataset.tails_of(index)[number]
        tail_kv = self._bytes((index, number), arrays, f"{tail}kv")
        if request.tail_is_new:
            tokens, start = self._tail_tokens(arrays, tail), int(arrays[f"{tail}start_position"])
            if index < self._remembered:
                self._tail_counts[index, number] = tokens, start
        else:
            tokens, start = self._tail_counts[index, number].tolist()
        return StoredPrefix(kv=kv, stored=stored, stem=stem, tail_kv=tail_kv, tail=tokens, start=start)

    def _bytes(self, part: tuple[int, int | None], arrays: Mapping[str, NDArray[Any]], name: str) -> Tensor:
        """Bytes of a sample's prefix or tail, as just read or as kept."""
        if (kept := self._kept.get(part)) is not None:
            return kept
        kv = torch.from_numpy(arrays[name].reshape(-1).view(np.uint8))
        if self.slabs is not None:
            self._kept[part] = kv
        return kv

    def _tail_tokens(self, arrays: Mapping[str, NDArray[Any]], tail: str) -> int:
        shape = arrays[f"{tail}kv"].shape if self._dataset.codec is None else arrays[f"{tail}{KV_SHAPE}"]
        return int(shape[3])

    def targets(self, batch: Sequence[SampleRequest]) -> tuple[Tensor, tuple[Turn, ...]]:
        """Actions `[B, 64, 2]` and turns of a batch: those of new samples as solved, others as remembered."""
        action, turns = torch.empty(len(batch), *self._actions.shape[1:]), np.zeros(len(batch), np.uint8)
        if new := [place for place, request in enumerate(batch) if request.is_new]:
            action[new], names = batch[0].targets.result()
            turns[new] = [*map(TURNS.index, names)]
        for place, request in enumerate(batch):
            if not request.is_new:
                action[place], turns[place] = self._actions[request.index], self._turns[request.index]
            elif request.index < self._remembered:
                self._actions[request.index], self._turns[request.index] = action[place], turns[place]
        return action, tuple(TURNS[turn] for turn in turns)

    def _solve(self, indices: Sequence[int], poses: PoseArrays) -> tuple[Tensor, list[Turn]]:
        """Solve targets. Raises `DataError` with the first sample whose path has no action."""
        try:
            action = self._space.to_action(*map(torch.from_numpy, poses))
        except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            if len(indices) == 1:
                is_finite = all(np.isfinite(array).all() for array in poses)
                why = f"cannot be turned into actions ({str(error).rstrip('.')})" if is_finite else "is not finite"
                raise DataError(
                    f"sample {self._dataset.sample_id(indices[0])!r}: its stored path {why}. Leave it out with "
                    "--except, or extract it again into a new store."
                ) from error
            alone = ([array[i : i + 1] for array in poses] for i in range(len(indices)))
            action = torch.cat([self._solve([index], of_one)[0] for index, of_one in zip(indices, alone, strict=True)])
        return action, turns_ahead(*poses[1:])

    def _check(self, index: int, arrays: Mapping[str, NDArray[Any]], name: str, tokens: int) -> None:
        """Compare the bytes with layout and number of tokens, which is all that the device decodes them by.

        `name` begins the names of the fields: those of a tail, or nothing.
        """
        reader, sample_id = self._dataset.locate(index)
        size = arrays[f"{name}kv"].nbytes
        shape = arrays[f"{name}kv"].shape
        if self._dataset.codec is not None:
            shape = self._dataset.shape_read(reader, arrays[f"{name}{KV_SHAPE}"].tolist())
        expected = self._dataset.layout.shape(tokens)
        if shape != expected or tokens < 1 or not self._dataset.layout.can_be(size, tokens):
            raise DataError(
                f"sample {sample_id!r} has keys and values {list(shape)} in {size} bytes and "
                f"{tokens} tokens; with the first sample's layers, heads and channels {list(expected)} is expected. "
                "Extract it again, or leave its store out."
            )
        if not name and not 0 < (stem := int(arrays.get("stem_len", tokens))) <= tokens:
            raise DataError(
                f"sample {sample_id!r} has a stem of {stem} tokens; expected 1 to {tokens}, as many as its prefix has. "
                "Extract it again, or leave its store out."
            )


def _slabs(dataset: CachedDataset) -> Slabs:
    """Room for all samples. Raises `UsageError` where there is not enough."""
    sizes = [*dataset.kv_bytes.tolist(), *dataset.tail_bytes.flatten().tolist()]
    needed, available = sum(map(page_rounded, sizes)), available_bytes()
    # Each will have kept all samples after some epochs, and all ask before any has begun.
    processes = this_process().local_world_size
    total = processes * (needed + _SPARE_BYTES)
    if total > available:
        each = f", in each of {processes} processes on this machine: {total:,} together" if processes > 1 else ""
        raise UsageError(
            f"keeping {len(dataset)} samples in memory takes {needed:,} bytes, and {_SPARE_BYTES:,} should be left to "
            f"the rest of the run{each}; {available:,} are available. Leave --in-memory out: samples are then read "
            "from disk in every epoch."
        )
    return Slabs(needed)
