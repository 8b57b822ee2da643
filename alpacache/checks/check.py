"""The answer that `doctor` and `check` give to each of their questions. Needs nothing installed."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question about a machine, a clip or a source, and its answer."""

    name: str
    status: Status
    found: str
    """The evidence, in words."""
    remedy: str = ""
    """The next step, unless all is well."""


def ok(name: str, found: str) -> Check:
    """Nothing is wrong."""
    return Check(name=name, status="ok", found=found)


def warn(name: str, found: str, remedy: str) -> Check:
    """Something may be wrong, or will be slow."""
    return Check(name=name, status="warn", found=found, remedy=remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """Something is wrong."""
    return Check(name=name, status="fail", found=found, remedy=remedy)


def worst(checks: tuple[Check, ...]) -> Status:
    """The worst status among checks."""
    return max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")
