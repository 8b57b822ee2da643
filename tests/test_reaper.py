"""Killing pytest leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TEST = """
import subprocess, sys, time
from pathlib import Path

def test_that_starts_processes():
    grandchild = "import time; time.sleep(600)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); " + grandchild
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    time.sleep(1)
    Path(__file__).with_name("ready").touch()
    time.sleep(600)
"""


def descendants(root):
    """Processes that have this one among their ancestors, while it lives."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    inside = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in inside} - inside
        if not more:
            return inside - {root}
        inside |= more


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.system
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the reaper reads /proc")
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_killed_run_leaves_no_process(tmp_path, options):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "reaper.py").write_text(CONFTEST.with_name("reaper.py").read_text())
    (tmp_path / "test_it.py").write_text(TEST)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "ALPACACHE_TEST"))
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_it.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = descendants(run.pid)
        assert len(started) >= 3  # child, grandchild, reaper
        os.kill(run.pid, signal.SIGKILL)
    while any(map(is_alive, started)):
        assert time.monotonic() < deadline + 30, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started]
        time.sleep(0.1)
