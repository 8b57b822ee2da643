"""Batches of cached samples on the device, in the global order: disk, page-locked RAM, rows of device memory.

Threads read ahead into a ring of page-locked buffers; a stream of its own copies from there into `PrefixRows`, of which
there are two batches: while one is computed on, the other is filled. Streams wait for each other by events, and the
host waits for neither, except for buffers, which come back when their copies have ended: this keeps a loop that only
enqueues from running more than a few steps ahead. A loop that waits for results calls `release_finished` first. Only
the loop's own thread calls CUDA, because a call from another would break a CUDA graph that is being captured. On the
CPU all is the same, without streams and events.

Where the device checks the rows (`alpacache.gpu.checksum` says what that gains), whoever computes on them looks at
their `damage` before anything is kept.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.ring_source import CHUNKS, TAIL_CHUNKS, RingSource, SampleRequest, StoredPrefix
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.strata import Turn
from alpacache.errors import DataError
from alpacache.gpu.device import has_kernels, restored_torch_threads
from alpacache.gpu.host_memory import Bytes, page_aligned, page_lock, page_rounded, page_unlock
from alpacache.prefix.layout import PrefixLayout, TailRoom
from cache_store import Prefetcher, SampleReadError, UnreadableSampleError
from cache_store.prefetcher import PrefetchedSample


class PrefixRows:
    """Device memory for the prefixes of a ring's batches, one row of bytes a sample, which may serve ring after ring.

    Two batches by default: one is filled while the other is computed on.
    """

    def __init__(
        self,
        layout: PrefixLayout,
        longest: int,
        *,
        batch_size: int,
        device: torch.device,
        batches: int = 2,
        check_on_device: bool = False,
        tail_room: TailRoom | None = None,
    ) -> None:
        """Make room for `batches` of up to `batch_size` samples of up to `longest` tokens.

        `check_on_device`: where there is a GPU with Triton, stored bytes are checked in the rows, and damage is told by
        `damage` instead of an error of the threads that read. `tail_room`: tails of rollouts may come with the samples;
        they have rows of their own beside encoded prefixes, and join plain ones, which then are no longer as they were
        stored and so cannot be checked here.
        """
        self.layout, self.longest, self.batch_size, self.batches = layout, longest, batch_size, batches
        self.tail_room = tail_room
        rows, (size, tail_size) = batches * batch_size, layout.row_sizes(longest, tail_room)
        self.data = torch.empty(rows, size, dtype=torch.uint8, device=device)
        """`[batches * batch_size, row_bytes]`: batch s uses slot s % batches, `batch_size` rows."""
        self.device = self.data.device
        self.tails = self.data.new_empty(rows, tail_size) if tail_size else None
        """`[batches * batch_size, tail_row_bytes]`: encoded tails of the samples in the rows of the same numbers."""
        self.read_bytes = layout.read_bytes(longest, tail_room)
        """Bytes of a host buffer for what is read of a sample."""
        joins = tail_room is not None and layout.codec is None
        self.checked = check_on_device and has_kernels(device) and not joins
        arriving = max(tail_room.stored, tail_room.tail) if tail_room is not None and joins else 0
        self.arriving = self.data.new_empty(layout.row_bytes(arriving) if arriving and device.type == "cuda" else 0)
        """Place on a GPU of bytes from a store that are about to join others in a row."""
        self.damage = torch.zeros(rows, dtype=torch.int32, device=device)
        """`[rows]`: not zero from when damaged bytes have come into a row; stays zero unless rows are `checked`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples whose prefixes lie in rows of device memory."""

    positions: tuple[int, ...]
    """Places in the global order; they seed the noise."""
    sample_ids: tuple[str, ...]
    action: Tensor
    """`[B, 64, 2]` float32 on the CPU: the normalised target."""
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each prefix that are attended to."""
    stored: tuple[int, ...]
    """Tokens of stem and direct tail, as the store has them."""
    stems: tuple[int, ...]
    """Number of those that are attended to: all of them, or the stem, which the tail of a rollout follows."""
    starts: tuple[int, ...]
    """Position of each sample's first action token."""
    turns: tuple[Turn, ...]
    """Turn stratum of each sample's driven path."""
    ready: torch.cuda.Event | None
    """Recorded when the rows hold the prefixes; None on the CPU, where they do already."""

    @property
    def longest(self) -> int:
        """Tokens that none of these prefixes exceeds, neither as stored nor as attended to."""
        return max(*self.lengths, *self.stored)


