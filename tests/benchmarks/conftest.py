"""What the tests of benchmarks share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quick(tmp_path):
    """Runs a benchmark's `--quick` as a program of its own; its rows."""

    def run(program, **settings):
        report = tmp_path / "report.json"
        command = [sys.executable, str(BENCHMARKS / program), "--quick", "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(report.read_text())["rows"]

    return run
