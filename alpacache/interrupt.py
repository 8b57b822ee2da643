"""Stopping on request: SIGINT and SIGTERM let the sample or step in hand finish, then the stage saves and leaves."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class InterruptGuard:
    """While it is entered (in the main thread), signals set `requested` instead of raising. A second one raises."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

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
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
