"""The answer that `doctor` and `check` give to each of their questions. Needs nothing installed."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question to a machine, a clip or a source, and what was found."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    """The next step, unless all is well."""
