"""Brain or hands: does the frozen VLM not know about the curve, or does the expert not use what it is given?

Probes predict the future from cached features, on clips they have not seen and beyond what the ego history tells. What
they can read, an expert could learn from. They are weaker than an expert, which attends to every token: "not there" is
said of pooled vectors, and docs/how-to/brain-or-hands.md tells how to look further.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.driving.sample import Floats, SampleRef
from alpacache.driving.strata import LATE_CURVE
from alpacache.durable import appearing, check_results_out
from alpacache.errors import UsageError
from alpacache.evaluation.config import ProbeConfig
from alpacache.evaluation.judging import LeftOut
from alpacache.evaluation.plots import explained_png
from alpacache.evaluation.probe_features import CURVATURE, HEADING, TARGETS, ProbeData, choose_samples, read_probe_data
from alpacache.evaluation.probe_models import (
    FOLDS,
    PROBES,
    Predictions,
    Probe,
    cross_validate,
    group_folds,
    shuffled_within,
)
from alpacache.evaluation.probe_verdict import ADVICE, LEAST_CLIPS, LEAST_SAMPLES, Cell, Verdict, judge_target
from alpacache.masking import masked_values
from alpacache.metrics.bootstrap import MIN_CLIPS, Interval, r_squared
from alpacache.progress import OnProgress, Progress, ignore
from cache_store import CacheReader

_FILES = ("probe.png", "probe.json")
ALL = "all"
TOGETHER = "all vectors"
"""Name of all sets of vectors side by side, where there are several."""
SHUFFLED = "shuffled"
"""Name of the control, in which each sample has another's features."""
Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Cell]]]]
"""Stratum -> target -> vectors -> probe -> numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Scores of the probes, and the verdicts that follow from them."""

    store: str
    samples: int
    clips: int
    strata: Mapping[str, tuple[int, int]]
    """Stratum -> number of samples and of clips."""
    vectors: Mapping[str, int]
    """Set of vectors -> length of a sample's vector."""
    main: str
    """The vectors that the verdicts rest on: all sets together, or the only one."""
    scores: Scores
    verdicts: Sequence[Verdict]
    """One verdict a target."""
    conclusion: str
    """The verdict on the heading change, and what follows from it."""
    left_out: Sequence[LeftOut]
    """Samples that could not be read."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return dictionaries, lists, numbers, strings and None; see docs/reference/commands.md."""
        document: dict[str, Any] = strict_json.plain(self)
        document["strata"] = {name: {"samples": n, "clips": clips} for name, (n, clips) in self.strata.items()}
        return document


def probe(config: ProbeConfig, *, on_progress: OnProgress = ignore) -> ProbeReport:
    """Read features, fit probes and judge; with `out` write `probe.json` and `probe.png` there.

    Raises `UsageError` for fewer than ten clips, for features that the store does not have, and where `out` holds files
    of something else; `SampleReadError` where a sample cannot be read and is not to be left out, or half cannot.
    """
    started = time.monotonic()
    if config.out is not None:
        keys = {"settings", "scores", "verdicts"}
        check_results_out(Path(config.out), what="probe", names=_FILES, main="probe.json", keys=keys)
    reader = CacheReader(config.store)
    skips = config.on_damage == "skip"
    if reader.unreadable and not skips:
        raise reader.unreadable[0]
    plain = [sample_id for sample_id in reader.sample_ids if SampleRef.parse(sample_id).view == 0]
    chosen = choose_samples(plain, config.samples, seed=config.seed)
    _check_enough([SampleRef.parse(sample_id).clip_id for sample_id in chosen], config.store)
    data = read_probe_data(reader, chosen, layers=config.layers, pool=config.pool, skips=skips, on_progress=on_progress)
    nameless = [LeftOut("", str(error)) for error in reader.unreadable if not error.sample_id]
    data = replace(data, left_out=[*data.left_out, *nameless])
    _check_enough(data.clips, config.store, left_out=len(data.left_out))
    report = probe_data(data, store=config.store, seed=config.seed, started=started, on_progress=on_progress)
    if config.out is not None:
        document = masked_values({"settings": strict_json.plain(config), **report.to_json()})
        with appearing(Path(config.out), last=_FILES, names=_FILES) as directory:
            (directory / "probe.json").write_text(strict_json.dumps(document, indent=1) + "\n")
            (directory / "probe.png").write_bytes(_picture(report))
    return report


def _check_enough(clips: Sequence[str], store: str, *, left_out: int = 0) -> None:
    """Raise `UsageError` where samples of these clips are too few to probe."""
    if (found := len(set(clips))) < MIN_CLIPS:
        unread = f", {left_out} more cannot be read" if left_out else ""
        raise UsageError(
            f"{len(clips)} samples of {store} come from {found} clips{unread}; a probe is judged on clips that it "
            f"has not seen and needs {MIN_CLIPS}. Extract more clips, or raise --samples."
        )