class BatchRing:
    """Iterate inside `with`; call `done(batch)` as soon as the work on a batch is enqueued.

    The next batch that takes the same rows is only there after that. The first sample in order that cannot be read
    raises its error (`SampleReadError`) in place of its batch.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        space: UnicycleActionSpace,
        batches: Iterator[Sequence[tuple[int, int]]],
        rows: PrefixRows,
        *,
        threads: int | None = None,
        buffers: int | None = None,
        in_memory: bool = False,
    ) -> None:
        """`batches` yields (position, sample index) of each batch, for as many samples as `rows` takes or fewer.

        `threads` read: by default 4 to 14, two usable cores fewer than there are. `buffers` is how many samples may
        be between disk and device; the default is two batches. `in_memory` keeps samples in RAM, page-locked and as
        they are stored. Raises `UsageError` where there is not enough of it.
        """
        self._rows, self._dataset, self._device = rows, dataset, rows.device
        # On a CPU the loop's results would depend on what the reading threads do to PyTorch's number of threads.
        self._solve_ahead = self._device.type == "cuda"
        self._source = RingSource(
            dataset, space, in_memory=in_memory, check_on_device=rows.checked, ahead=self._solve_ahead
        )
        self._requests = self._source.requests(batches, rows.batch_size)
        self._threads = threads or min(14, max(4, len(os.sched_getaffinity(0)) - 2))
        self._buffers = buffers or samples_ahead(rows.batch_size)
        self.waited_s = 0.0
        """Seconds that the host waited for samples while the device, too, had nothing left to do."""
        self._scratch: Tensor | None = None
        self._prefetcher: Prefetcher[SampleRequest] | None = None
        self._closing = ExitStack()
        cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        self._last_done: torch.cuda.Event | None = None
        self._part = 0
        """Part of the rows that the next batch takes."""
        self._in_use = [False] * rows.batches
        self._free = [self._event()] * rows.batches  # after whatever the rows were used for before
        self._requests_in: list[SampleRequest | None] = [None] * len(rows.data)
        """Request that fills each row."""
        self._copying: deque[tuple[PrefetchedSample[SampleRequest], torch.cuda.Event]] = deque()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            if self._solve_ahead:  # by threads that set PyTorch's number of threads for all
                opened.enter_context(restored_torch_threads())
            buffers = self._host_buffers(opened)
            if self._stream is not None:
                opened.callback(self._stream.synchronize)
            prefetcher = Prefetcher(self._source, self._requests, buffers, threads=self._threads)
            self._prefetcher = opened.enter_context(prefetcher)
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
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
        part = batch.rows[0] // self._rows.batch_size
        self._free[part] = self._last_done = self._event()
        self._in_use[part] = False
        self._release_ended()

    def release_finished(self, *, left: int = 1) -> None:
        """Before the host waits for the device: release finished copies' buffers, keeping the last `left`.

        Otherwise reading would stop for the length of the wait, once the free ones are full. One is left, so that the
        next copies are enqueued before it has ended.
        """
        while len(self._copying) > left:
            sample, copied = self._copying.popleft()
            copied.synchronize()
            sample.release()

    def damage_error(self) -> SampleReadError | DataError:
        """Return the error to raise for damage in `PrefixRows`; reads the sample again to say what is wrong."""
        rows = self._rows.damage.nonzero().flatten().tolist()
        if not rows:
            return DataError("a sample of another process is damaged; the message of that process names it.")
        request = self._requests_in[rows[0]]
        assert request is not None
        reader, sample_id = self._dataset.locate(request.index)
        tails = () if request.tail is None else self._dataset.tails_of(request.index)[request.tail :][:1]
        try:
            reader.read(sample_id, ["kv", *(f"{tail}kv" for tail in tails)])
        except SampleReadError as error:
            return error
        return UnreadableSampleError(
            f"sample {sample_id!r} reached the GPU damaged, and {reader.path} holds it undamaged: memory of the host "
            "or the GPU, or the way between them and the store, is at fault. Nothing was changed by it; run again (a "
            "training with --resume), and test the memory if it happens again.",
            sample_id,
        )

    def _next(self, samples: Iterator[PrefetchedSample[SampleRequest]]) -> Batch | None:
        part = self._part
        if self._in_use[part]:
            raise ValueError("the next batch takes rows that are in use; call `done` with the oldest batch first.")
        if (free := self._free[part]) is not None and self._stream is not None:
            self._stream.wait_event(free)
        row = first = part * self._rows.batch_size
        taken: list[tuple[SampleRequest, StoredPrefix]] = []
        chunks: dict[str, dict[int, NDArray[np.int64]]] = {CHUNKS: {}, TAIL_CHUNKS: {}}
        ready = None
        while not taken or not taken[-1][0].ends_batch:
            if (sample := self._take(samples)) is None:
                return None
            content = self._source.content(sample)
            self._requests_in[row] = sample.sample_id
            for key in chunks.keys() & sample.arrays.keys():
                chunks[key][row] = sample.arrays[key]
            ready = self._copy(sample, content, row)
            taken.append((sample.sample_id, content))
            row += 1
        if chunks[CHUNKS]:
            ready = self._check(self._rows.data, chunks[CHUNKS])
        if chunks[TAIL_CHUNKS]:
            assert self._rows.tails is not None
            ready = self._check(self._rows.tails, chunks[TAIL_CHUNKS])
        requests, contents = zip(*taken, strict=True)
        action, turns = self._source.targets(requests)
        self._part, self._in_use[part] = (part + 1) % self._rows.batches, True
        return Batch(
            positions=tuple(request.position for request in requests),
            sample_ids=tuple(self._dataset.sample_id(request.index) for request in requests),
            action=action,
            rows=tuple(range(first, row)),
            lengths=tuple(content.tokens for content in contents),
            stored=tuple(content.stored for content in contents),
            stems=tuple(content.stem for content in contents),
            starts=tuple(content.start for content in contents),
            turns=turns,
            ready=ready,
        )

    def _take(self, samples: Iterator[PrefetchedSample[SampleRequest]]) -> PrefetchedSample[SampleRequest] | None:
        """The next sample in order, once it is in RAM."""
        self.release_finished(left=self._buffers - 1)
        self._release_ended()
        started = time.monotonic()
        sample = next(samples, None)
        if self._last_done is None or self._last_done.query():  # type: ignore[no-untyped-call]
            self.waited_s += time.monotonic() - started
        return sample

    def _copy(
        self, sample: PrefetchedSample[SampleRequest], content: StoredPrefix, row: int
    ) -> torch.cuda.Event | None:
        """Fill a row; the sample's buffer is released when that is done, which is at once on the CPU."""
        if self._stream is None:
            _fill(self._rows, row, content)
            sample.release()
            return None
        if self._source.slabs is not None:
            self._source.slabs.lock_new()
        with torch.cuda.stream(self._stream):
            _fill(self._rows, row, content)
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(self._stream)
        self._copying.append((sample, copied))
        return copied

    def _check(self, data: Tensor, chunks: dict[int, NDArray[np.int64]]) -> torch.cuda.Event | None:
        """Compare the copied rows of `data` with the checksums of their chunks, behind the copies."""
        from alpacache.gpu import checksum

        of_rows = np.concatenate([np.insert(of_row, 0, row, axis=1) for row, of_row in chunks.items()])
        with torch.cuda.stream(self._stream):
            table = checksum.ChunkTable.build(of_rows, device=self._device)
        if self._scratch is None or len(self._scratch) < table.scratch_words:
            # From the current stream's memory: the copying stream's own would take whole pages for it.
            self._scratch = self._rows.damage.new_empty(table.scratch_words)
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            checksum.check_rows(data, table, self._rows.damage, self._scratch)
            return self._event()

    def _release_ended(self) -> None:
        """Release the buffers whose copies have ended, without waiting for any."""
        while self._copying and self._copying[0][1].query():  # type: ignore[no-untyped-call]
            self._copying.popleft()[0].release()

    def _event(self) -> torch.cuda.Event | None:
        """An event after all that was enqueued on the current stream."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _host_buffers(self, opened: ExitStack) -> list[Bytes]:
        """Host buffers to read samples into; those that stay in memory have places of their own."""
        if self._source.slabs is not None:
            opened.callback(self._source.slabs.unlock)
            return [np.empty(0, np.uint8)] * self._buffers
        size = page_rounded(self._rows.read_bytes)
        memory = page_aligned(self._buffers * size)
        if self._stream is not None:
            page_lock(memory)
            opened.callback(page_unlock, memory)
        return [memory[start : start + size] for start in range(0, memory.size, size)]


def _fill(rows: PrefixRows, row: int, content: StoredPrefix) -> None:
    """Bring a sample's bytes to its row: as they are, or stem and tail as one prefix where they are plain elements."""
    kv, tail_kv, layout = content.kv, content.tail_kv, rows.layout
    if tail_kv is None or rows.tails is not None:
        rows.data[row, : len(kv)].copy_(kv, non_blocking=True)
        if tail_kv is not None and rows.tails is not None:
            rows.tails[row, : len(tail_kv)].copy_(tail_kv, non_blocking=True)
        return
    joined = _elements(rows.data[row], layout, content.tokens)
    stem = content.stem
    for source, tokens, place in ((kv, content.stored, slice(stem)), (tail_kv, content.tail, slice(stem, None))):
        if rows.arriving.numel():  # a GPU takes from the host only what lies in one piece there and here
            source = rows.arriving[: len(source)].copy_(source, non_blocking=True)
        target = joined[:, :, :, place]
        target.copy_(_elements(source, layout, tokens)[:, :, :, : target.shape[3]])


def _elements(data: Tensor, layout: PrefixLayout, tokens: int) -> Tensor:
    """`[layer, 2, kv_head, token, channel]` of the plain elements at the beginning of flat bytes."""
    return data[: layout.size_bytes(tokens)].view(layout.dtype).view(layout.shape(tokens))


def samples_ahead(batch_size: int) -> int:
    """Number of samples that may be between disk and device unless told otherwise."""
    return max(4, 2 * batch_size)
