"""The files of an evaluation: JSON, a table of every sample for pandas and the like, pictures, and the report."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alpacache import strict_json
from alpacache.driving.route import Command
from alpacache.driving.sample import FUTURE_S
from alpacache.durable import appearing, check_results_out
from alpacache.errors import UsageError
from alpacache.evaluation.judging import METRIC_KEYS, VARIANT_KEYS, LeftOut, ModelResult, SampleResult, strata_names
from alpacache.evaluation.plots import sample_png
from alpacache.evaluation.report import write_report
from alpacache.evaluation.sheet import sheet_png
from alpacache.evaluation.summary import EvalSummary
from alpacache.metrics.bias import HORIZONS_S
from alpacache.metrics.commands import share_obeying

_MAIN = ("report.html", "eval.json")
"""Files that one looks at: gone first and there last, so that it is never of another evaluation than the rest."""
_REST = ("samples.parquet", "pictures", "sheet.png")
_PICTURE = re.compile(r"(best|median|worst|sample-\d{3})\.png")
FIRST_PICTURES = 3
"""Samples drawn whatever their error, so that evaluations can be compared picture by picture."""


def write_results(
    out: Path,
    summary: EvalSummary,
    results: Sequence[SampleResult],
    *,
    left_out: Sequence[LeftOut] = (),
    settings: Mapping[str, Any],
    losses: Mapping[str, Sequence[Mapping[str, Any]]],
    sheet: Sequence[SampleResult] = (),
) -> None:
    """Write `eval.json`, `samples.parquet`, `report.html` and `pictures/`, whose ranking is that of the last model.

    They take the place of an earlier evaluation's together. `settings` is what the paths depend on; `losses` maps the
    label of a trained model to the rows of its run's `metrics.jsonl`; `sheet.png` shows the samples of `sheet`.
    """
    with appearing(out, replaces=_REST, last=_MAIN, names=(*_MAIN, *_REST)) as directory:
        _write(directory, summary, results, left_out, settings, losses, sheet)


def check_evaluation_out(out: Path) -> None:
    """Refuse a directory that cannot be written to, or where other files have the names of an evaluation's.

    Takes back what a killed evaluation had begun to put there. Raises `UsageError`.
    """
    pictures = out / "pictures"
    if pictures.is_dir() and (foreign := sorted(p.name for p in pictures.iterdir() if not _PICTURE.fullmatch(p.name))):
        raise UsageError(
            f"--out {out}: pictures holds {', '.join(foreign[:3])}, which no evaluation writes, and another one takes "
            "the place of that folder. Move it away, or name another directory."
        )
    keys = {"settings", "summary", "samples"}
    check_results_out(out, what="evaluation", names=(*_MAIN, *_REST), main="eval.json", keys=keys)


def _write(
    out: Path,
    summary: EvalSummary,
    results: Sequence[SampleResult],
    left_out: Sequence[LeftOut],
    settings: Mapping[str, Any],
    losses: Mapping[str, Sequence[Mapping[str, Any]]],
    sheet: Sequence[SampleResult],
) -> None:
    per_sample = [
        {
            "sample_id": result.sample_id,
            "strata": result.labels,
            **({"route": result.route, "command": result.command} if result.routed else {}),
            "metrics": {label: model.metrics for label, model in result.models.items()},
        }
        for result in results
    ]
    document = {"settings": settings, "summary": summary, "samples": per_sample, "left_out": left_out}
    (out / "eval.json").write_text(strict_json.dumps(document, indent=1) + "\n")
    write_sample_table(out / "samples.parquet", results)
    last = summary.models[-1]
    ranked = sorted(results, key=lambda result: (result.models[last].metrics["min_ade"], result.sample_id))
    drawn = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    pictures = {name: (f"{name}: {result.sample_id}", result) for name, result in drawn.items()}
    for number, result in enumerate(results[:FIRST_PICTURES]):
        pictures[f"sample-{number:03d}"] = (result.sample_id, result)
    (out / "pictures").mkdir()
    for name, (title, result) in pictures.items():
        png = sample_png(summary, result, front_jpeg=result.front_jpeg, title=title)
        (out / "pictures" / f"{name}.png").write_bytes(png)
    drawn_sheet = sheet_png(summary, sheet, results) if sheet else None
    if drawn_sheet is not None:
        (out / "sheet.png").write_bytes(drawn_sheet)
    write_report(
        summary,
        results,
        out / "report.html",
        left_out=left_out,
        choice=settings.get("choice"),
        stores=settings.get("compare_store", {}),
        losses=losses,
        sheet=drawn_sheet,
    )


def _route_columns(result: SampleResult, model: ModelResult) -> dict[str, Any]:
    command, swapped = result.command, model.swapped_xyz
    given = command is not None and command != "none"
    other: Command = "right" if command == "left" else "left"
    return {
        "route": result.route,
        "command": command,
        "obeys": share_obeying(model.pred_xyz, command) if given and command else None,
        "driven_obeys": bool(share_obeying(result.truth_xyz[None], command)) if given and command else None,
        "swapped/obeys": None if swapped is None else share_obeying(swapped, other),
        "swapped/lateral_m@6.4": None if swapped is None else float(swapped[:, -1, 1].mean()),
    }


def _variant_columns(
    result: SampleResult, model: ModelResult, controls: Sequence[str], flow_steps: Sequence[int]
) -> dict[str, Any]:
    """Columns of controls and of numbers of flow steps, null for baselines."""
    columns: dict[str, Any] = {}
    if controls:
        columns["loss"] = model.loss
    for name, variant in [
        *((control, model.controls.get(control)) for control in controls),
        *((f"flow_steps={steps}", model.by_steps.get(steps)) for steps in flow_steps),
    ]:
        for key in VARIANT_KEYS:
            columns[f"{name}/{key}"] = None if variant is None else variant.metrics[key]
        columns[f"{name}/heading_rad@{FUTURE_S}"] = None if variant is None else variant.departure.heading[-1]
        if name in controls:
            columns[f"{name}/loss"] = None if variant is None else variant.loss
    if "shuffled" in controls:
        columns["shuffled/sample_id"] = result.shuffled_with if "shuffled" in model.controls else None
    return columns


def write_sample_table(path: Path, results: Sequence[SampleResult]) -> None:
    """Write a row for each sample and model as parquet; all results have the same models.

    Columns: `sample_id`, `clip_id`, `weight`, `model`, a boolean `stratum/NAME` each, the metrics, heading change
    (radians) and lateral offset (metres) at each horizon of the driven path (`truth/...`) and of the mean of the
    predicted ones (`pred/...`), the variance of that mean (`noise/...`), and the fields of `Leaving`: `leaves`,
    `leaving_share`, `contained`, `spread_m`, `split`. Where samples may have routes also `route`, `command`, `obeys`
    (share of the paths that do; null without a command), `driven_obeys`, and with left for right in the route
    `swapped/obeys` and `swapped/lateral_m@6.4`. Of controls `loss`, `shuffled/loss`, `shuffled/min_ade` and so on, and
    `shuffled/sample_id`, whose prefix it was; of several numbers of flow steps `flow_steps=4/min_ade` and so on.
    """
    rows: list[dict[str, Any]] = []
    models = [model for result in results for model in result.models.values()]
    controls = list(dict.fromkeys(name for model in models for name in model.controls))
    flow_steps = list(dict.fromkeys(steps for model in models for steps in model.by_steps))
    for result in results:
        sample: dict[str, Any] = {"sample_id": result.sample_id, "clip_id": result.clip_id, "weight": result.weight}
        strata = {f"stratum/{name}": name in result.labels for name in strata_names(routed=result.routed)}
        for label, model in result.models.items():
            row: dict[str, Any] = {**sample, "model": label, **strata}
            row |= {key: strict_json.plain(model.metrics[key]) for key in METRIC_KEYS}
            predicted = result.mean_departure(label)
            for kind, departure in (("truth", result.true_departure), ("pred", predicted)):
                for horizon_s, heading, lateral in zip(HORIZONS_S, departure.heading, departure.lateral, strict=True):
                    row |= {f"{kind}/heading_rad@{horizon_s}": heading, f"{kind}/lateral_m@{horizon_s}": lateral}
            unknown = (None,) * len(HORIZONS_S)
            noise = zip(predicted.heading_noise or unknown, predicted.lateral_noise or unknown, strict=True)
            for horizon_s, (heading_rad2, lateral_m2) in zip(HORIZONS_S, noise, strict=True):
                row |= {f"noise/heading_rad2@{horizon_s}": heading_rad2, f"noise/lateral_m2@{horizon_s}": lateral_m2}
            row |= {"leaves": model.leaving.truth, "leaving_share": model.leaving.share}
            row |= {
                "contained": model.leaving.contained,
                "spread_m": model.leaving.spread_m,
                "split": model.leaving.split,
            }
            row |= _variant_columns(result, model, controls, flow_steps)
            rows.append(row | (_route_columns(result, model) if result.routed else {}))
    pq.write_table(pa.Table.from_pylist(rows), path)
