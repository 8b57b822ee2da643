"""`alpacache check` and `alpacache doctor`: faults of recordings and of the machine, found before a GPU is rented."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alpacache import strict_json
from alpacache.sources.config import CheckConfig

from . import output
from .options import Json, from_config, place

if TYPE_CHECKING:
    from alpacache.checks.check import Check
    from alpacache.checks.source import SourceReport

SHEET, LAGS, REPORT = "contact_sheet.png", "lag_curve.png", "check.json"
_FILES = (SHEET, LAGS, REPORT)
_TITLE = "frames at t0, and the path driven until t0 + 6.4 s; dots are seconds, arrows the heading at the end"


@from_config(CheckConfig)
def check(config: CheckConfig, json: bool) -> None:
    """Look for wrong axes, units, clocks, jumps, gaps and mirrored pictures, and for what `extract` would refuse.

    Exit code 1: the source as a whole is wrong; 3: some samples would be quarantined; 0: neither, with or without
    warnings.

    Example: `alpacache check folder:my_drives --out check`
    """
    from alpacache.checks.source import MEANINGS, check_source
    from alpacache.driving.splits import parse_split
    from alpacache.durable import check_results_out
    from alpacache.sources.registry import open_source
    from alpacache.sources.routes import Routes, open_route_file
    from alpacache.sources.selection import note_on_split

    source = open_source(config.source, cameras=config.cameras)
    file = open_route_file(config.route_file, source)
    routes = None
    if config.route == "source" or file is not None:
        routes = Routes("source", source, file=file, t0=config.t0)
    if config.out is not None:  # before anything is read
        keys = {"ok", "source", "checks", "clips"}
        check_results_out(Path(config.out), what="check", names=_FILES, main=REPORT, keys=keys)
    split_by = parse_split(config.split_by)
    lone = note_on_split(source, split_by=split_by, clips=config.clips)
    if lone is not None:
        output.note(lone)
    with output.show_progress("check") as on_progress:
        report = check_source(
            source,
            split=config.split,
            split_by=split_by,
            clips=config.clips,
            t0=config.t0,
            samples=config.samples,
            cameras=config.cameras,
            frames=config.frames,
            routes=routes,
            routed_us=None if file is None else file.times_us,
            on_progress=on_progress,
        )
    names = ("ok", "source", "samples", "clip_counts", "checks", "strata", "speeds_mps", "clips", "seconds")
    record = {name: getattr(report, name) for name in names}
    record |= {
        "lag_curve": report.lag_curve,
        "routes": report.routes,
        "refused": len(report.refused),
        "meanings": MEANINGS,
    }
    if config.out is not None:
        _write(report, record, Path(config.out))
    if json:
        output.print_json(record)
    else:
        _print(report, config.out)
    if not report.ok:
        raise typer.Exit(output.FAILED)
    if report.refused:
        raise typer.Exit(output.QUARANTINED)


def _write(report: "SourceReport", record: Mapping[str, Any], out: Path) -> None:
    """Write the record and the pictures, which appear together."""
    from alpacache.checks.contact_sheet import contact_sheet_png
    from alpacache.checks.lag_picture import lag_curve_png
    from alpacache.durable import appearing

    with appearing(out, replaces=(SHEET, LAGS), last=(REPORT,), names=_FILES) as directory:
        (directory / REPORT).write_text(strict_json.dumps(record, indent=1) + "\n")
        if report.shown:
            (directory / SHEET).write_bytes(contact_sheet_png(report.shown, title=f"{report.source}: {_TITLE}"))
        if report.lag_curve is not None:
            title = f"{report.source}: how the picture moves sideways against how the vehicle turns"
            (directory / LAGS).write_bytes(lag_curve_png(report.lag_curve, title=title))


def doctor(
    store: Annotated[
        str | None, typer.Option(help="Where the store is or will be. [default: the working directory]", callback=place)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or directory whose configs should be readable.", callback=place)
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Card of plan's table, such as 4070, to judge in place of this machine's.")
    ] = None,
    json: Json = False,
) -> None:
    """Check Python, packages, GPU, memory, disk and hub access in seconds. Exit code 1 if anything failed.

    Example: `alpacache doctor --store cache/train --model nvidia/Alpamayo-R1-10B`

    `--gpu 4070` tells before a card is bought or rented.
    """
    from alpacache.checks.check import worst
    from alpacache.checks.machine import diagnose

    checks = diagnose(store=store, model=model, gpu=gpu)
    is_ok = worst(checks) != "fail"
    if json:
        output.print_json({"ok": is_ok, "checks": checks})
    else:
        _print_checks("doctor", checks)
        output.print_table("next", [[check.name, check.remedy] for check in checks if check.remedy])
    if not is_ok:
        raise typer.Exit(output.FAILED)


def _print(report: "SourceReport", out: str | None) -> None:
    from alpacache.checks.routes import routes_text
    from alpacache.checks.source import MEANINGS

    _print_checks("check", report.checks)
    steps = [check for check in report.checks if check.remedy]
    output.print_table("next", [[check.name, f"Expected: {MEANINGS[check.name]}. {check.remedy}"] for check in steps])
    clips = [
        [clip.clip_id, check.status, check.name, check.found]
        for clip in report.clips
        for check in clip.checks
        if check.status != "ok"
    ]
    output.print_table("clips", clips[: output.SHOWN] + [["", more] for more in output.more_lines(clips)])
    routes = [] if report.routes is None else [routes_text(report.routes)]
    refused = [f"{refusal.kind}: {refusal.message}" for refusal in report.refused]
    lines: dict[str, str | list[str]] = {
        "samples": f"{report.samples} of {len(report.clips)} clips",
        "clips": ", ".join(f"{count} {status}" for status, count in report.clip_counts.items() if count),
        "strata": ", ".join(f"{name} {count}" for name, count in report.strata.items() if count),
        "speeds": ", ".join(f"{name} {value:.1f} m/s" for name, value in report.speeds_mps.items()),
        "routes": routes,
        "refused": [str(len(refused)), *refused[: output.SHOWN], *output.more_lines(refused)],
    }
    if out is not None:
        pictures = ((SHEET, report.shown), (LAGS, report.lag_curve))
        lines["written"] = f"{out}: {', '.join([REPORT, *(name for name, shown in pictures if shown)])}"
    output.print_lines("samples", lines)


def _print_checks(title: str, checks: "Sequence[Check]") -> None:
    output.print_table(title, [[check.status if check.is_judged else "-", check.name, check.found] for check in checks])
