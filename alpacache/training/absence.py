"""A store that does not answer any more, and may within minutes: a share is mounted again, a server starts anew.

A run that ends for it at night stands still until the morning.
"""

import logging
import time

from alpacache.interrupt import InterruptGuard
from cache_store import UnreachableStoreError

_log = logging.getLogger(__name__)
_LONGEST_S = 600.0
"""Longest absence in one step that is waited for."""
_PAUSE_S = 5.0
"""Between one try and the next."""
_LOOK_S = 0.1
"""Between looks for a request to stop."""


class Absence:
    """How long a run has been waiting for a store at its present step."""

    def __init__(self) -> None:
        self._step, self._since_s = -1, 0.0

    def wait(self, step: int, error: UnreachableStoreError, guard: InterruptGuard) -> None:
        """Pause before the next try. Raises the error after the longest absence, and at a request to stop."""
        now = time.monotonic()
        if step != self._step:
            self._step, self._since_s = step, now
            if _LONGEST_S:
                reason = str(error).partition(". ")[0]
                _log.warning("%s; training waits for it up to %.0f minutes at step %d.", reason, _LONGEST_S / 60, step)
        if now - self._since_s >= _LONGEST_S:
            raise error
        while time.monotonic() < now + _PAUSE_S:
            if guard.requested:
                raise error
            time.sleep(_LOOK_S)
