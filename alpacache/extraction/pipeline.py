"""The threads around the VLM in stage one: some read ahead of it, others write behind it, and every queue is bounded.

    readers  --ahead-->  groups of nearly equal length  -->  VLM, codec  -->  buffers in RAM  -->  writers

Nothing here knows what a sample is for, so that order, bounds and errors can be tested without a model.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
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
    items: Sequence[Item],
    make: Callable[[Item], Made],
    *,
    workers: int,
    ahead: int,
    begin: Callable[[], None] | None = None,
) -> Iterator[tuple[Item, Future[Made]]]:
    """Yields items in order, each with the future of `make(item)`; threads work on at most `ahead` of them.

    `begin` is called once in each thread.
    """
    with ThreadPoolExecutor(workers, "read", initializer=begin) as pool:
        rest = iter(items)
        begun = deque((item, pool.submit(make, item)) for item in islice(rest, ahead))
        try:
            while begun:
                item, future = begun.popleft()
                wait([future])
                yield item, future
                del future  # or its result would live for as long as the next one is waited for
                begun.extend((item, pool.submit(make, item)) for item in islice(rest, 1))
        finally:
            for _, waiting in begun:
                waiting.cancel()


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
