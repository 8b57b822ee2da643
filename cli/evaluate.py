"""`alpacache eval`, whether the straight-line bias is gone, and `demo`, the whole story on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alpacache.demo.config import DemoConfig
from alpacache.evaluation.config import EvalConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.evaluation.summary import EvalSummary, StratumSummary
    from alpacache.metrics.bias import Slope

_WARNINGS = 3
_METRICS = {"min_ade": "minADE", "ade": "ADE", "min_fde": "minFDE", "corner_distance": "corners"}


@from_config(
    EvalConfig, panels={"Models": "checkpoint compare compare_store ema", "Machine": "batch_size capture device"}
)
def evaluate(config: EvalConfig, json: bool) -> None:
    """Judge the base model and trained ones on cached features: public metrics, straight-line bias, pictures.

    Example: `alpacache eval --store cache/val --model nvidia/Alpamayo-R1-10B --checkpoint runs/one --out eval/one`
    """
    with output.show_progress("eval") as on_progress:
        from alpacache.evaluation.evaluate import evaluate as run

        report = run(config, on_progress=on_progress)
    if json:
        told = {"out": report.out, "seconds": report.seconds, "left_out": report.left_out, "choice": report.choice}
        output.print_json(told | {"summary": report.summary.to_json()})
        return
    _print_summary(report.summary)
    output.print_left_out((sample.sample_id, sample.reason) for sample in report.left_out)
    labels = ("report", "numbers", "every sample", "pictures")
    names = ("report.html", "eval.json", "samples.parquet", "pictures/")
    files = {label: f"{config.out}/{name}" for label, name in zip(labels, names, strict=True)}
    output.print_lines("", files | ({"sheet": f"{config.out}/sheet.png"} if config.sheet else {}))


@from_config(DemoConfig)
def demo(config: DemoConfig, json: bool) -> None:
    """Offline, on a CPU, in minutes: a straight-biased tiny model, cached features, retraining, the bias gone.

    Example: `alpacache demo --out demo`
    """
    from alpacache.demo.story import run_demo
    from alpacache.driver.loop_page import loop_table
    from alpacache.progress import OnProgress

    @contextmanager
    def stage(title: str, command: str) -> Iterator[OnProgress]:
        output.note(command)
        with output.show_progress(title) as on_progress:
            yield on_progress

    report = run_demo(config.out, seed=config.seed, stage=stage)
    if json:
        told = {"out": config.out, "train": report.run, "summary": report.evaluation.summary.to_json()}
        output.print_json(told | {"closed_loop": report.loop})
        return
    _print_summary(report.evaluation.summary)
    heads, *rows = loop_table(report.loop, beside=report.open_loop)
    output.print_table("closed loop: each model drives itself", rows, heads=heads)
    pages = {"report": "report.html", "drives": "closed_loop.html", "one of them": "closed_loop.webp"}
    output.print_lines("", {label: f"{report.evaluation.out}/{name}" for label, name in pages.items()})


def _print_summary(summary: "EvalSummary") -> None:
    """Show errors in metres, then how much of the turn each model takes and knows, and the verdict on it."""
    from alpacache.driving.strata import LATE_CURVE, STRAIGHT_HISTORY, stratum_name

    names = {name: stratum_name(name) for name in ("all", STRAIGHT_HISTORY, LATE_CURVE)}
    errors, turns = [], []
    for name, stratum in summary.strata.items():
        labels = (*summary.models, *summary.baselines) if name in names else summary.models
        for number, label in enumerate(labels if stratum.samples else ()):
            first = [stratum_name(name), str(stratum.samples)] if number == 0 else ["", ""]
            errors.append([*first, label, *(f"{stratum.metrics[label][key]:.3f}" for key in _METRICS)])
            if name in names:
                turns.append([*first, label, *_turn_cells(stratum, label)])
    title = f"{summary.samples} samples, {summary.paths} paths each"
    output.print_table(f"{title}, metres", errors, heads=["stratum", "samples", "model", *_METRICS.values()])
    heads = ["stratum", "samples", "model", "turn taken", "calibration", "R²", "recall", "among paths"]
    output.print_table("heading change at 6.4 s", turns, heads=heads)
    verdicts = [
        [f"{verdict.answer}:", f"{names[name]}, {label} {verdict.sentence}."]
        for name, stratum in summary.strata.items()
        for label, verdict in stratum.verdicts.items()
    ]
    output.print_table("", verdicts)
    _print_steering(summary)
    _print_controls(summary)
    _print_flow_steps(summary)
    _print_commands(summary)
    for warning in summary.warnings[:_WARNINGS]:
        output.note(warning)
    if (more := len(summary.warnings) - _WARNINGS) > 0:
        many = "stratum is" if more == 1 else "strata are"
        output.note(f"{more} more {many} too small to conclude from; eval.json has the names.")


def _print_steering(summary: "EvalSummary") -> None:
    """Show whether steering or speed is wrong, over all samples."""
    keys = {
        "lateral_only": "lateral",
        "speed_only": "speed",
        "lateral_error": "beside",
        "lateral_error_max": "largest",
        "accel_mae": "m/s²",
        "curvature_mae": "1/m",
        "side_chosen": "right side",
        "commit_s": "commits",
    }
    rows = []
    for label, metrics in summary.strata["all"].metrics.items():
        cells = [format(metrics[key], ".4f" if key == "curvature_mae" else ".2f") for key in keys]
        rows.append([label, *("-" if cell == "nan" else cell for cell in cells)])
    title = "steering or speed? metres with the one of the two, beside the driven line; seconds until it commits"
    output.print_table(title, rows, heads=["model", *keys.values()])


def _print_controls(summary: "EvalSummary") -> None:
    """Show loss, error and turn taken with another clip's prefix or with none beside the honest ones, and verdicts."""
    rows, verdicts = [], []
    for label, by_control in summary.controls.get("all", {}).items():
        for number, (control, told) in enumerate(by_control.items()):
            if number == 0:
                honest = [f"{told.honest_loss:.3f}", f"{told.honest_min_ade:.3f}", _taken(told.honest_slope)]
                rows.append([label, "its own", *honest])
            rows.append(["", control, f"{told.loss:.3f}", f"{told.min_ade:.3f}", _taken(told.slope)])
            verdicts.append([f"{told.answer}:", f"{label}: its loss {told.sentence}."])
    output.print_table("does it look?", rows, heads=["model", "prefix", "loss", "minADE", "turn taken"])
    output.print_table("", verdicts)