def probe_data(
    data: ProbeData, *, store: str = "", seed: int = 0, started: float | None = None, on_progress: OnProgress = ignore
) -> ProbeReport:
    """Fit probes and judge; the report's seconds count from `started`, or from now."""
    started = time.monotonic() if started is None else started
    main = TOGETHER if len(data.features) > 1 else next(iter(data.features))
    predictions = _predict(data, main, seed, on_progress)
    rows = {ALL: np.ones(len(data.clips), dtype=bool), LATE_CURVE: data.late_curve}
    counts = {name: (int(mask.sum()), len(set(compress(data.clips, mask)))) for name, mask in rows.items()}
    scores = {name: _score(data, mask, main, predictions, seed) for name, mask in rows.items() if mask.any()}
    enough = counts[LATE_CURVE][0] >= LEAST_SAMPLES and counts[LATE_CURVE][1] >= LEAST_CLIPS
    verdicts = []
    for target in TARGETS:
        stratum = LATE_CURVE if enough and target in (HEADING, CURVATURE) else ALL
        cells = scores[stratum][target]
        verdicts.append(judge_target(target, stratum, counts[stratum], counts[ALL][1], cells[main], cells[SHUFFLED]))
    heading = next(verdict for verdict in verdicts if verdict.target == HEADING)
    return ProbeReport(
        store=store,
        samples=len(data.clips),
        clips=len(set(data.clips)),
        strata=counts,
        vectors={name: vectors.shape[1] for name, vectors in data.features.items()},
        main=main,
        scores=scores,
        verdicts=verdicts,
        conclusion=f"{heading.sentence} {ADVICE[heading.answer]}",
        left_out=data.left_out,
        seconds=time.monotonic() - started,
    )


def _predict(data: ProbeData, main: str, seed: int, on_progress: OnProgress) -> dict[str, dict[Probe, Predictions]]:
    """Vectors -> probe -> predictions out of fold; of several sets each alone is read by the ridge only."""
    folds = group_folds(data.clips, FOLDS, seed=seed)
    joined = np.concatenate(list(data.features.values()), axis=1)
    order = shuffled_within(folds, seed=seed)
    passes: list[tuple[str, Sequence[Probe], NDArray[np.float32], Floats | None]] = [
        (main, PROBES, joined, data.history),
        (SHUFFLED, PROBES, joined[order], data.history),
    ]
    if main == TOGETHER:
        passes += [(name, PROBES[:1], vectors, None) for name, vectors in data.features.items()]
    started, predicted = time.monotonic(), dict[str, dict[Probe, Predictions]]()
    for number, (name, probes, vectors, history) in enumerate(passes):
        parts = cross_validate(probes, vectors, history, data.targets, data.clips, folds, seed=seed)
        for fold, predictions in enumerate(parts, start=1):
            done, notes = number * FOLDS + fold, {"part": "fit", "vectors": name}
            rate = done / (time.monotonic() - started)
            on_progress(Progress(done=done, total=len(passes) * FOLDS, unit="steps", rate=rate, notes=notes))
            predicted[name] = predictions
    return predicted


def _score(
    data: ProbeData,
    rows: NDArray[np.bool_],
    main: str,
    predictions: Mapping[str, Mapping[Probe, Predictions]],
    seed: int,
) -> dict[str, dict[str, dict[str, Cell]]]:
    """Target -> vectors -> probe -> R^2 on some rows.

    The rival that a gain is measured against is the better probe of the history, or the mean where both are worse.
    """
    clips = list(compress(data.clips, rows))
    result: dict[str, dict[str, dict[str, Cell]]] = {}
    for column, target in enumerate(TARGETS):
        at, truth = (rows, column), data.targets[rows, column]
        rivals = [each.history[at] for each in predictions[main].values() if each.history is not None]
        rivals += [predictions[main][PROBES[0]].mean[at]]
        rival = min(rivals, key=lambda pred: float(((truth - pred) ** 2).sum()))
        result[target] = {
            name: {kind: _cell(each, truth, at, rival, clips, seed) for kind, each in kinds.items()}
            for name, kinds in predictions.items()
        }
    return result


def _cell(
    predictions: Predictions,
    truth: Floats,
    at: tuple[NDArray[np.bool_], int],
    rival: Floats,
    clips: Sequence[str],
    seed: int,
) -> Cell:
    def share(pred: Floats | None, over: Floats | None = None) -> Interval | None:
        return None if pred is None else r_squared(truth, pred[at], predictions.mean[at], clips, over=over, seed=seed)

    history, features, both = predictions.history, predictions.features, predictions.both
    return Cell(history=share(history), features=share(features), both=share(both), gain=share(both, rival))


def _picture(report: ProbeReport) -> bytes:
    panels: dict[str, dict[str, dict[str, Interval | None]]] = {}
    for stratum, targets in report.scores.items():
        for target, vectors in targets.items():
            cells = vectors[report.main]
            panels[f"{target}, {_short(stratum)}, n = {report.strata[stratum][0]}"] = {
                "history": {kind: cell.history for kind, cell in cells.items()},
                "features": {kind: cell.features for kind, cell in cells.items()},
                "both": {kind: cell.both for kind, cell in cells.items()},
                SHUFFLED: {kind: cell.features for kind, cell in vectors[SHUFFLED].items()},
            }
    stratum = report.verdicts[0].stratum
    layers = {
        f"{target}, {_short(stratum)}, features alone": {
            name: vectors[name]["ridge"].features for name in report.vectors
        }
        for target, vectors in report.scores[stratum].items()
        if report.main == TOGETHER
    }
    return explained_png(panels, layers, columns=len(TARGETS))


def _short(stratum: str) -> str:
    return "curve after t0" if stratum == LATE_CURVE else "all samples"
