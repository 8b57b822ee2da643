"""`alpacache probe`: whether the frozen VLM knows about the curve."""

from typing import TYPE_CHECKING

from alpacache.evaluation.config import ProbeConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.evaluation.probe import ProbeReport
    from alpacache.metrics.bootstrap import Interval


@from_config(ProbeConfig)
def probe(config: ProbeConfig, json: bool) -> None:
    """Brain or hands: can the road ahead be read off the cached features, beyond what the ego history tells?

    Example: `alpacache probe --store cache/train --out probe/one`
    """
    with output.show_progress("probe") as on_progress:
        from alpacache.evaluation.probe import probe as run

        report = run(config, on_progress=on_progress)
    if json:
        output.print_json({"out": config.out, **report.to_json()})
        return
    print_report(report)
    output.print_left_out((sample.sample_id, sample.reason) for sample in report.left_out)
    if config.out is not None:
        output.print_lines("", {"numbers": f"{config.out}/probe.json", "picture": f"{config.out}/probe.png"})


def print_report(report: "ProbeReport") -> None:
    """Show R^2 on unseen clips, of the vectors that the verdicts rest on; then by layer; then the verdicts."""
    from alpacache.driving.strata import LATE_CURVE
    from alpacache.evaluation.probe import SHUFFLED, TOGETHER

    heads = ["target", "samples", "probe", "history", "features", "both", "shuffled", "gain"]
    rows = []
    for stratum, targets in report.scores.items():
        kind = "curve after t0" if stratum == LATE_CURVE else "all"
        for target, vectors in targets.items():
            for number, (name, cell) in enumerate(vectors[report.main].items()):
                first = [target, f"{report.strata[stratum][0]} {kind}"] if number == 0 else ["", ""]
                control = vectors[SHUFFLED][name].features
                values = (cell.history, cell.features, cell.both, control)
                rows.append([*first, name, *map(_short, values), _text(cell.gain)])
    output.print_table(f"R^2 on clips not seen, {report.samples} samples of {report.clips} clips", rows, heads=heads)
    if report.main == TOGETHER:
        stratum = report.verdicts[0].stratum
        targets = report.scores[stratum]
        by_layer = [
            [name, *(_text(vectors[name]["ridge"].features) for vectors in targets.values())] for name in report.vectors
        ]
        output.print_table("R^2 of single layers, ridge, features alone", by_layer, heads=["vectors", *targets])
    output.print_table("", [[report.conclusion], *([verdict.sentence] for verdict in report.verdicts[1:])])


def _short(value: "Interval | None") -> str:
    return "-" if value is None else f"{value.estimate:z.2f}"


def _text(value: "Interval | None") -> str:
    from alpacache.metrics.bootstrap import range_text

    return "-" if value is None else f"{value.estimate:z.2f} {range_text(value.low, value.high)}".rstrip()
