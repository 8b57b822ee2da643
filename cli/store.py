"""`alpacache info`, `verify` and `copy`: contents of a store, whether they are sound, and the same elsewhere."""

import time
from typing import Annotated

import typer

from . import options, output

Store = Annotated[str, typer.Argument(help="Directory of the store, or s3://BUCKET/PREFIX.", callback=options.place)]


def info(store: Store, json: options.Json = False) -> None:
    """Show what a store holds: samples, sizes by field, the model and settings it was made with."""
    from cache_store import CacheReader
    from cache_store import info as read

    found = read(store)
    if json:
        output.print_json(found)
        return
    model, each_bytes = found.identity.get("model", {}), found.size_bytes / max(1, found.samples)
    lines = {
        "samples": f"{found.samples} ({found.size_bytes / 1e9:.3f} GB, {each_bytes / 1e6:.2f} MB each)",
        "quarantined": str(found.quarantined),
        "model": f"{model.get('id')} (revision {model.get('revision') or 'of a local directory'})",
        "VLM weights": str(model.get("vlm_weights_sha256"))[:16],
        "cameras": f"{', '.join(found.identity.get('cameras', []))}; {found.identity.get('frames')} frames each",
        "codec": f"{found.identity.get('codec')} from {found.identity.get('dtype')}",
        "format": f"version {found.format_version}",
    }
    lines |= {f"  {name}": f"{size / 1e6:.3f} MB" for name, size in found.size_by_field.items() if size}
    output.print_lines(f"store {store}", lines)
    if found.quarantined:
        failed = CacheReader(store).quarantined.values()
        output.print_table("quarantined", [[item.sample_id, item.kind, item.reason] for item in failed])


def verify(
    store: Store,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare it with its checksum.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged samples, so that `extract` makes them again.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Check records, presence and sizes of every object; with --deep every byte. Exit code 1 if anything is damaged.

    Example: `alpacache verify cache/train --deep --repair`, then run `extract` again.
    """
    from cache_store import verify as check

    report = check(store, deep=deep, repair=repair)
    lines = {
        "samples": f"{report.samples}, {report.size_bytes / 1e9:.3f} GB; {'every byte' if deep else 'sizes'} checked",
        "damaged": str(len(report.damaged)),
        "unfinished attempts": f"{len(report.orphans)} (never visible to readers)",
        "quarantined": str(report.quarantined),
    }
    output.print_result(report, f"verify {store}", lines, as_json=json)
    if not json:
        damage = [[item.sample_id, item.field, item.object, item.what] for item in report.damaged]
        output.print_table("damage", damage, heads=["sample", "field", "object", "what"])
        if report.repaired:
            dropped = f"dropped {len(report.repaired)} damaged records"
            output.note(f"{dropped}; run `alpacache extract` again to make them anew.")
    if not report.ok:
        raise typer.Exit(output.FAILED)


def copy(
    source: Store,
    target: Annotated[
        str, typer.Argument(help="Where the copy goes: a directory or s3://BUCKET/PREFIX.", callback=options.place)
    ],
    json: options.Json = False,
) -> None:
    """Copy a store between directories and object storage, every byte checked. Run again to go on where it stopped.

    Example: `alpacache copy cache/train s3://my-bucket/cache/train`

    Exit code 1 if samples are damaged; they are left out and named.
    """
    from alpacache.progress import Progress
    from cache_store import copy as run

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
    }
    output.print_result(report, f"copy {source}", lines, as_json=json)
    if not report.ok:
        raise typer.Exit(output.FAILED)
