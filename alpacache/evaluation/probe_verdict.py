"""The verdict of a probe: the curve is in the features, it is not, or these samples cannot tell.

The gain decides: how much more of the variance history and features explain together than history alone, on the same
samples. R^2 of features alone proves nothing, as the features hold the ego history too. The rules are on
docs/how-to/brain-or-hands.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from alpacache.driving.strata import LATE_CURVE
from alpacache.metrics.bootstrap import Interval

Answer: TypeAlias = Literal["there", "not there", "too few samples"]

WORTH = 0.1
"""Least gain in R^2 that counts as knowing: a tenth of the variance."""
LEAST_SAMPLES, LEAST_CLIPS = 30, 20
"""Least numbers in a stratum that decide anything."""
CLIPS_TO_DENY = 200
"""Least number of clips for `not there`: fitted to fewer, a probe may miss what is there."""
ADVICE: Mapping[Answer, str] = {
    "there": "An expert that drives straight on all the same ignores it: retrain the expert.",
    "not there": "No expert can learn from features what they do not hold: first more cameras, other frames or "
    "fine-tuning of the VLM.",
    "too few samples": "Extract more clips, above all with curves that begin after t0, and probe again.",
}
_WORDS: Mapping[Answer, str] = {
    "there": "the information is there",
    "not there": "the information is not there",
    "too few samples": "too few samples to conclude",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """R^2 of one kind of probe for one target on one stratum; None where the target does not vary."""

    history: Interval | None
    features: Interval | None
    both: Interval | None
    gain: Interval | None
    """R^2 of both less that of history, paired; the better probe of history counts, or 0 where both are below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer for one target, and a sentence with its evidence."""

    target: str
    stratum: str
    """Name of the stratum that it rests on."""
    answer: Answer
    sentence: str


def judge_target(
    target: str,
    stratum: str,
    counts: tuple[int, int],
    fitted_clips: int,
    cells: Mapping[str, Cell],
    control: Mapping[str, Cell],
) -> Verdict:
    """Decide by the gain of the better probe.

    Args:
        target: name of the target.
        stratum: name of the stratum.
        counts: number of samples and of clips of the stratum.
        fitted_clips: number of clips that the probes were fitted and judged on, of all strata.
        cells: probe -> its numbers.
        control: probe -> its numbers with features of other samples.
    """
    gains = {probe: cell.gain for probe, cell in cells.items()}
    where = _where(stratum, *counts)
    if counts[0] < LEAST_SAMPLES or counts[1] < LEAST_CLIPS or None in gains.values():
        reason = f"{where}, where {LEAST_SAMPLES} of {LEAST_CLIPS} clips and a target that varies are needed"
        return _verdict(target, stratum, "too few samples", reason)
    known = {probe: gain for probe, gain in gains.items() if gain is not None}
    best = max(known, key=lambda probe: known[probe].estimate)
    by_chance = {probe: 0.0 if cell.gain is None else cell.gain.estimate for probe, cell in control.items()}
    answer: Answer = "too few samples"
    proven = [
        probe for probe, gain in known.items() if gain.estimate >= WORTH and gain.low > max(0.0, by_chance[probe])
    ]
    if proven:
        answer, best = "there", max(proven, key=lambda probe: known[probe].estimate)
    elif fitted_clips >= CLIPS_TO_DENY and all(gain.high < WORTH for gain in known.values()):
        answer = "not there"
    cell, gain = cells[best], known[best]
    assert cell.both is not None
    evidence = (
        f"{where}: history explains {cell.both.estimate - gain.estimate:z.2f} of the variance, history and features "
        f"{cell.both.estimate:z.2f}, a gain of {gain.estimate:z.2f} [{gain.low:z.2f}, {gain.high:z.2f}] ({best}); "
        f"{by_chance[best]:z.2f} with features of other samples"
    )
    return _verdict(target, stratum, answer, evidence)


def _verdict(target: str, stratum: str, answer: Answer, evidence: str) -> Verdict:
    return Verdict(
        target=target,
        stratum=stratum,
        answer=answer,
        sentence=f"{target}: {_WORDS[answer]}. {evidence[:1].upper()}{evidence[1:]}.",
    )


def _where(stratum: str, samples: int, clips: int) -> str:
    kind = " that go straight until t0 and curve afterwards" if stratum == LATE_CURVE else ""
    return f"{samples} samples of {clips} clips{kind}"
