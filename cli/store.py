"""`alpacache info`, `verify`, `clean` and `copy`: what a store holds, whether it is sound, and the same elsewhere."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from annotated_types import Ge, Le

from alpacache.config import Config, number
from alpacache.driving.cameras import camera_words, marks_words, prompt_marks
from alpacache.layer_choice import layers_text

from . import options, output

Store = Annotated[str, typer.Argument(help="Directory of the store, or s3://BUCKET/PREFIX.", callback=options.place)]


def info(store: Store, json: options.Json = False) -> None:
    """Show what a store holds: samples, sizes by field, the model and settings it was made with."""
    from cache_store import CacheReader
    from cache_store import info as read

    about = read(store)
    if json:
        output.print_json(about)
        return
    model, each_bytes = about.identity.get("model", {}), about.size_bytes / max(1, about.samples)
    family = model.get("settings", {}).get("family")
    lines = {
        "samples": f"{about.samples} ({about.size_bytes / 1e9:.3f} GB, {each_bytes / 1e6:.2f} MB each)",
        "quarantined": str(about.quarantined),
        "model": f"{model.get('id')} (revision {model.get('revision') or 'of a local directory'})",
        "family": f"{family} ({model['family_by']})" if family and "family_by" in model else family,
        "prompt": _prompt_words(about.identity),
        "VLM weights": str(model.get("vlm_weights_sha256"))[:16],
        "cameras": f"{camera_words(about.identity)}; {about.identity.get('frames')} frames each",
        "codec": f"{about.identity.get('codec')} from {about.identity.get('dtype')}",
        "format": f"version {about.format_version}",
    }
    if isinstance(layers := about.identity.get("layers"), list):
        lines["layers"] = f"{layers_text(layers)} of the VLM's"
    if about.unreadable:
        lines["unreadable"] = f"{len(about.unreadable)} more samples, whose commit records cannot be read"
    lines |= {f"  {name}": f"{size / 1e6:.3f} MB" for name, size in about.size_by_field.items() if size}
    output.print_lines(f"store {store}", lines)
    output.print_table("unreadable", [[text] for text in about.unreadable])
    if about.quarantined:
        failed = CacheReader(store).quarantined.values()
        output.print_table("quarantined", [[item.sample_id, item.kind, item.reason] for item in failed])


def _prompt_words(identity: Mapping[str, Any]) -> str | None:
    """Marks in a store's prompts beside pictures and history, in words; None where its identity does not tell."""
    named, numbered = prompt_marks(identity)
    if numbered is None:
        return None
    route = identity["prompt"].get("route", {}).get("given")
    return ", ".join([marks_words(named, numbered), f"routes: {route}" if route else "no routes"])


