"""Batches of cached samples on the device, in the global order: disk, page-locked RAM, rows of device memory.

Threads read ahead into a ring of page-locked buffers; a stream of its own copies from there into rows of device memory,
of which there are two batches: while one is computed on, the other is filled. Streams wait for each other by events
and the host for neither, except that buffers come back when their copies have ended: this is what keeps a loop that
only enqueues from running more than a few steps ahead. A loop that waits for results calls `hand_back` first. CUDA is
called by the loop's own thread alone, because a call from another would break a CUDA graph that is being captured. On
the CPU all is the same, without streams and events.

Checksums are the larger part of what reading from RAM costs a CPU, and a GPU computes them in a fiftieth of a step. So
there they may be checked in the rows; whoever computes on rows then has to look at `damage` before anything is kept.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.ring_source import CHUNKS, RingSource, Wanted
from alpacache.cached_samples.targets import BatchTargets, solver
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.strata import TURNS, Turn
from alpacache.errors import DataError, UsageError
from alpacache.gpu.device import has_kernels, keeping_threads
from alpacache.gpu.host_memory import (
    Bytes,
    Slabs,
    available_bytes,
    page_aligned,
    page_lock,
    page_rounded,
    page_unlock,
)
from alpacache.torchrun import this_process
from cache_store import CorruptSampleError, Prefetcher
from cache_store.prefetcher import PrefetchedSample

_REMEMBERED = 2**18
"""Samples of which the target and the lengths stay in memory after their first use, half a kilobyte each."""
_SPARE_BYTES = 2**31
"""RAM that samples kept in memory leave to the rest of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples whose prefixes lie in rows of the ring's `data`."""

    positions: tuple[int, ...]
    """Places in the global order; they seed the noise."""
    sample_ids: tuple[str, ...]
    action: Tensor
    """`[B, 64, 2]` float32 on the CPU: the normalised target."""
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each prefix."""
    starts: tuple[int, ...]
    """Position of each sample's first action token."""
    turns: tuple[Turn, ...]
    """Stratum of each sample's driven path."""
    ready: torch.cuda.Event | None
    """The rows hold the prefixes from here on; None on the CPU, where they do already."""


