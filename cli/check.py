"""`alpacache check`: faults of recordings, found before a GPU is rented for them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alpacache import strict_json
from alpacache.sources.config import CheckConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.checks.source import SourceReport

FAILED, QUARANTINED = 1, 3
SHEET, REPORT = "contact_sheet.png", "check.json"
_TITLE = "frames at t0, and the path driven until t0 + 6.4 s; dots are seconds, arrows the heading at the end"
_SHOWN = 12
"""Most refusals and clips named in the table; JSON has all."""


@from_config(CheckConfig)
def check(config: CheckConfig, json: bool) -> None:
    """Look for wrong axes, units, clocks, jumps, gaps and mirrored pictures, and for what `extract` would refuse.

    Exit code 1: the source as a whole is wrong; 3: some samples would be quarantined; 0: neither, with or without
    warnings.

    Example: `alpacache check folder:my_drives --out check`
    """
    from alpacache.checks.contact_sheet import contact_sheet_png
    from alpacache.checks.source import check_source
    from alpacache.sources.registry import open_source

    source = open_source(config.source, cameras=config.cameras)
    directory = None if config.out is None else _make_directory(config.out)
    with output.show_progress("check") as on_progress:
        report = check_source(
            source,
            split=config.split,
            t0=config.t0,
            samples=config.samples,
            cameras=config.cameras,
            frames=config.frames,
            on_progress=on_progress,
        )
    record = _record(report)
    if directory is not None:
        (directory / REPORT).write_text(strict_json.dumps(record, indent=1) + "\n")
        if report.shown:
            (directory / SHEET).write_bytes(contact_sheet_png(report.shown, title=f"{report.source}: {_TITLE}"))
    if json:
        output.print_json(record)
    else:
        _print(report, config.out)
    if not report.ok:
        raise typer.Exit(FAILED)
    if report.refused:
        raise typer.Exit(QUARANTINED)


def _record(report: "SourceReport") -> dict[str, Any]:
    from alpacache.checks.source import MEANINGS

    return {
        "ok": report.ok,
        "source": report.source,
        "samples": report.samples,
        "refused": len(report.refused),
        "clip_counts": report.clip_counts,
        "checks": report.checks,
        "meanings": MEANINGS,
        "strata": report.strata,
        "speeds_mps": report.speeds_mps,
        "clips": report.clips,
        "seconds": report.seconds,
    }


def _make_directory(out: str) -> Path:
    """Make the output directory before anything is read. Raises `UsageError` where it cannot be made."""
    from alpacache.errors import UsageError

    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made ({error}); choose another directory.") from error
    return Path(out)


def _print(report: "SourceReport", out: str | None) -> None:
    from alpacache.checks.source import MEANINGS

    output.print_table("check", [[check.status, check.name, check.found] for check in report.checks])
    steps = [
        [check.name, f"Expected: {MEANINGS[check.name]}. {check.remedy}"] for check in report.checks if check.remedy
    ]
    if steps:
        output.print_table("next", steps)
    clips = [
        [clip.clip_id, check.status, check.name, check.found]
        for clip in report.clips
        for check in clip.checks
        if check.status != "ok"
    ]
    if clips:
        output.print_table("clips", clips[:_SHOWN] + _more(clips))
    rows = [["samples", f"{report.samples} of {len(report.clips)} clips"]]
    rows.append(["clips", ", ".join(f"{count} {status}" for status, count in report.clip_counts.items() if count)])
    rows.append(["strata", ", ".join(f"{name} {count}" for name, count in report.strata.items() if count)])
    rows.append(["speeds", ", ".join(f"{name} {value:.1f} m/s" for name, value in report.speeds_mps.items())])
    rows.append(["refused", str(len(report.refused))])
    refused = [["", f"{refusal.kind}: {refusal.message}"] for refusal in report.refused]
    rows += refused[:_SHOWN] + _more(refused)
    if out is not None:
        rows.append(["written", f"{out}: {REPORT}" + (f", {SHEET}" if report.shown else "")])
    output.print_table("samples", rows)


def _more(rows: list[list[str]]) -> list[list[str]]:
    return [["", f"and {len(rows) - _SHOWN} more; --json has all"]] if len(rows) > _SHOWN else []
