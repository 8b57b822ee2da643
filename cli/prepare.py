"""`alpacache prepare`: writes samples as a self-contained dataset."""

import itertools
import time
from typing import TYPE_CHECKING

import typer

from alpacache.sources.config import PrepareConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.sources.prepared_rows import PictureFit


@from_config(
    PrepareConfig,
    panels={
        "Samples": "split split_by clips samples cameras frames t0 route_file seed quota route",
        "Pictures": "size model",
    },
)
def prepare(config: PrepareConfig, json: bool) -> None:
    """Choose samples and write them, one self-contained row each, for `extract` on another machine.

    Example: `alpacache prepare folder:my_drives --out samples/train --split train --t0 every:2.0`
    """
    from alpacache.driving.sample import SampleRef
    from alpacache.driving.splits import parse_split
    from alpacache.errors import InterruptedRunError
    from alpacache.interrupt import InterruptGuard
    from alpacache.progress import Progress
    from alpacache.sources.prepared_writer import prepare as write
    from alpacache.sources.registry import open_source
    from alpacache.sources.routes import Routes, open_route_file
    from alpacache.sources.selection import note_on_split, parse_quota, select

    wanted = None if config.quota is None else parse_quota(config.quota)
    fit = _picture_fit(config.model) if config.size == "processor" else None
    source = open_source(config.source, cameras=config.cameras)
    chosen = {"split": config.split, "t0": config.t0, "samples": config.samples, "seed": config.seed}
    by = parse_split(config.split_by)
    further = {"split_by": None if by is None else config.split_by, "clips": list(config.clips)}
    file = open_route_file(config.route_file, source)
    routes = Routes(config.route, source, file=file, t0=config.t0)
    routed_us = None if file is None else file.times_us
    narrowed = {"split_by": by, "clips": config.clips, "quota": wanted, "routed_us": routed_us}
    refs, unusable = select(source, **narrowed, **chosen)  # type: ignore[arg-type]
    lone = note_on_split(source, split_by=by, clips=config.clips)
    if config.split != "all" and lone is not None:
        output.note(lone)
    with output.show_progress("prepare") as on_progress, InterruptGuard() as guard:
        started, counter = time.monotonic(), itertools.count(1)

        def on_sample(ref: SampleRef) -> None:
            done = next(counter)
            rate = done / max(1e-9, time.monotonic() - started)
            on_progress(Progress(done=done, total=len(refs), unit="samples", rate=rate, notes={}))
            if guard.requested:
                raise InterruptedRunError("stopped on request; run the same command again to go on.")

        written = write(
            source,
            refs,
            config.out,
            cameras=config.cameras,
            frames=config.frames,
            fit=fit,
            unusable=unusable,
            settings={**chosen, "quota": config.quota} | {key: value for key, value in further.items() if value},
            spec=config.source,
            routes=None if config.route == "none" else routes,
            on_sample=on_sample,
        )
    if written.existed:
        output.note(f"{config.out} was prepared from the same samples with the same settings; nothing was written.")
    counts, rejected = written.provenance["strata"], {name: message for name, _, message in written.rejected}
    for turn, count in (wanted or {}).items():
        if counts[turn] < count:
            output.note(f"{counts[turn]} of {count} {turn} samples: the source has no more that can be used.")
    record = {"out": config.out, "samples": written.samples, "rejected": rejected, "provenance": written.provenance}
    lines = {
        "dataset": config.out,
        "samples": str(written.samples),
        "strata": ", ".join(f"{name} {count}" for name, count in counts.items() if count),
        "left out": output.reason_lines(written.rejected),
    }
    output.print_result(record, "prepare", lines, as_json=json)
    if written.rejected:
        raise typer.Exit(output.QUARANTINED)


def _picture_fit(model: str | None) -> "PictureFit":
    """Pixel limits of the model's image processor, or of the released one."""
    from alpacache.alpamayo.families import RELEASED
    from alpacache.sources.prepared_rows import PictureFit

    if model is None:
        return PictureFit(**RELEASED.pixels)
    from alpacache.alpamayo import Checkpoint
    from alpacache.alpamayo.inputs import InputBuilder

    processor = InputBuilder(Checkpoint(model)).processor
    return PictureFit(**{name: processor[name] for name in RELEASED.pixels})
