"""Routes: how many moments have one, and whether drives go the way that their texts say.

A command may be for later than the 6.4 s that a sample shows ("turn left in 300 m"), so that one moment that goes the
other way proves nothing. Most of many moments do: left and right are swapped, or the texts are another clip's.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.driving.route import COMMANDS, Command, command_of
from alpacache.driving.strata import CORRIDOR_M, Side, Strata

NAME = "routes"
CLEAR_HEADING_RAD = np.deg2rad(10.0)
"""Heading change from which on a path clearly turns."""
MIN_CLEAR, FAIL_SHARE = 10, 0.8
"""Moments that clearly turn, and share of them that turn the other way, from which on it is no accident."""
WARN_SHARE = 0.1
_NAMED = 3
"""Clips that are named."""


@dataclass(slots=True, kw_only=True)
class ClipRoutes:
    """Findings on one clip's routes."""

    commands: list[Command | None] = field(default_factory=list)
    """Command of each usable moment; None without a text."""
    obeyed: int = 0
    """Moments that command left or right and clearly turn that way."""
    contradicted: list[str] = field(default_factory=list)
    """Ids of those that clearly turn the other way."""
    rows: int = 0
    """Times at which a text stands, whatever moments were selected."""
    outside: int = 0
    """Number of those that no moment of the clip can come to."""

    def add(self, sample_id: str, route: str | None, strata: Strata) -> None:
        """Take note of one usable moment."""
        command = None if route is None else command_of(route)
        self.commands.append(command)
        if command in ("left", "right") and (side := clear_side(strata)) != "straight":
            if side == command:
                self.obeyed += 1
            else:
                self.contradicted.append(sample_id)

    def add_rows(self, rows_us: NDArray[np.int64], span_us: tuple[int, int], *, holds: bool) -> None:
        """Take note of the times (us) that have a text, and of the clip's first and last.

        `holds`: a text holds until the next one, so that the last one before the clip is of use.
        """
        first, last = span_us
        early = int((rows_us < first).sum())
        self.rows = len(rows_us)
        self.outside = int((rows_us > last).sum()) + (max(0, early - 1) if holds else early)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesReport:
    """Findings on the routes of all clips."""

    moments: int
    """Number of usable samples."""
    routed: int
    """Number of those that have a text."""
    commands: dict[Command, int]
    """Number of texts of each command."""
    clear: int
    """Samples that command left or right and clearly turn, either way."""
    contradicted: tuple[str, ...]
    """Ids of those that turn the other way."""
    rows: int
    outside: int
    """Rows of texts outside of their clip's time."""
    outside_clips: tuple[str, ...]


def clear_side(strata: Strata) -> Side:
    """Side that a driven path clearly turns to, by heading change, by lateral offset or by both; else `straight`."""
    signs = {
        np.sign(value)
        for value, least in (
            (strata.heading_change_rad, CLEAR_HEADING_RAD),
            (strata.lateral_offset_m, CORRIDOR_M),
        )
        if abs(value) > least
    }
    return "straight" if len(signs) != 1 else "left" if signs.pop() > 0 else "right"


def merge_routes(clips: dict[str, ClipRoutes]) -> RoutesReport:
    """Sum over all clips."""
    commands = [command for clip in clips.values() for command in clip.commands]
    counts = Counter(command for command in commands if command is not None)
    contradicted = tuple(sample_id for clip in clips.values() for sample_id in clip.contradicted)
    return RoutesReport(
        moments=len(commands),
        routed=counts.total(),
        commands={command: counts[command] for command in COMMANDS},
        clear=sum(clip.obeyed for clip in clips.values()) + len(contradicted),
        contradicted=contradicted,
        rows=sum(clip.rows for clip in clips.values()),
        outside=sum(clip.outside for clip in clips.values()),
        outside_clips=tuple(clip_id for clip_id, clip in clips.items() if clip.outside),
    )


def judge_routes(report: RoutesReport | None) -> Check:
    """Judge the texts of a source; `report` is None where they were not asked for."""
    if report is None:
        return not_judged(NAME, "routes were not asked for (--route source)")
    finding, remedies = routes_text(report), []
    if not report.routed:
        why = "Look at the times of the texts" if report.rows else "The source has no texts at these moments"
        return verdict(NAME, finding, warn=f"{why}, or leave --route out.")
    wrong = len(report.contradicted)
    if wrong >= FAIL_SHARE * report.clear and report.clear >= MIN_CLEAR:
        return verdict(NAME, finding, fail="Swap left and right in the texts, or give each clip its own.")
    if wrong > WARN_SHARE * report.clear:
        remedies.append("Look at these clips: texts of another moment or clip, or for a turn beyond 6.4 s.")
    if report.outside:
        remedies.append("Texts need times on their clip's own clock, in microseconds.")
    return verdict(NAME, finding, warn=" ".join(remedies))


def routes_text(report: RoutesReport) -> str:
    """One line: how many moments have a route, by command, what contradicts, what lies outside."""
    parts = [f"{report.routed} of {report.moments} moments have one"] if report.routed else ["none"]
    parts += [
        f"{count} {'without a command' if command == 'none' else command}"
        for command, count in report.commands.items()
        if count
    ]
    if report.contradicted:
        share = len(report.contradicted) / report.clear
        clips = list(dict.fromkeys(sample_id.rpartition("@")[0] for sample_id in report.contradicted))
        parts.append(
            f"{len(report.contradicted)} of {report.clear} that clearly turn ({share:.0%}) turn the other way, such as "
            f"in {_some(clips)}"
        )
    if report.outside:
        parts.append(
            f"{report.outside} of {report.rows} rows lie outside of their clip's time, such as in "
            f"{_some(report.outside_clips)}"
        )
    return "; ".join(parts)


def _some(clips: Sequence[str]) -> str:
    return ", ".join(clips[:_NAMED]) + (f" and {len(clips) - _NAMED} more" if len(clips) > _NAMED else "")
