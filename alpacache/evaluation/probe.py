"""Brain or hands: does the frozen VLM not know about the curve, or does the expert not use what it is given?

Probes predict the future from cached features, on clips they have not seen and beyond what the ego history tells. What
they can read, an expert could learn from. They are weaker than an expert, which attends to every token in every layer:
"not there" names what was looked at, and is said only where a planted signal is found in the same samples.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.driving.sample import Floats, SampleRef
from alpacache.driving.strata import LATE_CURVE
from alpacache.durable import appearing, check_results_out
from alpacache.errors import UsageError
from alpacache.evaluation.config import Pool, ProbeConfig
from alpacache.evaluation.judging import LeftOut
from alpacache.evaluation.plots import explained_png
from alpacache.evaluation.probe_features import HEADING, TARGETS, ProbeData, choose_samples, read_probe_data
from alpacache.evaluation.probe_models import (
    BEST_TOKENS,
    FOLDS,
    PAIRED,
    PROBES,
    QUERIES,
    Predictions,
    Probe,
    attended,
    cross_validate,
    group_folds,
    products,
    shuffled_within,
    strongest,
)
from alpacache.evaluation.probe_verdict import (
    ADVICE,
    BENDING,
    BENT_LOUDNESS,
    FITTING,
    LEAST_CLIPS,
    LEAST_SAMPLES,
    LOUDNESS,
    PLANTED,
    Cell,
    Verdict,
    could_deny,
    judge_target,
)
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
_Tokens: TypeAlias = Mapping[Probe, NDArray[np.float32]]
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
    report = probe_data(
        data, store=config.store, pool=config.pool, seed=config.seed, started=started, on_progress=on_progress
    )
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
    data: ProbeData,
    *,
    store: str = "",
    pool: Pool = "both",
    seed: int = 0,
    started: float | None = None,
    on_progress: OnProgress = ignore,
) -> ProbeReport:
    """Fit probes and judge; the report's seconds count from `started`, or from now."""
    started = time.monotonic() if started is None else started
    main = TOGETHER if len(data.features) > 1 else next(iter(data.features))
    predictions = _predict(data, main, seed, on_progress)
    rows = {ALL: np.ones(len(data.clips), dtype=bool), LATE_CURVE: data.late_curve}
    counts = {name: (int(mask.sum()), len(set(compress(data.clips, mask)))) for name, mask in rows.items()}
    scores = {name: _score(data, mask, main, predictions, seed) for name, mask in rows.items() if mask.any()}
    enough = counts[LATE_CURVE][0] >= LEAST_SAMPLES and counts[LATE_CURVE][1] >= LEAST_CLIPS
    strata = {target: LATE_CURVE if enough and target in BENDING else ALL for target in TARGETS}
    planted: dict[str, dict[str, Interval | None]] = {}
    if data.tokens is not None and any(
        could_deny(counts[stratum][1], {k: c.gain for k, c in scores[stratum][target][main].items() if c.gain})
        for target, stratum in strata.items()
    ):
        planted = _planted(data, data.tokens, predictions[main], {t: rows[s] for t, s in strata.items()}, seed)
    verdicts = []
    for target, stratum in strata.items():
        cells = scores[stratum][target]
        looked_at = _looked_at(data, pool)
        verdict = judge_target(
            target,
            stratum,
            counts[stratum],
            cells[main],
            cells[SHUFFLED],
            looked_at=looked_at,
            planted=planted.get(target),
        )
        verdicts.append(verdict)
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
    tokens: dict[Probe, NDArray[np.float32]] = {"products": products(strongest(joined))}
    if data.tokens is not None:
        tokens |= {"token": data.tokens, "attention": attended(data.tokens)}
    other_tokens = {probe: each[order] for probe, each in tokens.items()}
    passes: list[tuple[str, Sequence[Probe], NDArray[np.float32], _Tokens, Floats | None]] = [
        (main, PROBES, joined, tokens, data.history),
        (SHUFFLED, PROBES, joined[order], other_tokens, data.history),
    ]
    if main == TOGETHER:
        passes += [(name, PROBES[:1], vectors, {}, None) for name, vectors in data.features.items()]
    started, predicted = time.monotonic(), dict[str, dict[Probe, Predictions]]()
    for number, (name, probes, vectors, one_by_one, history) in enumerate(passes):
        parts = cross_validate(probes, vectors, history, data.targets, data.clips, folds, tokens=one_by_one, seed=seed)
        for fold, predictions in enumerate(parts, start=1):
            done, notes = number * FOLDS + fold, {"part": "fit", "vectors": name}
            rate = done / (time.monotonic() - started)
            on_progress(Progress(done=done, total=len(passes) * FOLDS, unit="steps", rate=rate, notes=notes))
            predicted[name] = predictions
    return predicted


