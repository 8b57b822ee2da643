"""Stopping on request: after SIGINT or SIGTERM a stage finishes the sample or step in hand, saves and leaves.

A scheduler, torchrun and the terminal may each send a signal for the same request. So only another Ctrl-C, a while
after the first, stops at once.
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

_SAME_REQUEST_S = 1.0


class InterruptGuard:
    """While entered (in the main thread), signals set `requested` instead of raising; a later Ctrl-C raises."""

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return self._requested_at is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif number == signal.SIGINT and now > self._requested_at + _SAME_REQUEST_S:
            raise KeyboardInterrupt
