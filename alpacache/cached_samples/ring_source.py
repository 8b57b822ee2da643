"""The host's half of the ring: what is read next, from which store, and what is remembered of samples read before.

A sample that comes again has its target, turn and lengths already, and with `in_memory` its bytes too.
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

CHUNKS = "chunks"
"""Key, among the arrays of a sample, of what the device is to check: `SampleRead.unchecked` of the KV."""
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
    """Its target and lengths are not known yet, nor are its bytes in memory."""
    ends_batch: bool
    place: int
    """Place in the batch."""
    targets: BatchTargets


class RingSource:
    """Source of the prefetcher: the stores of a dataset, and of each sample what is not known yet."""

    def __init__(
        self, dataset: CachedDataset, space: UnicycleActionSpace, *, in_memory: bool, check_on_device: bool, ahead: bool
    ) -> None:
        """`ahead`: reading threads solve targets. Raises `UsageError` where `in_memory` finds too little RAM."""
        self._dataset, self._space, self._solve_ahead = dataset, space, ahead
        self._unchecked = ("kv",) if check_on_device else ()
        shape = () if dataset.codec is None else (KV_SHAPE,)
        self._fields = ("kv", "prefix_len", "start_position", *shape, *POSE_FIELDS)
        self.slabs = _slabs(dataset) if in_memory else None
        """Memory of samples that stay."""
        self._kept: dict[int, Tensor] = {}
        self._remembered = len(dataset) if in_memory else min(len(dataset), _REMEMBERED)
        self._actions = torch.empty(self._remembered, space.waypoints, 2)
        self._turns = np.zeros(self._remembered, np.uint8)
        self._counts = np.zeros((self._remembered, 2), np.int64)

    def requests(self, batches: Iterator[Sequence[tuple[int, int]]], batch_size: int) -> Iterator[SampleRequest]:
        """Plan the reads for batches of (position, sample index), in order.

        Samples come back in this order, so one that is requested again is known by then.
        """
        seen = np.zeros(len(self._dataset), bool)
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
                new = is_new[place]
                yield SampleRequest(position, index, new, ends_batch=place == last, place=place, targets=targets)

    def views(
        self, request: SampleRequest, buffer: Bytes, fields: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Destination of the sample's KV: its own place in memory, else the buffer."""
        reader, sample_id = self._dataset.locate(request.index)
        if self.slabs is not None:
            if not request.is_new:
                return {}
            buffer = self.slabs.place(reader.buffer_bytes(sample_id, ["kv"]))
        return reader.views(sample_id, buffer, ["kv"])

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
        names = self._fields if request.is_new else ("kv",)
        read = reader.plan(sample_id, names, out=out, unchecked=self._unchecked, by_record=True)
        if request.is_new:
            self._check(sample_id, read.arrays)
            request.targets.add(request.place, request.index, [read.arrays[name] for name in POSE_FIELDS])
        chunks = {CHUNKS: read.unchecked["kv"]} if "kv" in read.unchecked else {}
        return SampleRead(arrays=read.arrays | chunks, tasks=read.tasks)

    def content(self, sample: PrefetchedSample[SampleRequest]) -> tuple[Tensor, int, int]:
        """A sample's bytes, its tokens and the position that follows them: as just read, or as remembered."""
        index, arrays = sample.sample_id.index, sample.arrays
        kv = self._kept[index] if index in self._kept else torch.from_numpy(arrays["kv"].reshape(-1).view(np.uint8))
        if not sample.sample_id.is_new:
            tokens, start = self._counts[index].tolist()
            return kv, tokens, start
        tokens, start = int(arrays["prefix_len"]), int(arrays["start_position"])
        if index < self._remembered:
            self._counts[index] = tokens, start
        if self.slabs is not None:
            self._kept[index] = kv
        return kv, tokens, start

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
                sample_id = self._dataset.sample_id(indices[0])
                raise DataError(f"sample {sample_id!r}: its path cannot be turned into actions; {error}") from error
            alone = ([array[i : i + 1] for array in poses] for i in range(len(indices)))
            action = torch.cat([self._solve([index], of_one)[0] for index, of_one in zip(indices, alone, strict=True)])
        return action, turns_ahead(*poses[1:])

    def _check(self, sample_id: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Compare the bytes with layout and number of tokens, which is all that the device decodes them by."""
        tokens = int(arrays["prefix_len"])
        shape = arrays["kv"].shape if self._dataset.codec is None else tuple(arrays[KV_SHAPE].tolist())
        expected = self._dataset.layout.shape(tokens)
        if shape != expected or tokens < 1 or not self._dataset.layout.can_be(arrays["kv"].nbytes, tokens):
            raise DataError(
                f"sample {sample_id!r} has keys and values {list(shape)} in {arrays['kv'].nbytes} bytes and "
                f"{tokens} tokens; with the first sample's layers, heads and channels {list(expected)} is expected. "
                "Extract it again, or leave its store out."
            )


def _slabs(dataset: CachedDataset) -> Slabs:
    """Room for all samples. Raises `UsageError` where there is not enough."""
    needed, available = sum(map(page_rounded, dataset.kv_bytes.tolist())), available_bytes()
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
