"""`alpacache prepare`: samples into a self-contained dataset."""

import itertools
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, output

if TYPE_CHECKING:
    from alpacache.driving.strata import Turn
    from alpacache.sources.prepared_rows import PictureFit
    from alpacache.sources.prepared_writer import Prepared

QUARANTINED = 3


def prepare(
    source: options.Source,
    out: Annotated[str, typer.Option(help="Directory for the Hugging Face dataset; must not exist.")],
    split: options.Split = "all",
    samples: options.Samples = None,
    cameras: options.Cameras = None,
    frames: options.Frames = 4,
    t0: options.T0 = "5.1",
    seed: Annotated[
        int | None, typer.Option(help="Take clips in a random order that this settles. Default: the source's order.")
    ] = None,
    quota: Annotated[
        str | None,
        typer.Option(help="Samples of each turn in place of --samples: `straight=200,gentle=100,sharp=100`."),
    ] = None,
    size: Annotated[
        str, typer.Option(help="Pictures as recorded (`original`) or as the model resizes them (`processor`).")
    ] = "original",
    model: Annotated[
        str | None, typer.Option(help="Whose processor size. Default: that of the released R1 and 1.5.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Choose samples and write them, one self-contained row each, for `extract` on another machine.

    Example: `alpacache prepare folder:my_drives --out samples/train --split train --t0 every:2.0`
    """
    from alpacache.driving.sample import SampleRef
    from alpacache.errors import InterruptedRunError
    from alpacache.interrupt import InterruptGuard
    from alpacache.progress import Progress
    from alpacache.sources import open_source
    from alpacache.sources.prepared_writer import prepare as write
    from alpacache.sources.quota import parse_quota
    from alpacache.sources.selection import select

    names = options.camera_names(cameras)
    options.one_of("split", split, ("train", "val", "all"))
    options.one_of("frames", str(frames), ("1", "2", "3", "4"))
    wanted = None if quota is None else parse_quota(quota)
    fit = _picture_fit(size, model)
    opened = open_source(source, cameras=names)
    refs, unusable = select(opened, split=split, t0=t0, samples=samples, seed=seed, quota=wanted)  # type: ignore[arg-type]
    with output.show_progress("prepare") as on_progress, InterruptGuard() as guard:
        started, counter = time.monotonic(), itertools.count(1)

        def on_sample(ref: SampleRef) -> None:
            done = next(counter)
            rate = done / max(1e-9, time.monotonic() - started)
            on_progress(Progress(done=done, total=len(refs), unit="samples", rate=rate, notes={}))
            if guard.requested:
                raise InterruptedRunError("stopped on request; run the same command again to go on.")

        written = write(
            opened,
            refs,
            out,
            cameras=names,
            frames=frames,
            fit=fit,
            unusable=unusable,
            settings={"split": split, "t0": t0, "samples": samples, "seed": seed, "quota": quota},
            spec=source,
            on_sample=on_sample,
        )
    _report(out, written, wanted or {}, as_json=json)
    if written.rejected:
        raise typer.Exit(QUARANTINED)


def _picture_fit(size: str, model: str | None) -> "PictureFit | None":
    """The limits of a processor, the model's or the released ones."""
    from alpacache.errors import UsageError
    from alpacache.sources.prepared_rows import PictureFit

    if options.one_of("size", size, ("original", "processor")) == "original":
        if model is not None:
            raise UsageError(f"--model {model} is of use with --size processor only; leave one of them out.")
        return None
    from alpacache.alpamayo.families import RELEASED

    if model is None:
        return PictureFit(**RELEASED.pixels)
    from alpacache.alpamayo import Checkpoint
    from alpacache.alpamayo.inputs import InputBuilder

    processor = InputBuilder(Checkpoint(model)).identity()["processor"]
    return PictureFit(**{name: processor[name] for name in RELEASED.pixels})


def _report(out: str, written: "Prepared", wanted: "Mapping[Turn, int]", *, as_json: bool) -> None:
    """What was written; a quota that the source could not fill is said on stderr as well."""
    counts = {turn: written.provenance["strata"][turn] for turn in wanted}
    for turn, count in wanted.items():
        if counts[turn] < count:
            output.note(f"{counts[turn]} of {count} {turn} samples: the source has no more that can be used.")
    rejected = {name: message for name, _, message in written.rejected}
    if as_json:
        record = {"out": out, "samples": written.samples, "rejected": rejected, "provenance": written.provenance}
        output.print_json(record)
        return
    strata = ", ".join(f"{name} {count}" for name, count in written.provenance["strata"].items() if count)
    rows = [["dataset", out], ["samples", str(written.samples)], ["strata", strata], ["left out", str(len(rejected))]]
    output.print_table("prepare", rows + [["", f"{name}: {reason}"] for name, reason in rejected.items()])
