"""`alpacache demo`: the whole story on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

from alpacache.demo.config import DemoConfig

from . import output
from .evaluate import print_summary
from .options import from_config


@from_config(DemoConfig)
def demo(config: DemoConfig, json: bool) -> None:
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

    report = run_demo(config.out, seed=config.seed, stage=stage)
    if json:
        output.print_json({"out": config.out, "train": report.run, "summary": report.evaluation.summary.to_json()})
        return
    print_summary(report.evaluation.summary)
    output.print_lines("", {"report": f"{report.evaluation.out}/report.html"})