def _print_flow_steps(summary: "EvalSummary") -> None:
    """Show errors by number of flow steps."""
    rows = [
        [
            label if number == 0 else "",
            str(steps),
            *(f"{value:.3f}" for value in told.metrics.values()),
            _taken(told.slope),
        ]
        for label, by_steps in summary.flow_steps.items()
        for number, (steps, told) in enumerate(by_steps.items())
    ]
    heads = ["model", "flow steps", "minADE", "ADE", "minFDE", "turn taken"]
    output.print_table("flow steps, metres", rows, heads=heads)


def _taken(slope: "Slope | None") -> str:
    """Share of the turn that is taken, with its interval."""
    from alpacache.metrics.bootstrap import range_text

    return "-" if slope is None else f"{slope.slope:z.2f} {range_text(slope.low, slope.high)}".rstrip()


def _print_commands(summary: "EvalSummary") -> None:
    """Show how commands of routes are obeyed, and what the opposite command does where that was asked for."""
    rows = []
    for command, told in summary.commands.items():
        for number, (label, model) in enumerate(told.models.items()):
            first = [command, f"{told.driven} of {told.samples}"] if number == 0 else ["", ""]
            recall = "-" if model.recall is None else f"{model.recall:.2f}"
            rows.append([*first, label, recall, f"{model.obeyed:.2f}"])
    output.print_table("commands", rows, heads=["command", "driven so", "model", "recall", "of all"])
    rows = [
        [
            label,
            str(swap.samples),
            *(f"{value:.2f}" for value in (swap.given, swap.swapped, swap.follows, swap.shift_m)),
        ]
        for label, swap in summary.swaps.items()
    ]
    heads = ["model", "samples", "obey as given", "obey the opposite", "sides follow", "shift m"]
    output.print_table("left for right in the routes", rows, heads=heads)


def _turn_cells(stratum: "StratumSummary", label: str) -> list[str]:
    """Share of the turn that is taken, calibration, R^2, recall, and share of the turns that lie among the paths."""
    from alpacache.metrics.bootstrap import range_text

    slope, corridor = stratum.bias[label]["heading"][6.4], stratum.corridor[label]
    taken = calibration = "-"
    if slope is not None:
        taken = _taken(slope)
        if slope.calibration is not None and slope.r2 is not None:
            ends = range_text(slope.calibration.low, slope.calibration.high)
            calibration = f"{slope.calibration.estimate:z.2f} {ends}".rstrip()
    shares = (None if slope is None else slope.r2, corridor.recall, corridor.contained_leaving)
    return [taken, calibration, *("-" if share is None else f"{share:z.2f}" for share in shares)]
