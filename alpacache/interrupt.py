"""Stopping on request: after a signal a stage finishes the sample or step in hand, saves and leaves.

A scheduler, torchrun and the terminal may each send a signal for the same request. So only another one, a while after
the first, stops at once.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask to stop: Ctrl-C, a scheduler's end, a terminal that has gone, SLURM's `--signal=USR1@SECONDS`."""
_SAME_REQUEST_S = 1.0


def heard_requests() -> list[signal.Signals]:
    """The signals that ask this process to stop: `nohup` has SIGHUP ignored, and so it stays."""
    return [number for number in REQUESTS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class InterruptGuard:
    """While entered (in the main thread), signals set `requested` instead of raising; a later one raises."""

    def __init__(self) -> None:
        self.requested = False
        """True once a signal has asked to stop."""
        self._requested_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in heard_requests():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at = True, now
        elif now > self._requested_at + _SAME_REQUEST_S:
            raise KeyboardInterrupt
