"""How far all workers of an extraction are together, without any of them telling the others."""

import time
from contextlib import suppress

from cache_store.writer import committed_keys

_INTERVAL_S, _SHARE = 10.0, 0.02
"""The store is counted this often, or less often where counting would take more of the time than this."""


class StoreCount:
    """How many of the wanted samples all workers together have committed; looked up now and then."""

    def __init__(self, store: str, wanted: frozenset[str]) -> None:
        self._store, self._wanted = store, wanted
        self._committed, self._due, self._rate = 0, 0.0, 0.0
        self._first: tuple[float, int] | None = None
        """When it was first counted, and what was there."""

    def now(self, *, at_once: bool) -> tuple[int, int, float]:
        """Committed, wanted, and all workers' samples a second; unless `at_once`, as of at most a while ago."""
        started = time.monotonic()
        if at_once or started >= self._due:
            with suppress(OSError):  # the next commit meets it too, and says what it means
                self._committed = len(self._wanted & committed_keys(self._store))
            ended = time.monotonic()
            self._due = ended + max(_INTERVAL_S, (ended - started) / _SHARE)
            self._first = self._first or (started, self._committed)
            seconds = started - self._first[0]
            self._rate = (self._committed - self._first[1]) / seconds if seconds else 0.0
        return self._committed, len(self._wanted), self._rate
