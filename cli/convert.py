"""`alpacache convert`: recordings of other formats as a folder of clips."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alpacache.converters.config import ConvertConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.checks.source import SourceReport
    from alpacache.converters.writer import ConvertReport

_COMMON = {
    "kind",
    "input",
    "out",
    "list",
    "check",
    "clip_seconds",
    "origin_offset",
    "mount",
    "crop",
    "pad",
    "undistort",
}
"""Settings that every kind has."""
_CHECKED_S = (1.0, 10.0)
"""Least and most seconds between the samples that are looked at: short clips have room for few."""


@from_config(
    ConvertConfig,
    panels={
        "Clips": "clip_seconds",
        "Where the pose stands": "origin_offset mount axes",
        "Topics": "list camera pose heading stamp map",
        "Pictures": "crop pad undistort",
        "Films and steering": "film_start wheelbase_m full_lock_deg",
    },
)
def convert(config: ConvertConfig, json: bool) -> None:
    """Write a log as a folder of clips, say what was dropped and why, and check the result.

    The same command goes on where a killed one was. Pictures are copied as they are, films packet by packet.

    Exit code 1: the result fails `check`; 3: drives or samples had to be left out; 0: neither.

    Example: `alpacache convert mcap my_drive --out drives --camera front_wide=/camera/front/compressed`
    """
    from alpacache.converters.registry import kind_named, list_input

    if config.list:
        listing = list_input(kind_named(config.kind), Path(config.input))
        if json:
            rows = [dict(zip(listing.heads, row, strict=True)) for row in listing.rows]
            output.print_json(
                {"input": config.input, "topics": rows, "command": listing.command, "notes": listing.notes}
            )
            return
        output.print_table(config.input, listing.rows, heads=listing.heads)
        output.print_lines("", {"command": listing.command, "notes": list(listing.notes)})
        return
    report = _write(config)
    checked = _check(report) if config.check else None
    left_out = any(drop.what in ("drives", "clips", "cameras") for drop in report.dropped)
    is_ok = checked is None or _passes(report, checked)
    if json:
        output.print_json(_record(config, report, checked, is_ok=is_ok))
    else:
        _print(report, checked)
    if not is_ok:
        raise typer.Exit(output.FAILED)
    if left_out or (checked is not None and checked.refused):
        raise typer.Exit(output.QUARANTINED)


def _write(config: ConvertConfig) -> "ConvertReport":
    from dataclasses import fields

    from alpacache.converters.reframe import Reframe
    from alpacache.converters.registry import check_apart, kind_named, open_drives
    from alpacache.converters.writer import convert as write
    from alpacache.errors import InterruptedRunError
    from alpacache.interrupt import InterruptGuard

    assert config.out is not None
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    standard = {field.name: field.default for field in fields(config)} | {"camera": (), "map": ()}
    options = {name: value for name, value in values.items() if name not in _COMMON and value != standard[name]}
    out, place = Path(config.out), Path(config.input)
    check_apart(place, out)
    drives = open_drives(kind_named(config.kind), place, options)
    reframe = Reframe(crop=config.crop, pad=config.pad, undistort=config.undistort)
    if reframe.changes:  # other pictures, another data set
        drives = reframe.drives(drives)
    with output.show_progress("convert") as on_progress, InterruptGuard() as guard:
        report = write(
            drives,
            out,
            name="+".join([place.resolve().stem or config.kind, *reframe.changes]),
            settings={name: value for name, value in values.items() if name not in ("out", "list", "check")},
            changes=reframe.changes,
            clip_seconds=config.clip_seconds,
            offset_m=config.origin_offset,
            mount_deg=config.mount,
            is_stopped=lambda: guard.requested,
            on_progress=on_progress,
        )
    if guard.requested and config.check:  # too late for the last clip
        raise InterruptedRunError("stopped on request: all clips are written; the same command checks them.")
    return report


def _check(report: "ConvertReport") -> "SourceReport":
    from statistics import median

    from alpacache.checks.source import check_source
    from alpacache.converters.clips import SHORTEST_US
    from alpacache.sources.registry import open_source
    from alpacache.sources.routes import Routes

    source = open_source(f"folder:{report.out}", cameras=report.cameras)
    room_s = median(clip["seconds"] for clip in report.clips) - SHORTEST_US / 1e6
    t0 = f"every:{min(max(room_s // 1, _CHECKED_S[0]), _CHECKED_S[1]):g}"
    routes = Routes("source", source, file=None, t0=t0) if any(clip["routes"] for clip in report.clips) else None
    with output.show_progress("check") as on_progress:
        return check_source(source, t0=t0, cameras=report.cameras, routes=routes, on_progress=on_progress)


def _passes(report: "ConvertReport", checked: "SourceReport") -> bool:
    """Tell whether nothing failed but what cannot be otherwise without pictures."""
    without = set() if any(clip["cameras"] for clip in report.clips) else {"samples", "frames"}
    return all(check.status != "fail" or check.name in without for check in checked.checks)


def _record(
    config: ConvertConfig, report: "ConvertReport", checked: "SourceReport | None", *, is_ok: bool
) -> dict[str, Any]:
    record: dict[str, Any] = {"ok": is_ok, "kind": config.kind, "out": report.out, "source": f"folder:{report.out}"}
    record |= {"clips": report.clips, "kept": report.kept, "dropped": report.dropped, "check": None}
    if checked is not None:
        names = ("ok", "samples", "checks", "strata", "speeds_mps", "refused")
        record["check"] = {name: getattr(checked, name) for name in names}
    return record


def _print(report: "ConvertReport", checked: "SourceReport | None") -> None:
    rows = [
        [clip["name"], f"{clip['seconds']:.1f}", str(clip["poses"]), str(clip["routes"]), _cameras(clip["cameras"])]
        for clip in report.clips
    ]
    heads = ["clip", "seconds", "poses", "routes", "frames"]
    output.print_table("convert", [*rows[: output.SHOWN], *([more] for more in output.more_lines(rows))], heads=heads)
    drops = [[str(drop.count), drop.what, drop.reason] for drop in report.dropped]
    output.print_table("dropped", drops, heads=["number", "of", "why"])
    if checked is not None:
        found = [
            [check.status if check.is_judged else "-", check.name, check.found]
            for check in checked.checks
            if check.status != "ok"
        ]
        output.print_table("check", found)
        refused = [(refusal.where, refusal.kind, refusal.message) for refusal in checked.refused]
        if refused:
            output.print_lines("", {"refused": output.reason_lines(refused)})
    seconds = sum(clip["seconds"] for clip in report.clips)
    whole = len({clip["drive"] for clip in report.clips}) == len(report.clips)
    how = "each drive whole (--clip-seconds cuts)" if whole else "drives cut"
    lines: dict[str, str | list[str] | None] = {
        "clips": f"{len(report.clips)} of {seconds:.1f} s together, {how}; {report.kept} of them from before",
        "mount": _mounts(report.clips),
        "known": _told(report.clips),
        "check": None if checked is None else f"{_verdict(report, checked)}, {checked.samples} samples",
        "written": report.out,
        "next": f"alpacache check folder:{report.out} --out check",
    }
    output.print_lines("", lines)


def _cameras(cameras: dict[str, Any]) -> str:
    return ", ".join(f"{name} {camera['frames']} {camera['written']}" for name, camera in cameras.items())


def _mounts(clips: Sequence[dict[str, Any]]) -> list[str]:
    """The mounts that were estimated, drive by drive."""
    found = {clip["drive"]: clip.get("pose", {}).get("mount", {}) for clip in clips}
    said = [
        f"{drive}: yaw {mount['degrees']['yaw']:+.2f}, pitch {mount['degrees']['pitch']:+.2f} degrees taken out, "
        f"estimated on {mount['found_on_s']:.0f} s of straights"
        for drive, mount in found.items()
        if mount.get("given") == "estimate"
    ]
    return said[: output.SHOWN] + output.more_lines(said)


def _told(clips: Sequence[dict[str, Any]]) -> list[str]:
    """Facts that each drive's report tells, such as how well its poses are known."""
    found = {clip["drive"]: clip.get("told", {}) for clip in clips}
    said = [f"{drive}: {key} {text}" for drive, facts in found.items() for key, text in facts.items()]
    return said[: output.SHOWN] + output.more_lines(said)


def _verdict(report: "ConvertReport", checked: "SourceReport") -> str:
    return "passed" if _passes(report, checked) else "failed"
