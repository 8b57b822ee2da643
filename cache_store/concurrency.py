"""Many small requests in parallel: object storage answers each slowly, but many at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map` in threads; at most twice as many results as threads wait for the caller.

    The first error, in the order of the items, is raised in its place, and nothing is started after it.
    """
    if threads < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, "store") as pool:
        yield from in_order_by(pool, function, items, 2 * threads)


def in_order_by(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Do the same in a caller's pool, where at most `ahead` results are computed or wait."""
    rest = iter(items)
    pending: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(rest, ahead))
    try:
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(rest, 1))
    finally:
        for waiting in pending:
            waiting.cancel()
