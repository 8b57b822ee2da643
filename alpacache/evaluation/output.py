"""Every number of every sample and model as one parquet file, a row a sample and model, for pandas and the like."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alpacache import strict_json
from alpacache.alpamayo.prompt import Reasoning
from alpacache.driving.strata import STRATA
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.report import write_report
from alpacache.evaluation.summary import METRIC_KEYS, EvalSummary, SampleResult, departures_of
from alpacache.metrics.bias import HORIZONS_S
from alpacache.pictures.birds_eye import birds_eye_png
from alpacache.training.run_directory import RunDirectory, find_checkpoint

BASE = "base"
"""Label of the unmodified checkpoint; always evaluated, and what the others are compared with."""
TRAINED = "trained"
_PICTURES = 3


def write_sample_table(path: Path, results: Sequence[SampleResult]) -> None:
    """Write `results`, which all have the same models.

    Columns: `sample_id`, `clip_id`, `model`, a boolean `stratum/NAME` each, the metrics in metres, heading change
    (radians) and lateral offset (metres) at each horizon of the driven path (`truth/...`) and of the mean of the
    predicted ones (`pred/...`), and what `corridor` says: `leaves`, `leaving_share`, `contained`, `spread_m`.
    """
    truth, predicted = departures_of(results)
    rows: list[dict[str, Any]] = []
    for place, result in enumerate(results):
        strata = {f"stratum/{name}": name in result.strata.labels for name in STRATA}
        for label, model in result.models.items():
            row: dict[str, Any] = {"sample_id": result.sample_id, "clip_id": result.clip_id, "model": label, **strata}
            row |= {key: model.metrics[key] for key in METRIC_KEYS}
            for kind, departure in (("truth", truth[place]), ("pred", predicted[label][place])):
                for number, horizon_s in enumerate(HORIZONS_S):
                    row[f"{kind}/heading_rad@{horizon_s}"] = departure.heading[number]
                    row[f"{kind}/lateral_m@{horizon_s}"] = departure.lateral[number]
            left = model.leaving
            row |= {"leaves": left.truth, "leaving_share": left.share}
            row |= {"contained": left.contained, "spread_m": left.spread_m}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)


def named_models(config: EvalConfig) -> dict[str, str | None]:
    """Label -> run directory; None is the unmodified checkpoint."""
    runs: dict[str, str | None] = {BASE: None}
    if config.checkpoint is not None:
        runs[TRAINED] = config.checkpoint
    for label, run in config.compare.items():
        if label in runs:
            raise UsageError(f"--compare {label}={run}: the label {label!r} is taken; choose another.")
        runs[label] = run
    return runs


def write_results(
    out: Path,
    config: EvalConfig,
    summary: EvalSummary,
    results: Sequence[SampleResult],
    *,
    steps: Mapping[str, int],
    reasoning: Reasoning,
) -> None:
    """`eval.json`, `samples.parquet`, `report.html`, and pictures of the best, median and worst of the last model."""
    per_sample = [
        {
            "sample_id": r.sample_id,
            "strata": list(r.strata.labels),
            "metrics": {label: dict(m.metrics) for label, m in r.models.items()},
        }
        for r in results
    ]
    document = {
        "settings": {
            "paths": config.paths,
            "flow_steps": config.flow_steps,
            "seed": config.seed,
            "reasoning": reasoning,
            "view": 0,
        },
        "summary": summary.to_json(),
        "samples": per_sample,
    }
    write_sample_table(out / "samples.parquet", results)
    (out / "eval.json").write_text(strict_json.dumps(document, indent=1) + "\n")
    last = summary.models[-1]
    ranked = sorted(results, key=lambda r: (r.models[last].metrics["min_ade"], r.sample_id))
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    for name, place in places.items():
        (out / "pictures" / f"{name}.png").write_bytes(
            _picture(ranked[place], summary, f"{name}: {ranked[place].sample_id}")
        )
    for number, result in enumerate(results[:_PICTURES]):
        (out / "pictures" / f"sample-{number:03d}.png").write_bytes(_picture(result, summary, result.sample_id))
    losses = {label: _loss_rows(run, steps[label]) for label, run in named_models(config).items() if run is not None}
    write_report(summary, results, out / "report.html", losses=losses)


def _loss_rows(run: str, step: int) -> list[dict[str, Any]]:
    """What is left of the metrics of the run that a checkpoint belongs to."""
    return RunDirectory(find_checkpoint(run).resolve().parent.parent).metrics(up_to=step)


def _picture(result: SampleResult, summary: EvalSummary, title: str) -> bytes:
    return birds_eye_png(
        truth_xyz=result.truth_xyz,
        history_xyz=result.history_xyz,
        paths={label: result.models[label].pred_xyz for label in summary.models},
        baselines={label: result.models[label].pred_xyz[0] for label in summary.baselines},
        front_jpeg=result.front_jpeg,
        title=title,
    )
