"""Every number of every sample and model as one parquet file, a row a sample and model, for pandas and the like."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alpacache.driving.strata import STRATA
from alpacache.metrics.bias import HORIZONS_S
from alpacache.summary import METRIC_KEYS, SampleResult, departures_of


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
