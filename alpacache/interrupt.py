"""Stopping on request: after SIGINT or SIGTERM a stage finishes the sample or step in hand, saves and leaves.

A scheduler, torchrun and the terminal may each send a signal for the same request. So only another Ctrl-C, a while
after the first, stops at once.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

_SAME_REQUEST_S = 1.0


class InterruptGuard:
    """While entered (in the main thread), signals set `requested` instead of raising; a later Ctrl-C raises."""

    def __init__(self) -> None:
        self.requested = False
        """Whether a signal has asked to stop."""
        self._requested_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at = True, now
        elif number == signal.SIGINT and now > self._requested_at + _SAME_REQUEST_S:
            raise KeyboardInterrupt
