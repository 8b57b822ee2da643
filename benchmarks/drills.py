"""What drills share: commands as a user types them, each in a process of its own, and kill -9."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

CLI = [sys.executable, "-m", "cli.main"]


def call(*given: str) -> dict[str, Any]:
    """A command to its end: what it printed with `--json`, and its seconds as `wall_s`."""
    started = time.monotonic()
    done = subprocess.run([*CLI, *given, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(given)}: exit code {done.returncode}")
    wall_s = time.monotonic() - started
    print(f"{given[0]}: {wall_s:.1f} s", flush=True)
    return {**json.loads(done.stdout), "wall_s": wall_s}


def kill_at(number: int, progress: Callable[[], int], command: Sequence[str]) -> tuple[int, float]:
    """Start the command and kill -9 it once `progress` is there; how far it got, and the seconds."""
    started = time.monotonic()
    process = subprocess.Popen([*CLI, *command], stdout=subprocess.DEVNULL)
    while progress() < number:
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)}: ended with {process.returncode} before it got to {number}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed at {progress()} after {time.monotonic() - started:.1f} s", flush=True)
    return progress(), time.monotonic() - started
