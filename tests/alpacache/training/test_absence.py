"""A store that is away is waited for, not for ever, and not beyond a request to stop."""

from types import SimpleNamespace

import pytest

from alpacache.training import absence
from alpacache.training.absence import Absence
from cache_store import UnreachableStoreError

ERROR = UnreachableStoreError("/data/store cannot be reached: Stale file handle. That says nothing; see to it.")


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were slept, on a clock of which nothing else takes any."""
    seconds = []
    clock = SimpleNamespace(monotonic=lambda: sum(seconds), sleep=seconds.append)
    monkeypatch.setattr(absence, "time", clock)
    return seconds


def test_the_longest_absence_of_a_step_ends_the_wait(slept, caplog):
    wait, guard = Absence(), SimpleNamespace(requested=False)
    for step in (3, 7):
        begun = sum(slept)
        while sum(slept) - begun < 600:
            wait.wait(step, ERROR, guard)
        assert sum(slept) - begun < 606
        with pytest.raises(UnreachableStoreError) as error:
            wait.wait(step, ERROR, guard)
        assert error.value is ERROR
    said = "/data/store cannot be reached: Stale file handle; training waits for it up to 10 minutes at step"
    assert [record.message for record in caplog.records] == [f"{said} 3.", f"{said} 7."]


def test_a_request_to_stop_ends_the_wait(slept):
    guard = SimpleNamespace(requested=False)
    absence.time.sleep = lambda seconds: setattr(guard, "requested", True)
    with pytest.raises(UnreachableStoreError):
        Absence().wait(1, ERROR, guard)
