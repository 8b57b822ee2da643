"""Commands as a user types them."""

import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def run():
    """The command line with these arguments, in a process of its own: ends with this code, and never in a traceback."""

    def call(*arguments, code=0):
        done = subprocess.run([sys.executable, "-m", "cli.main", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call
