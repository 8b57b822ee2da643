"""`alpacache eval`: is the straight-line bias gone?"""

from typing import TYPE_CHECKING, Annotated

import typer

from . import options, output

if TYPE_CHECKING:
    from alpacache.evaluation.summary import EvalSummary

_NAMES = {"straight_history_late_curve": "curve after t0"}
_WARNINGS = 3
_METRICS = {"min_ade": "minADE", "ade": "ADE", "min_fde": "minFDE", "corner_distance": "corners"}


def evaluate(
    store: Annotated[str, typer.Option(help="Store of the samples to judge on, best of held-out clips.")],
    model: options.Model,
    out: Annotated[str, typer.Option(help="Directory for JSON, pictures and the report.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Run directory or checkpoint to judge beside the base model.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="LABEL=RUN: one more run in the same tables; repeatable.")
    ] = None,
    ema: options.Ema = False,
    reasoning: Annotated[
        str, typer.Option(help="`auto`: each path on a reasoning rollout where the store has them; `none`: without.")
    ] = "auto",
    paths: Annotated[int, typer.Option(help="Paths sampled a sample.")] = 6,
    flow_steps: Annotated[int, typer.Option(help="Euler steps from noise to action.")] = 10,
    samples: options.Samples = None,
    batch_size: Annotated[int, typer.Option(help="Samples at once; changes no result.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the noise, which all models share.")] = 0,
    capture: Annotated[bool, typer.Option(help="Replay a batch's flow steps as one CUDA graph on a GPU.")] = True,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Judge the base model and trained ones on cached features: public metrics, straight-line bias, pictures.

    Example: `alpacache eval --store cache/val --model nvidia/Alpamayo-R1-10B --checkpoint runs/one --out eval/one`
    """
    from alpacache.evaluation.config import EvalConfig

    config = EvalConfig(
        store=store,
        model=model,
        out=out,
        checkpoint=checkpoint,
        compare=options.labelled(compare or []),
        ema=ema,
        reasoning=options.one_of("reasoning", reasoning, ("auto", "none")),  # type: ignore[arg-type]
        paths=paths,
        flow_steps=flow_steps,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        device=device,
        capture=capture,
    )
    with output.show_progress("eval") as on_progress:
        from alpacache.evaluation.evaluate import evaluate as run

        report = run(config, on_progress=on_progress)
    if json:
        output.print_json({"out": report.out, "seconds": report.seconds, "summary": report.summary.to_json()})
        return
    print_summary(report.summary)
    output.print_table(
        "",
        [
            ["report", f"{out}/report.html"],
            ["numbers", f"{out}/eval.json"],
            ["every sample", f"{out}/samples.parquet"],
            ["pictures", f"{out}/pictures/"],
        ],
    )


def print_summary(summary: "EvalSummary") -> None:
    """Metrics in metres, and the slope of predicted against driven heading change: 1 is unbiased, 0 drives straight."""
    from alpacache.driving.strata import LATE_CURVE

    heads = ["stratum", "samples", "model", *_METRICS.values(), "recall", "heading slope at 6.4 s"]
    rows = []
    for name, stratum in summary.strata.items():
        labels = (*summary.models, *summary.baselines) if name in ("all", LATE_CURVE) else summary.models
        for number, label in enumerate(labels if stratum.samples else ()):
            slope = stratum.bias[label]["heading"][6.4]
            text = "-" if slope is None else f"{slope.slope:.2f} [{slope.low:.2f}, {slope.high:.2f}]"
            first = [_NAMES.get(name, name), str(stratum.samples)] if number == 0 else ["", ""]
            recall = stratum.corridor[label].recall
            numbers = [f"{stratum.metrics[label][key]:.3f}" for key in _METRICS]
            rows.append([*first, label, *numbers, "-" if recall is None else f"{recall:.2f}", text])
    output.print_table(f"{summary.samples} samples, {summary.paths} paths each, metres", rows, heads=heads)
    for warning in summary.warnings[:_WARNINGS]:
        output.note(warning)
    if len(summary.warnings) > _WARNINGS:
        output.note(
            f"{len(summary.warnings) - _WARNINGS} more strata are too small to conclude from; eval.json names them."
        )
