"""`alpacache copy`: copies a store to another place."""

import time
from typing import Annotated

import typer

from . import options, output

DAMAGED = 1


def copy(
    source: Annotated[
        str, typer.Argument(help="Directory of the store, or s3://BUCKET/PREFIX.", callback=options.place)
    ],
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
    if json:
        output.print_json(report)
    else:
        rows = [
            ["target", target],
            ["copied", f"{report.copied} of {report.samples} samples, {report.already_there} were there already"],
            ["size", f"{report.size_bytes / 1e9:.3f} GB in {time.monotonic() - started:.1f} s"],
            ["damaged", str(len(report.damaged))],
        ]
        output.print_table(f"copy {source}", rows)
        if report.damaged:
            output.print_table("damage", [[what] for what in report.damaged], heads=["what"])
    if not report.ok:
        raise typer.Exit(DAMAGED)
