"""Signals that ask to stop: one request may come as several, and another later is impatience."""

import signal

import pytest

from alpacache import interrupt
from alpacache.interrupt import REQUESTS, InterruptGuard


@pytest.fixture(autouse=True)
def heard_hangup():
    """The suite may itself run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", REQUESTS)
def test_a_request_may_come_as_several_signals(first):
    with InterruptGuard() as guard:
        assert not guard.requested
        signal.raise_signal(first)
        assert guard.requested
        signal.raise_signal(signal.SIGTERM)  # torchrun passes on what a scheduler has sent to all
        signal.raise_signal(signal.SIGINT)
    assert guard.requested


@pytest.mark.parametrize("second", REQUESTS)
def test_another_one_a_while_later_raises(second, monkeypatch):
    monkeypatch.setattr(interrupt, "_SAME_REQUEST_S", 0.0)
    with InterruptGuard() as guard:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert guard.requested


def test_a_terminal_that_nohup_keeps_away_asks_for_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptGuard() as guard:
            signal.raise_signal(signal.SIGHUP)
            assert not guard.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in REQUESTS]
    with InterruptGuard():
        pass
    assert [signal.getsignal(number) for number in REQUESTS] == before
