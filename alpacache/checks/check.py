"""The answer that `doctor` and `check` give to each of their questions. Needs nothing installed."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
_NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question about a machine, a clip or a source, and its answer."""

    name: str
    status: Status
    found: str
    """The evidence, in words."""
    remedy: str = ""
    """The next step, unless all is well."""

    @property
    def is_judged(self) -> bool:
        """True if the question could be answered; one that could not be is no fault, so `ok`."""
        return not self.found.startswith(_NOT_JUDGED)


def verdict(name: str, found: str, *, warn: str = "", fail: str = "") -> Check:
    """A check that failed if `fail` has a remedy, warns if `warn` has one, and is ok without."""
    return Check(name=name, status="fail" if fail else "warn" if warn else "ok", found=found, remedy=fail or warn)


def not_judged(name: str, why: str) -> Check:
    """A check that could not be made."""
    return Check(name=name, status="ok", found=f"{_NOT_JUDGED}: {why}")


def worst(checks: tuple[Check, ...]) -> Status:
    """The worst status among checks."""
    return max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")
