"""The threads around the VLM in stage one: some read ahead of it, others write behind it, and every queue is bounded.

    readers  --ahead-->  groups of nearly equal length  -->  VLM, codec  -->  buffers in RAM  -->  writers

Nothing here knows what a sample is for, so that order, bounds and errors can be tested without a model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import torch

from alpacache.gpu.host_copies import HostCopies, HostCopy
from cache_store import CacheWriter

NEAR = 16
"""Lengths of samples that go through the VLM together differ by at most a sixteenth of the first one's."""
SPARE_COPIES = 2
"""Least number of buffers beyond one for each writer: one that is being filled and one that is ready."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def read_ahead(
    stretches: Sequence[Sequence[Item]],
    one_pass: Callable[[Sequence[Item]], AbstractContextManager[Callable[[Item], Made]]],
    *,
    workers: int,
    ahead: int,
    begin: Callable[[], None] | None = None,
) -> Iterator[tuple[Item, Future[Made]]]:
    """Yields the items of all stretches, each with the future of what a thread has made of it.

    One thread makes all items of a stretch in their order, by the function that `one_pass` gives it; the stretches go
    to whichever is free. Items come in order where each stretch is a single one, else as they are ready: order would
    hold up all threads for the slowest. At most `ahead` are being made or wait to be taken. `begin` is called once in
    each thread.
    """
    in_order = all(len(stretch) == 1 for stretch in stretches)
    waiting, lock, stopped = iter(enumerate(stretches)), threading.Lock(), threading.Event()
    room = threading.Semaphore(ahead)
    ready: SimpleQueue[tuple[int, Item, Future[Made]] | BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            if begin is not None:
                begin()
            while not stopped.is_set():
                room.acquire()  # first, so that no later stretch can take the room that this one needs
                with lock:
                    number, stretch = next(waiting, (-1, None))
                if stretch is None or stopped.is_set():
                    room.release()
                    break
                for item, future in _made(stretch, one_pass, room, stopped):
                    ready.put((number, item, future))
                    del future  # or its result would live until the next one is there
        except BaseException as error:
            ready.put(error)
        ready.put(None)

    threads = [threading.Thread(target=work, name=f"read_{number}") for number in range(workers)]
    try:
        for thread in threads:
            thread.start()
        left, due = workers, 0
        early: dict[int, tuple[Item, Future[Made]]] = {}
        while left or early:
            made = early.pop(due, None)
            if made is None:
                found = ready.get()
                if found is None:
                    left -= 1
                    continue
                if isinstance(found, BaseException):
                    raise found
                number, made = found[0], found[1:]
                del found
                if in_order and number != due:
                    early[number] = made
                    del made
                    continue
            yield made
            del made
            due += 1
            room.release()
    finally:
        stopped.set()
        room.release(workers)
        for thread in threads:
            thread.join()


def _made(
    stretch: Sequence[Item],
    one_pass: Callable[[Sequence[Item]], AbstractContextManager[Callable[[Item], Made]]],
    room: threading.Semaphore,
    stopped: threading.Event,
) -> Iterator[tuple[Item, Future[Made]]]:
    """Items of a stretch, with what was made of each or the error that this raised, once there is room for it.

    There is room for the first one.
    """
    with one_pass(stretch) as make:
        for number, item in enumerate(stretch):
            if number:
                room.acquire()
            if stopped.is_set():
                return
            future: Future[Made] = Future()
            try:
                future.set_result(make(item))
            except BaseException as error:
                future.set_exception(error)
            yield item, future
            del future


def groups(items: Iterable[Item], *, length: Callable[[Item], int], size: Callable[[], int]) -> Iterator[list[Item]]:
    """Groups of at most `size()` items of nearly equal length, out of a window of less than twice as many.

    The oldest item is always in the next group, so none is left behind; where all are alike the order stays.
    """
    window: deque[Item] = deque()
    rest = iter(items)
    while True:
        window.extend(islice(rest, max(0, 2 * size() - 1 - len(window))))
        if not window:
            return
        first = window.popleft()
        near = [item for item in window if abs(length(item) - length(first)) * NEAR <= length(first)]
        group = [first, *near[: size() - 1]]
        window = deque(item for item in window if all(item is not taken for taken in group))
        yield group


class Waits:
    """Time that the thread feeding the VLM has spent waiting, by what it waited for."""

    def __init__(self) -> None:
        self._seconds = {"read": 0.0, "write": 0.0}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Context whose duration counts as waiting for `what`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[what] += time.monotonic() - started

    def timed(self, what: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yields the same items and counts the time until each is there."""
        while True:
            with self.of(what):
                item = next(items, None)
            if item is None:
                return
            yield item

    def shares(self, seconds: float) -> dict[str, float]:
        """Share of the given seconds by what was waited for."""
        return {what: waited / max(seconds, 1e-9) for what, waited in self._seconds.items()}


class Writers:
    """Threads that commit samples; `put` waits while too many are on their way, so that memory stays flat."""

    def __init__(self, writer: CacheWriter, copies: HostCopies, *, threads: int) -> None:
        self._writer, self._copies = writer, copies
        self._pool = ThreadPoolExecutor(threads, "write")
        self._begun: list[Future[int]] = []

    def put(
        self,
        sample_id: str,
        values: Mapping[str, Any],
        *,
        made: torch.cuda.Event | None = None,
        copy: HostCopy | None = None,
    ) -> None:
        """Begin to copy a sample off the device (after `made`, if given), to be committed by one of the threads.

        `copy`: the one that its large values are already in.
        """
        copy = self._copies.begin(values, made=made) if copy is None else copy.keep(values)
        self._begun.append(self._pool.submit(self._commit, sample_id, copy))

    def collect(self, *, everything: bool = False) -> list[int]:
        """Bytes of each sample that was committed since the last call (0 if another writer was first).

        With `everything` waits for all. If a write failed, the others are let finish, then its error is raised.
        """
        if everything or any(future.done() and future.exception() for future in self._begun):
            wait(self._begun)
        done: list[Future[int]] = []
        left: list[Future[int]] = []
        for future in self._begun:  # each is asked once: it may end between two questions
            (done if future.done() else left).append(future)
        self._begun = left
        return [future.result() for future in done]

    def _commit(self, sample_id: str, copy: HostCopy) -> int:
        try:
            arrays = copy.arrays()
            won = self._writer.write(sample_id, arrays)
            return sum(getattr(value, "nbytes", 0) for value in arrays.values()) if won else 0
        finally:
            copy.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Commit what is on its way, whatever ended the run."""
        self._pool.shutdown()
