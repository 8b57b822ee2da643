"""`alpacache demo`: the whole story on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from . import options, output
from .evaluate import print_summary


def demo(
    out: Annotated[str, typer.Option(help="Directory for everything; must be new or empty.")] = "demo",
    seed: Annotated[int, typer.Option(help="Of training and evaluation.")] = 0,
    json: options.Json = False,
) -> None:
    """Offline, on a CPU, in minutes: a straight-biased tiny model, cached features, retraining, the bias gone.

    Example: `alpacache demo --out demo`
    """
    from alpacache.demo.story import run_demo
    from alpacache.progress import OnProgress

    @contextmanager
    def stage(title: str, command: str) -> Iterator[OnProgress]:
        output.note(command)
        with output.show_progress(title) as on_progress:
            yield on_progress

    report = run_demo(out, seed=seed, stage=stage)
    if json:
        output.print_json({"out": out, "train": report.run, "summary": report.evaluation.summary.to_json()})
        return
    print_summary(report.evaluation.summary)
    output.print_table("", [["report", f"{report.evaluation.out}/report.html"]])