def verify(
    store: Store,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare it with its checksum.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged samples aside, so that `extract` makes them again.")
    ] = False,
    restore: Annotated[bool, typer.Option("--restore", help="First put back what was set aside and is whole.")] = False,
    json: options.Json = False,
) -> None:
    """Check records, presence and sizes of every object; with --deep every byte. Exit code 1 if anything is damaged.

    Example: `alpacache verify cache/train --deep --repair`, then run `extract` again.

    What is not whole is read again, several times over some seconds, before it counts as damaged or is set aside.
    """
    from cache_store import verify as check

    report = check(store, deep=deep, repair=repair, restore=restore)
    lines = {
        "samples": f"{report.samples}, {report.size_bytes / 1e9:.3f} GB; {'every byte' if deep else 'sizes'} checked",
        "damaged": str(len(report.damaged)),
        "not readable": str(len(report.unreadable)) if report.unreadable else None,
        "passing faults": f"{report.passing} objects were whole when read again" if report.passing else None,
        "unfinished attempts": f"{len(report.orphans)}, and {report.stale_temporaries} temporary files",
        "set aside": str(report.set_aside) if report.set_aside else None,
        "put back": str(len(report.restored)) if restore else None,
        "quarantined": str(report.quarantined),
    }
    output.print_result(report, f"verify {store}", lines, as_json=json)
    if not json:
        for title, items in (("damage", report.damaged), ("not readable, which proves no damage", report.unreadable)):
            rows = [[item.sample_id, item.field, item.object, item.what] for item in items]
            output.print_table(title, rows, heads=["sample", "field", "object", "what"])
        if report.passing:
            output.note("some readings were wrong and later ones right: see to the line, the memory and the disk.")
        if report.repaired:
            output.note(
                f"set {len(report.repaired)} damaged records aside; run `alpacache extract` again to make their "
                "samples anew. --restore puts back what proves whole after all, `alpacache clean --set-aside` drops it."
            )
        if report.orphans or report.stale_temporaries:
            output.note("`alpacache clean` removes what killed writers left, once it is a day old.")
    if not report.ok:
        raise typer.Exit(output.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cleaning(Config):
    """Settings of `clean`, so that wrong numbers are refused in the words of all commands."""

    min_age: Annotated[float, Ge(0), Le(1e6)]
    """Hours."""


def clean(
    store: Store,
    min_age: Annotated[
        float,
        typer.Option(
            "--min-age",
            parser=options.or_text(number),
            metavar="HOURS",
            help="Leave what was written to since then.",
        ),
    ] = 24.0,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="Drop for good what `verify --repair` has set aside, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be removed.")] = False,
    json: options.Json = False,
) -> None:
    """Remove what killed writers have left in a store: attempts that no record names, and temporary files.

    Example: `alpacache clean cache/train --dry-run`

    Committed samples are never touched. The age must be above what any attempt or copy that still runs can take.
    """
    from cache_store import collect_garbage

    min_age = _Cleaning(min_age=min_age).min_age
    report = collect_garbage(store, min_age_s=min_age * 3600, dry_run=dry_run, drop_set_aside=set_aside)
    removed = f"{len(report.attempts)} attempts and {report.temporaries} temporary files"
    lines = {
        "would remove" if dry_run else "removed": f"{removed}, {report.size_bytes / 1e9:.3f} GB",
        "kept": f"{report.kept_young} that are younger than {min_age:g} h",
        "unclear": f"{report.kept_unclear} kept: their records cannot be read" if report.kept_unclear else None,
        "set aside": f"{report.set_aside} {'dropped' if set_aside else 'kept'}" if report.set_aside else None,
    }
    output.print_result(report, f"clean {store}", lines, as_json=json)


def copy(
    source: Store,
    target: Annotated[
        str, typer.Argument(help="Where the copy goes: a directory or s3://BUCKET/PREFIX.", callback=options.place)
    ],
    json: options.Json = False,
) -> None:
    """Copy a store between directories and object storage, every byte checked. Run again to go on where it stopped.

    Example: `alpacache copy cache/train s3://my-bucket/cache/train`

    Exit code 1 if samples are damaged or cannot be read; they are left out and named.
    """
    from alpacache.durable import check_store_place
    from alpacache.progress import Progress
    from cache_store import copy as run

    check_store_place(target, what="the copy")

    started = time.monotonic()
    with output.show_progress("copy") as on_progress:

        def on_sample(done: int, samples: int, size_bytes: int) -> None:
            seconds = max(1e-9, time.monotonic() - started)
            notes = {"GB": f"{size_bytes / 1e9:.2f}", "MB/s": f"{size_bytes / 1e6 / seconds:.3g}"}
            on_progress(Progress(done=done, total=samples, unit="samples", rate=done / seconds, notes=notes))

        report = run(source, target, on_sample=on_sample)
    lines = {
        "target": target,
        "copied": f"{report.copied} of {report.samples} samples, {report.already_there} were there already",
        "size": f"{report.size_bytes / 1e9:.3f} GB in {time.monotonic() - started:.1f} s",
        "damaged": [str(len(report.damaged)), *report.damaged],
        "not readable": [str(len(report.unreadable)), *report.unreadable] if report.unreadable else None,
    }
    output.print_result(report, f"copy {source}", lines, as_json=json)
    if not report.ok:
        raise typer.Exit(output.FAILED)
