"""Reading ahead: samples in the caller's order into a ring of the caller's buffers, several samples and chunks at once.

The buffers bound the memory and are the back-pressure: a sample is begun when a buffer is free, and a buffer is free
once the caller has released the sample in it (after its copy to the GPU has finished, say). Plain threads are enough,
because reading and checking release Python's interpreter lock.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

from numpy.typing import NDArray

from cache_store.sample_read import Arrays, SampleRead
from cache_store.storage.local_storage import ByteArray

Key = TypeVar("Key")
KeyIn = TypeVar("KeyIn", contravariant=True)


class SampleSource(Protocol[KeyIn]):
    """A `CacheReader`, or a caller's choice among several, with keys of its own; the prefetcher's threads call it."""

    def views(self, sample_id: KeyIn, buffer: ByteArray, fields: Sequence[str] | None = ...) -> Arrays: ...
    def plan(
        self, sample_id: KeyIn, fields: Sequence[str] | None = None, *, out: Arrays | None = None
    ) -> SampleRead: ...


class PrefetchedSample(Generic[Key]):
    """One sample in one of the caller's buffers, which the next sample overwrites after `release`."""

    def __init__(self, sample_id: Key, buffer: int, on_release: Callable[[int], None]) -> None:
        self.sample_id = sample_id
        self.arrays: dict[str, NDArray[Any]] = {}
        """Views of the buffer, by field; text has arrays of its own."""
        self._buffer = buffer
        self._on_release: Callable[[int], None] | None = on_release
        self._tasks = 1  # the plan, which adds its own
        self._error: BaseException | None = None

    def release(self) -> None:
        """Give the buffer back; the arrays must not be used after that. Further calls do nothing."""
        if self._on_release is not None:
            self._on_release(self._buffer)
        self._on_release = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Prefetcher(Generic[Key]):
    """Iterate inside `with`: `with Prefetcher(...) as samples: for sample in samples: with sample: use(sample.arrays)`.

    The first sample in order that cannot be read raises its error in its place, after all samples before it; nothing
    is begun after an error. Leaving the `with` waits for the reads in flight and ends all threads.
    """

    def __init__(
        self,
        reader: SampleSource[Key],
        sample_ids: Iterable[Key],
        buffers: Sequence[ByteArray],
        *,
        fields: Sequence[str] | None = None,
        threads: int = 4,
    ) -> None:
        """`buffers`: flat uint8 arrays, each of `reader.buffer_bytes(...)` of the largest sample or more."""
        if not buffers or threads < 1:
            raise ValueError(f"a prefetcher needs a buffer and a thread, got {len(buffers)} and {threads}.")
        self._reader = reader
        self._ids = iter(sample_ids)
        self._buffers = list(buffers)
        self._fields = fields
        # Two conditions on one lock wake only threads that have work, because the caller shares the interpreter.
        self._lock = threading.Lock()
        self._work_ready, self._sample_ready = threading.Condition(self._lock), threading.Condition(self._lock)
        self._free = deque(range(len(buffers)))
        self._order: deque[PrefetchedSample[Key]] = deque()
        self._tasks: deque[tuple[PrefetchedSample[Key], Callable[[], None]]] = deque()
        self._ended = self._closed = False  # ended: no sample is begun any more
        self._ids_error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, name=f"prefetch-{i}", daemon=True) for i in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._closed = True
            self._tasks.clear()
            self._wake_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def __iter__(self) -> Iterator[PrefetchedSample[Key]]:
        return iter(self._next, None)

    def _next(self) -> PrefetchedSample[Key] | None:
        with self._lock:
            while True:
                if self._closed or not self._threads[0].is_alive():
                    raise ValueError("the prefetcher is closed or was not entered; iterate inside its `with`.")
                if self._order and self._order[0]._tasks == 0:
                    sample = self._order.popleft()
                    if sample._error is not None:
                        raise sample._error
                    return sample
                if not self._order and self._ended:
                    if self._ids_error is not None:
                        raise self._ids_error
                    return None
                if not self._order and not self._free:
                    held = f"all {len(self._buffers)} buffers hold samples that were not released"
                    raise ValueError(f"{held}; release one before asking for the next, or give more buffers.")
                self._sample_ready.wait()

    def _release(self, buffer: int) -> None:
        with self._lock:
            self._free.append(buffer)
            self._work_ready.notify()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            sample, task = job
            error: BaseException | None = None
            try:
                task()
            except BaseException as caught:
                error = caught
            with self._lock:
                sample._tasks -= 1
                if error is not None:
                    self._ended = True
                    sample._error = sample._error or error
                    self._wake_all()
                if sample._error is not None:  # its other chunks are of no use any more
                    dropped = sum(1 for other, _ in self._tasks if other is sample)
                    self._tasks = deque(item for item in self._tasks if item[0] is not sample)
                    sample._tasks -= dropped
                if sample._tasks == 0:
                    self._sample_ready.notify()

    def _take(self) -> tuple[PrefetchedSample[Key], Callable[[], None]] | None:
        """Take the next chunk to read, or the plan of the next sample; waits while there is neither."""
        with self._lock:
            while not self._closed:
                if self._tasks:
                    return self._tasks.popleft()
                if self._free and not self._ended:
                    if (sample := self._begin()) is not None:
                        return sample, partial(self._plan, sample)
                    self._wake_all()
                self._work_ready.wait()
            return None

    def _wake_all(self) -> None:
        self._work_ready.notify_all()
        self._sample_ready.notify_all()

    def _begin(self) -> PrefetchedSample[Key] | None:
        try:
            sample_id = next(self._ids, None)
        except Exception as error:
            sample_id, self._ids_error = None, error
        if sample_id is None:
            self._ended = True
            return None
        sample = PrefetchedSample(sample_id, self._free.popleft(), self._release)
        self._order.append(sample)
        return sample

    def _plan(self, sample: PrefetchedSample[Key]) -> None:
        out = self._reader.views(sample.sample_id, self._buffers[sample._buffer], self._fields)
        read = self._reader.plan(sample.sample_id, self._fields, out=out)
        sample.arrays = read.arrays
        with self._lock:
            sample._tasks += len(read.tasks)
            self._tasks.extend((sample, task) for task in read.tasks)
            self._work_ready.notify(len(read.tasks))
