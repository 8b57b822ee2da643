"""Commands as a user types them."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from alpacache.interrupt import REQUESTS
from cli import main


@pytest.fixture(scope="session")
def run():
    """The command line with these arguments, in a process of its own: ends with this code, and never in a traceback."""

    def call(*arguments, code=0):
        done = subprocess.run([sys.executable, "-m", "cli.main", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def run_here(capsys, monkeypatch):
    """The same within this process, which takes a second where a process of its own takes five."""

    def call(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["alpacache", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in REQUESTS}
        found = 0
        try:
            main.main()
        except SystemExit as ended:
            found = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = capsys.readouterr()
        assert found == code, printed.err
        return SimpleNamespace(stdout=printed.out, stderr=printed.err)

    return call
