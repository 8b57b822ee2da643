"""The scripts of the SLURM page: bash accepts them, and the array script does what the page says."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/how-to/slurm.md"
BLOCKS = [part.split("```")[0] for part in PAGE.read_text().split("```bash\n")[1:]]


@pytest.mark.parametrize("block", BLOCKS)
def test_bash_accepts_it(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def started(tmp_path):
    """Starts the array script with an `alpacache` and a `scontrol` that only note what they are told."""
    processes = []

    def start(worker):
        for name, body in (("alpacache", worker), ("scontrol", 'echo "$@" >> requeued')):
            file = tmp_path / name
            file.write_text(f"#!/bin/bash\n{body}\n")
            file.chmod(0o755)
        (tmp_path / "script.sh").write_text(BLOCKS[0])
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "77"}
        process = subprocess.Popen(
            ["bash", "script.sh"],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the worker too, which would hold the pipe
        process.communicate()


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (1, 1), (2, 2)])
def test_a_task_that_ends_by_itself(code, expected, started, tmp_path):
    process = started(f'echo "$@" > told; exit {code}')
    process.communicate(timeout=30)
    assert process.returncode == expected
    assert "--shard 3/8" in (tmp_path / "told").read_text()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("signals", [1, 3])
def test_a_task_that_runs_out_of_time_is_put_back(signals, started, tmp_path):
    """However often the script is told, it waits until the worker has committed what it has in hand."""
    process = started(
        "trap 'ending=1' TERM; touch ready; while [ -z \"$ending\" ]; do sleep 0.05; done\n"
        "sleep 0.5; touch committed; exit 130"
    )
    wait_for(tmp_path / "ready", process)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    assert (tmp_path / "committed").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_a_task_that_was_done_when_told_is_not_put_back(started, tmp_path):
    process = started("trap 'exit 0' TERM; touch ready; while true; do sleep 0.05; done")
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not (tmp_path / "requeued").exists()


def wait_for(file, process):
    """Wait until the worker has written the file and the script minds SIGTERM, whichever comes later."""
    deadline = time.monotonic() + 30
    while not (file.exists() and is_caught(signal.SIGTERM, process)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_caught(number, process):
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(caught, 16) >> (number - 1) & 1
