"""Ends what a run of the tests leaves behind, also when pytest itself is killed.

`tests/conftest.py` starts it with a mark that every process of the run has in its environment, and holds the other end
of its standard input: when that closes, pytest has ended, in whatever way. Linux only, as it reads `/proc`.
"""

import os
import signal
import sys
import time
from pathlib import Path

TRIES, PAUSE_S = 50, 0.1


def marked(mark: bytes) -> list[int]:
    """Processes that were started with this mark in their environment, this one apart."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            if mark in environment.split(b"\0"):
                pids.append(int(entry.name))
    return pids


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for _ in range(TRIES):  # a process may start another while it is being ended
        left = marked(sys.argv[1].encode())
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
