"""Progress reports of long runs to a listener of the caller's; only the command line draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One report of a long run."""

    done: int
    total: int
    unit: str
    """`samples`, `steps` or `files`."""
    rate: float
    """Units a second in this run."""
    notes: Mapping[str, str]
    """Further items for the progress line, such as loss, GiB, quarantined samples."""


def clock(seconds: float) -> str:
    """Seconds as `1:02:03`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


OnProgress = Callable[[Progress], None]
OnNote = Callable[[str], None]
"""Listener of sentences that a person should read before a long run has done its work."""


def ignore(progress: Progress) -> None:
    """The default listener: does nothing."""


def ignore_note(text: str) -> None:
    """The default listener of notes: does nothing."""
