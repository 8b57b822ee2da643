"""`alpacache prepare`: samples into a self-contained dataset."""

import itertools
import time
from typing import Annotated

import typer

from cli import options, output

QUARANTINED = 3


def prepare(
    source: options.Source,
    out: Annotated[str, typer.Option(help="Directory for the Hugging Face dataset; must not exist.")],
    split: options.Split = "all",
    samples: options.Samples = None,
    cameras: options.Cameras = None,
    frames: options.Frames = 4,
    t0: options.T0 = "5.1",
    json: options.Json = False,
) -> None:
    """Choose samples and write them, one self-contained row each, for `extract` on another machine.

    Example: `alpacache prepare folder:my_drives --out samples/train --split train --t0 every:2.0`
    """
    from alpacache.errors import InterruptedRunError
    from alpacache.interrupt import InterruptGuard
    from alpacache.progress import Progress
    from alpacache.sample import SampleRef
    from alpacache.selection import select
    from alpacache.sources import open_source
    from alpacache.sources.prepared import prepare as write

    names = options.camera_names(cameras)
    opened = open_source(source, cameras=names)
    options.one_of("split", split, ("train", "val", "all"))
    refs, unusable = select(opened, split=split, t0=t0, samples=samples)  # type: ignore[arg-type]
    with output.show_progress("prepare") as on_progress, InterruptGuard() as guard:
        started, counter = time.monotonic(), itertools.count(1)

        def on_sample(ref: SampleRef) -> None:
            done = next(counter)
            rate = done / max(1e-9, time.monotonic() - started)
            on_progress(Progress(done=done, total=len(refs), unit="samples", rate=rate, notes={}))
            if guard.requested:
                raise InterruptedRunError("stopped on request; run the same command again to go on.")

        written = write(opened, refs, out, cameras=names, frames=frames, on_sample=on_sample)
    rejected = {name: str(error) for name, error in unusable}
    rejected |= {name: message for name, _, message in written.rejected}
    if json:
        output.print_json({"out": out, "samples": written.samples, "rejected": rejected})
    else:
        rows = [["dataset", out], ["samples", str(written.samples)], ["left out", str(len(rejected))]]
        output.print_table("prepare", rows + [["", f"{name}: {reason}"] for name, reason in rejected.items()])
    if rejected:
        raise typer.Exit(QUARANTINED)