def _planted(
    data: ProbeData,
    tokens: NDArray[np.float32],
    predictions: Mapping[Probe, Predictions],
    rows: Mapping[str, NDArray[np.bool_]],
    seed: int,
) -> dict[str, dict[str, Interval | None]]:
    """Target -> probe -> gain by a signal of known strength that was added to these samples: the positive control.

    The signal explains `PLANTED` of what history leaves of the target. The ridge is to find it in the pooled vectors,
    in a random direction, a tenth as loud as each channel; `products` there too, as the product of two parts, each
    `BENT_LOUDNESS` as loud; `token` in the token of one place, as loud as that is there; `attention` in a token whose
    place changes from sample to sample, as loud as tokens are.
    """
    rng = np.random.default_rng([seed, 1])
    joined, fixed, moving = np.concatenate(list(data.features.values()), axis=1), tokens.copy(), tokens.copy()
    bent = joined.copy()
    spread, loud, every = joined.std(0), tokens.std(axis=(0, 1)), np.arange(len(tokens))
    for column, mask in enumerate(rows.values()):
        left = data.targets[:, column] - _rival(predictions, data.targets, np.ones_like(mask), column)
        left = (left - left[mask].mean()) / max(left[mask].std(), 1e-12)
        signal = PLANTED**0.5 * left + (1 - PLANTED) ** 0.5 * rng.normal(size=len(left))
        joined += LOUDNESS * np.outer(signal, rng.normal(size=joined.shape[1]) * spread).astype(np.float32)
        sign = rng.choice([-1.0, 1.0], size=len(left))
        for part in (sign, sign * signal):
            bent += BENT_LOUDNESS * np.outer(part, rng.normal(size=bent.shape[1]) * spread).astype(np.float32)
        place = rng.integers(tokens.shape[1])
        direction = rng.normal(size=tokens.shape[2]) * tokens[:, place].std(0)
        fixed[:, place] += np.outer(signal, direction).astype(np.float32)
        places = rng.integers(tokens.shape[1], size=len(tokens))
        moving[every, places] += np.outer(signal, rng.normal(size=tokens.shape[2]) * loud).astype(np.float32)
    single: _Tokens = {"products": products(strongest(bent)), "token": fixed, "attention": attended(moving)}
    folds = group_folds(data.clips, FOLDS, seed=seed)
    parts = cross_validate(PROBES[:1], joined, data.history, data.targets, data.clips, folds, tokens=single, seed=seed)
    found = list(parts)[-1]
    gains: dict[str, dict[str, Interval | None]] = {}
    for column, (target, mask) in enumerate(rows.items()):
        at, clips = (mask, column), list(compress(data.clips, mask))
        gains[target] = {}
        for kind, each in found.items():
            assert each.both is not None
            over = predictions[kind].both
            assert over is not None
            # Of this very fit, whether it found what is there: no wider for what others would.
            gains[target][kind] = r_squared(
                data.targets[at], each.both[at], each.mean[at], clips, over=over[at], seed=seed
            )
    return gains


def _looked_at(data: ProbeData, pool: Pool) -> str:
    """Say in words what the probes saw of the prefix."""
    pools = {
        "both": "the last token and the mean over tokens",
        "last": "the last token",
        "mean": "the mean over tokens",
    }
    words = f"{pools[pool]} of {', '.join(data.features)}, products of their {PAIRED} strongest components"
    if data.tokens is not None:
        words += f", the {BEST_TOKENS} most telling of {data.tokens.shape[1]} single tokens and what "
        words += f"{QUERIES} queries find among these"
    return words


def _rival(predictions: Mapping[Probe, Predictions], targets: Floats, rows: NDArray[np.bool_], column: int) -> Floats:
    """The better probe's predictions from history, or the mean where all are worse: what a gain is measured against."""
    rivals = [each.history[rows, column] for each in predictions.values() if each.history is not None]
    rivals += [predictions[PROBES[0]].mean[rows, column]]
    return min(rivals, key=lambda pred: float(((targets[rows, column] - pred) ** 2).sum()))


def _score(
    data: ProbeData,
    rows: NDArray[np.bool_],
    main: str,
    predictions: Mapping[str, Mapping[Probe, Predictions]],
    seed: int,
) -> dict[str, dict[str, dict[str, Cell]]]:
    """Target -> vectors -> probe -> R^2 on some rows."""
    clips = list(compress(data.clips, rows))
    result: dict[str, dict[str, dict[str, Cell]]] = {}
    for column, target in enumerate(TARGETS):
        at, truth = (rows, column), data.targets[rows, column]
        rival = _rival(predictions[main], data.targets, rows, column)
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
        return None if pred is None else _share(truth, pred[at], predictions.mean[at], clips, over=over, seed=seed)

    history, features, both = predictions.history, predictions.features, predictions.both
    return Cell(history=share(history), features=share(features), both=share(both), gain=share(both, rival))


def _share(
    truth: Floats, pred: Floats, mean: Floats, clips: Sequence[str], *, over: Floats | None, seed: int
) -> Interval | None:
    """R^2, or the gain over other predictions, with an interval that holds what another fit would change."""
    found = r_squared(truth, pred, mean, clips, over=over, seed=seed)
    if found is None:
        return None
    low, high = (found.estimate + FITTING * (end - found.estimate) for end in (found.low, found.high))
    return replace(found, low=low, high=high)


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
