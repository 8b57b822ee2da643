import types

import huggingface_hub.errors
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from alpacache.errors import DataError
from alpacache.sources import retry
from alpacache.sources.retry import ATTEMPTS, LONGEST_WAIT_S, connection_errors, with_retry


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that were to be waited."""
    found = []
    monkeypatch.setattr(retry, "_sleep", found.append)
    return found


def http_error(status, kind="HfHubHTTPError"):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(huggingface_hub.errors, kind)(f"{status} error", response=response)


def unreachable(cause):
    try:
        raise LocalEntryNotFoundError("cannot find the file") from cause
    except LocalEntryNotFoundError as error:
        return error


def client_error():
    """A broken connection as the hub's HTTP client raises it."""
    base = next(base for base in HfHubHTTPError.__bases__ if not issubclass(base, OSError))
    return type("ReadError", (base,), {})("server disconnected")


class Hub:
    """Fails with these errors in turn, then answers."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "data"


@pytest.mark.parametrize(
    "error",
    [
        *(http_error(status) for status in (500, 502, 503, 504, 429, 408)),
        ConnectionResetError(104, "reset by peer"),
        BrokenPipeError(32, "broken pipe"),
        TimeoutError("timed out"),
        client_error(),
        OSError("Consistency check failed: file should be of size 9 but has size 3"),
        unreachable(None),
        unreachable(http_error(503)),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_what_may_pass_is_tried_again(error, waits):
    hub = Hub(error, error)
    assert with_retry(hub, what="a chunk") == "data"
    assert hub.calls == 3
    assert len(waits) == 2


@pytest.mark.parametrize(
    "error",
    [
        *(http_error(status) for status in (400, 401, 404)),
        http_error(403, "GatedRepoError"),
        http_error(404, "RepositoryNotFoundError"),
        OfflineModeIsEnabled("offline"),
        unreachable(OfflineModeIsEnabled("offline")),
        FileNotFoundError(2, "no such file"),
        FileNotFoundError("the repository has no such file"),
        OSError(28, "no space left on device"),
        DataError("given up already"),
        KeyError("not a matter of the hub"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_what_will_not_pass_is_raised_at_once(error, waits):
    hub = Hub(error, error)
    with pytest.raises(type(error)) as caught:
        with_retry(hub, what="a chunk")
    assert caught.value is error
    assert (hub.calls, waits) == (1, [])


def test_it_ends_with_what_failed_how_often_and_the_next_step(waits):
    hub = Hub(*[http_error(503)] * 99)
    with pytest.raises(
        DataError, match=r"^a chunk: failed 6 times within \d+ s, at last with HfHubHTTPError: 503"
    ) as end:
        with_retry(hub, what="a chunk")
    assert "run the same command again" in str(end.value)
    assert isinstance(end.value.__cause__, connection_errors())
    assert hub.calls == ATTEMPTS == 6


def test_no_key_of_an_address_is_told(waits, caplog):
    hub = Hub(*[ConnectionError("GET https://cdn/file?Signature=secret&Expires=9: reset by peer")] * 99)
    with pytest.raises(DataError) as end:
        with_retry(hub, what="a chunk")
    assert "https://cdn/file?*** reset by peer" in str(end.value)
    assert "secret" not in str(end.value) + caplog.text


def test_waits_double_up_to_a_bound_and_are_not_all_alike(waits, monkeypatch):
    monkeypatch.setattr(retry, "ATTEMPTS", 40)
    with pytest.raises(DataError):
        with_retry(Hub(*[TimeoutError()] * 40), what="a chunk")
    for number, wait_s in enumerate(waits):
        full = min(LONGEST_WAIT_S, 2.0**number)
        assert full / 2 <= wait_s <= full
    assert len(waits) == 39
    assert len({wait_s / LONGEST_WAIT_S for wait_s in waits[10:]}) > 10


def test_each_failure_is_logged(caplog):
    with_retry(Hub(TimeoutError("timed out")), what="a chunk")
    assert caplog.messages == ["a chunk: TimeoutError: timed out; attempt 2 of 6 follows."]
