"""Signals that ask to stop: one request may come as several, and a second Ctrl-C is impatience."""

import signal

import pytest

from alpacache import interrupt
from alpacache.interrupt import InterruptGuard


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_request_may_come_as_several_signals(first):
    with InterruptGuard() as guard:
        assert not guard.requested
        signal.raise_signal(first)
        assert guard.requested
        signal.raise_signal(signal.SIGTERM)  # torchrun passes on what a scheduler has sent to all
        signal.raise_signal(signal.SIGINT)
    assert guard.requested


def test_another_interrupt_a_while_later_raises_and_a_termination_does_not(monkeypatch):
    monkeypatch.setattr(interrupt, "_SAME_REQUEST_S", 0.0)
    with InterruptGuard() as guard:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert guard.requested


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with InterruptGuard():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
