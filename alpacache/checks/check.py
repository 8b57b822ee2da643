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


def verdict(name: str, found: str, *, warn: str = "", fail: str = "") -> Check:
    """A check that failed if `fail` has a remedy, warns if `warn` has one, and is ok without."""
    return Check(name=name, status="fail" if fail else "warn" if warn else "ok", found=found, remedy=fail or warn)


def worst(checks: tuple[Check, ...]) -> Status:
    """The worst status among checks."""
    return max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")
