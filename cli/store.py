"""`alpacache info` and `alpacache verify`: contents of a store, and whether they are sound."""

from typing import Annotated

import typer

from . import options, output

DAMAGED = 1
Store = Annotated[str, typer.Argument(help="Directory of the store, or s3://BUCKET/PREFIX.", callback=options.place)]


def info(store: Store, json: options.Json = False) -> None:
    """Show what a store holds: samples, sizes by field, the model and settings it was made with."""
    from cache_store import CacheReader
    from cache_store import info as read

    found = read(store)
    if json:
        output.print_json(found)
        return
    model, samples = found.identity.get("model", {}), max(1, found.samples)
    rows = [
        [
            "samples",
            f"{found.samples} ({found.size_bytes / 1e9:.3f} GB, {found.size_bytes / samples / 1e6:.2f} MB each)",
        ],
        ["quarantined", str(found.quarantined)],
        ["model", f"{model.get('id')} (revision {model.get('revision') or 'of a local directory'})"],
        ["VLM weights", str(model.get("vlm_weights_sha256"))[:16]],
        ["cameras", f"{', '.join(found.identity.get('cameras', []))}; {found.identity.get('frames')} frames each"],
        ["codec", f"{found.identity.get('codec')} from {found.identity.get('dtype')}"],
        ["format", f"version {found.format_version}"],
    ]
    rows += [[f"  {name}", f"{size / 1e6:.3f} MB"] for name, size in found.size_by_field.items() if size]
    output.print_table(f"store {store}", rows)
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
    if json:
        output.print_json(report)
    else:
        rows = [
            [
                "samples",
                f"{report.samples}, {report.size_bytes / 1e9:.3f} GB; {'every byte' if deep else 'sizes'} checked",
            ],
            ["damaged", str(len(report.damaged))],
            ["unfinished attempts", f"{len(report.orphans)} (never visible to readers)"],
            ["quarantined", str(report.quarantined)],
        ]
        output.print_table(f"verify {store}", rows)
        if report.damaged:
            damage = [[item.sample_id, item.field, item.object, item.what] for item in report.damaged]
            output.print_table("damage", damage, heads=["sample", "field", "object", "what"])
        if report.repaired:
            output.note(
                f"dropped {len(report.repaired)} damaged records; run `alpacache extract` again to make them anew."
            )
    if not report.ok:
        raise typer.Exit(DAMAGED)
