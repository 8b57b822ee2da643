"""What drills share: commands as a user types them, each in a process of its own, and kill -9."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_report import arguments, finish, hardware_name

CLI = [sys.executable, "-m", "cli.main"]


def call(*given: str, program: Sequence[str] = CLI) -> dict[str, Any]:
    """A command to its end: what it printed with `--json`, and its seconds as `wall_s`."""
    started = time.monotonic()
    done = subprocess.run([*program, *given, "--json"], stdout=subprocess.PIPE, text=True)
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


def run_drill(name: str, drill: Callable[..., dict[str, Any]], description: str | None) -> None:
    """The program of a drill: `drill(work, small=...)` gives the one row of its report."""
    parser = arguments(description)
    parser.add_argument("--work", type=Path, help="where everything is put; checkpoints and stores there are kept")
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("a full run needs a CUDA device; --quick runs a small model on the CPU.")
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    try:
        row = drill(work, small=options.quick)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware_name()
    finish(name, [row], options, hardware=hardware)