class BatchRing:
    """Iterate inside `with`; call `done(batch)` as soon as the work on a batch is enqueued, before the next but one.

    The first sample in order that cannot be read raises its error (`CorruptSampleError`) in place of its batch.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        space: UnicycleActionSpace,
        places: Iterator[Sequence[tuple[int, int]]],
        *,
        batch_size: int,
        device: torch.device,
        threads: int | None = None,
        buffers: int | None = None,
        data: Tensor | None = None,
        check_on_device: bool = False,
    ) -> None:
        """`places` yields batches of (position, sample index), each of `batch_size` or fewer.

        `threads` read: by default 4 to 14, two usable cores fewer than there are. `buffers` is how many samples may
        be between disk and device; the default is two batches. `data`: an earlier ring's, whose addresses a captured
        graph has. `check_on_device`: where there is a GPU and it can be done, stored bytes are checked in the rows, and
        damage is told by `damage` instead of an error. Raises `UsageError` where samples are to stay in memory and
        there is not enough of it.
        """
        self.layout, self.longest = dataset.layout, dataset.longest
        largest = self.layout.row_bytes(self.longest)
        shape = (2 * batch_size, largest)
        self.data = torch.empty(shape, dtype=torch.uint8, device=device) if data is None else data
        """`[2 * batch_size, row_bytes]`: batch s lies in the first half of the rows if s is even."""
        checks = check_on_device and has_kernels(device)
        self.damage = torch.zeros(2 * batch_size, dtype=torch.int32, device=device) if checks else None
        """`[2 * batch_size]`: not zero from when damaged bytes have come into a row; None if the threads check."""
        self._scratch: Tensor | None = None
        self.waited_s = 0.0
        """Seconds that the host waited for samples while the device, too, had nothing left to do."""
        self._dataset, self._batch_size, self._device = dataset, batch_size, device
        self._threads = threads or min(14, max(4, len(os.sched_getaffinity(0)) - 2))
        self._buffers = buffers or samples_ahead(batch_size)
        self._remembered = len(dataset) if dataset.in_memory else min(len(dataset), _REMEMBERED)
        self._actions = torch.empty(self._remembered, space.waypoints, 2)
        self._turns = np.zeros(self._remembered, np.uint8)
        self._counts = np.zeros((self._remembered, 2), np.int64)
        self._kept: dict[int, Tensor] = {}
        self._slabs = _slabs(dataset) if dataset.in_memory else None
        self._source = RingSource(dataset, self._slabs, unchecked=("kv",) if checks else ())
        self._solve = solver(dataset, space)
        self._indices = [0] * 2 * batch_size
        # On a CPU the loop's results would depend on what the reading threads do to PyTorch's number of threads.
        self._solves_ahead = device.type == "cuda"
        self._wanted = self._in_order(places)
        self._prefetcher: Prefetcher[Wanted] | None = None
        self._closing = ExitStack()
        self._half = 0
        self._is_out = [False, False]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._last_done: torch.cuda.Event | None = None
        self._free = [self._event()] * 2  # after whatever the memory of `data` was used for before
        self._copying: deque[tuple[PrefetchedSample[Wanted], torch.cuda.Event]] = deque()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            if self._solves_ahead:  # by threads that set PyTorch's number of threads for all
                opened.enter_context(keeping_threads())
            ring = self._host_ring(opened)
            if self._stream is not None:
                opened.callback(self._stream.synchronize)
            prefetcher = Prefetcher(self._source, self._wanted, ring, threads=self._threads)
            self._prefetcher = opened.enter_context(prefetcher)
            self._closing = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the threads, let the copies end, give the memory back."""
        self._prefetcher = None
        self._closing.close()

    def __iter__(self) -> Iterator[Batch]:
        if self._prefetcher is None:
            raise ValueError("the ring is closed or was not entered; iterate inside its `with`.")
        samples = iter(self._prefetcher)
        while (batch := self._next(samples)) is not None:
            yield batch

    def done(self, batch: Batch) -> None:
        """All work that reads this batch's rows is enqueued on the current stream; then they may be overwritten."""
        half = batch.rows[0] // self._batch_size
        self._free[half] = self._last_done = self._event()
        self._is_out[half] = False
        self._take_back()

    def hand_back(self) -> None:
        """Before the host waits for the device: give buffers back as their copies end, all but the last one's.

        Else reading would stop when the free ones are full, until the wait is over. The last is left, so that the next
        copies are enqueued before it has ended.
        """
        self._wait_for_copies(1)

    def damage_error(self) -> CorruptSampleError | DataError:
        """What is to be raised when `damage` was seen to be set; reads the sample again to say what is wrong."""
        rows = [] if self.damage is None else self.damage.nonzero().flatten().tolist()
        if rows:
            index = self._indices[rows[0]]
            reader, sample_id = self._dataset.locate(index)
            try:
                reader.read(sample_id, ["kv"])
            except CorruptSampleError as error:
                return error
            return DataError(
                f"sample {sample_id!r} reached the GPU damaged, and {reader.path} holds it undamaged: memory of the "
                "host or the GPU, or the way between them, is at fault. Nothing was changed by it; run again (a "
                "training with --resume), and test the memory if it happens again."
            )
        return DataError("a sample of another process is damaged; the message of that process names it.")

    def _next(self, samples: Iterator[PrefetchedSample[Wanted]]) -> Batch | None:
        half = self._half
        if self._is_out[half]:
            raise ValueError("the next batch takes the rows of the last but one; call `done` with that one first.")
        if (free := self._free[half]) is not None and self._stream is not None:
            self._stream.wait_event(free)
        taken: list[Wanted] = []
        lengths: list[int] = []
        starts: list[int] = []
        chunks: dict[int, NDArray[np.int64]] = {}
        ready = None
        while not taken or not taken[-1].ends_batch:
            sample = self._take(samples)
            if sample is None:
                return None
            kv, tokens, start = self._content(sample)
            row = half * self._batch_size + len(taken)
            self._indices[row] = sample.sample_id.index
            if CHUNKS in sample.arrays:
                chunks[row] = sample.arrays[CHUNKS]
            ready = self._copy(sample, kv, row)
            taken.append(sample.sample_id)
            lengths.append(tokens)
            starts.append(start)
        if chunks:
            ready = self._check(chunks)
        action, turns = self._targets(taken)
        self._half, self._is_out[half] = 1 - half, True
        return Batch(
            positions=tuple(wanted.position for wanted in taken),
            sample_ids=tuple(self._dataset.sample_id(wanted.index) for wanted in taken),
            action=action,
            rows=tuple(half * self._batch_size + place for place in range(len(taken))),
            lengths=tuple(lengths),
            starts=tuple(starts),
            turns=turns,
            ready=ready,
        )

    def _take(self, samples: Iterator[PrefetchedSample[Wanted]]) -> PrefetchedSample[Wanted] | None:
        """The next sample in order, once it is in RAM."""
        self._wait_for_copies(self._buffers - 1)
        self._take_back()
        started = time.monotonic()
        sample = next(samples, None)
        if self._last_done is None or self._last_done.query():  # type: ignore[no-untyped-call]
            self.waited_s += time.monotonic() - started
        return sample

    def _content(self, sample: PrefetchedSample[Wanted]) -> tuple[Tensor, int, int]:
        """A sample's bytes, its tokens and the position that follows them: as just read, or as remembered."""
        index, arrays = sample.sample_id.index, sample.arrays
        if not sample.sample_id.is_new:
            tokens, start = self._counts[index].tolist()
            return self._kept[index] if index in self._kept else _flat(arrays["kv"]), tokens, start
        tokens, start = int(arrays["prefix_len"]), int(arrays["start_position"])
        kv = _flat(arrays["kv"])
        if index < self._remembered:
            self._counts[index] = tokens, start
        if self._slabs is not None:
            self._kept[index] = kv
        return kv, tokens, start

    def _targets(self, taken: Sequence[Wanted]) -> tuple[Tensor, tuple[Turn, ...]]:
        """Of each sample the action and the turn stratum: of those that are new solved, of the others remembered."""
        action = torch.empty(len(taken), *self._actions.shape[1:])
        turns = [0] * len(taken)
        if any(wanted.is_new for wanted in taken):
            places, solved, found = taken[0].targets.result()
            action[places] = solved
            for place, turn in zip(places, found, strict=True):
                turns[place] = TURNS.index(turn)
        for place, wanted in enumerate(taken):
            if wanted.is_new and wanted.index < self._remembered:
                self._actions[wanted.index], self._turns[wanted.index] = action[place], turns[place]
            elif not wanted.is_new:
                action[place], turns[place] = self._actions[wanted.index], int(self._turns[wanted.index])
        return action, tuple(TURNS[turn] for turn in turns)

    def _copy(self, sample: PrefetchedSample[Wanted], kv: Tensor, row: int) -> torch.cuda.Event | None:
        """Fill a row; the sample's buffer goes back when that is done, which is at once on the CPU."""
        target = self.data[row, : len(kv)]
        if self._stream is None:
            target.copy_(kv)
            sample.release()
            return None
        if self._slabs is not None:
            self._slabs.lock_new()
        with torch.cuda.stream(self._stream):
            target.copy_(kv, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(self._stream)
        self._copying.append((sample, copied))
        return copied

    def _check(self, chunks: dict[int, NDArray[np.int64]]) -> torch.cuda.Event | None:
        """Compare the copied rows with the checksums of their chunks, behind the copies."""
        from alpacache.gpu import checksum

        assert self.damage is not None
        rows = np.repeat(list(chunks), [len(found) for found in chunks.values()])
        starts, sizes, crc32cs = np.concatenate(list(chunks.values())).T
        with torch.cuda.stream(self._stream):
            table = checksum.ChunkTable.build(rows, starts, sizes, crc32cs, device=self._device)
        if self._scratch is None or len(self._scratch) < table.scratch_words:
            # Of the current stream's memory: the copies' own would take whole pages for it.
            self._scratch = self.damage.new_empty(table.scratch_words)
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            checksum.check_rows(self.data, table, self.damage, self._scratch)
            return self._event()

    def _take_back(self) -> None:
        """Release the buffers whose copies have ended, without waiting for any."""
        while self._copying and self._copying[0][1].query():  # type: ignore[no-untyped-call]
            self._copying.popleft()[0].release()

    def _wait_for_copies(self, left: int) -> None:
        """Release buffers as their copies end, until no more than so many are under way."""
        while len(self._copying) > left:
            sample, copied = self._copying.popleft()
            copied.synchronize()
            sample.release()

    def _event(self) -> torch.cuda.Event | None:
        """After all that was enqueued on the current stream."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _host_ring(self, opened: ExitStack) -> list[Bytes]:
        """Where samples are read to; samples that stay in memory have their own places, and here only their turn."""
        if self._slabs is not None:
            opened.callback(self._slabs.unlock)
            return [np.empty(0, np.uint8)] * self._buffers
        size = page_rounded(self.data.shape[1])
        memory = page_aligned(self._buffers * size)
        if self._stream is not None:
            page_lock(memory)
            opened.callback(page_unlock, memory)
        return [memory[start : start + size] for start in range(0, memory.size, size)]

    def _in_order(self, places: Iterator[Sequence[tuple[int, int]]]) -> Iterator[Wanted]:
        """What the prefetcher is to read. Samples come back in this order, so what came once is known later."""
        seen = np.zeros(self._remembered, bool)
        for batch in places:
            if not 0 < len(batch) <= self._batch_size:
                raise ValueError(f"a batch has 1 to {self._batch_size} samples, got {len(batch)}.")
            is_new = []
            for _, index in batch:
                is_new.append(index >= self._remembered or not seen[index])
                if index < self._remembered:
                    seen[index] = True
            targets = BatchTargets(sum(is_new), self._solve, ahead=self._solves_ahead)
            for place, (position, index) in enumerate(batch):
                yield Wanted(
                    position=position,
                    index=index,
                    is_new=is_new[place],
                    ends_batch=place == len(batch) - 1,
                    place=place,
                    targets=targets,
                )


def samples_ahead(batch_size: int) -> int:
    """How many samples may be between disk and device unless told otherwise."""
    return max(4, 2 * batch_size)


def _slabs(dataset: CachedDataset) -> Slabs:
    """Room for all samples. Raises `UsageError` where there is not enough.

    Every process here will have kept them all after some epochs, and all ask before any has begun.
    """
    needed, available = sum(map(page_rounded, dataset.kv_bytes.tolist())), available_bytes()
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


def _flat(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))
