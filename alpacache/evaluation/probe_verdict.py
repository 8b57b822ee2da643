"""The verdict of a probe: the curve is in the features, it is not, or these samples cannot tell.

The gain decides: how much more of the variance history and features explain together than history alone, on the same
samples. R^2 of features alone proves nothing, as the features hold the ego history too. The rules are on
docs/how-to/brain-or-hands.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from alpacache.driving.strata import LATE_CURVE
from alpacache.metrics.bootstrap import Interval, range_text

Answer: TypeAlias = Literal["there", "not there", "too few samples"]

WORTH = 0.1
"""Least gain in R^2 that counts as knowing: a tenth of the variance."""
LEAST_SAMPLES, LEAST_CLIPS = 30, 20
"""Least numbers in a stratum that decide anything."""
CLIPS_TO_DENY = 200
"""Least number of clips of the judged stratum for `not there`: fitted to fewer, a probe may miss what is there."""
PLANTED = 0.3
"""Share of what history leaves that the planted signal of the positive control explains."""
LOUDNESS = 0.1
"""Loudness of that signal in pooled vectors, against each channel's spread; in a single token it is as loud as that."""
BENT_LOUDNESS = 0.5
"""Loudness of each of the two parts whose product is that signal."""
BENDING = ("heading change", "curvature")
"""Targets that a history which turns gives away, in whatever way."""
FITTING = 1.5
"""Widening of an interval for what another fit would change. Splitting clips holds the fitted probes fixed; the
variance of a mean over K folds is 1 + K * (test / train) = 2.25 times that. Source: Nadeau and Bengio, Inference for
the Generalization Error, Machine Learning 52 (2003)."""
ADVICE: Mapping[Answer, str] = {
    "there": "An expert that drives straight on all the same ignores it: retrain the expert.",
    "not there": "No expert can learn from features what they do not hold: first more cameras, other frames or "
    "fine-tuning of the VLM.",
    "too few samples": "Extract more clips, above all with curves that begin after t0, and probe again.",
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
    cells: Mapping[str, Cell],
    control: Mapping[str, Cell],
    *,
    looked_at: str,
    planted: Mapping[str, Interval | None] | None,
) -> Verdict:
    """Decide by the gain of the best probe.

    Args:
        counts: number of samples and of clips of the stratum.
        cells: probe -> its numbers.
        control: probe -> its numbers with features of other samples.
        looked_at: what the probes saw, for the sentence.
        planted: probe -> its gain by a signal of strength `PLANTED` that was added; None: not tried, so nothing can be
            denied.
    """
    samples, clips = counts
    where = f"{samples} samples of {clips} clips"
    if stratum == LATE_CURVE:
        where += " that go straight until t0 and curve afterwards"
    gains = {probe: cell.gain for probe, cell in cells.items() if cell.gain is not None}
    by_chance = {probe: 0.0 if cell.gain is None else cell.gain.estimate for probe, cell in control.items()}
    proven = [probe for probe, gain in gains.items() if gain.estimate >= WORTH and gain.low > max(0, by_chance[probe])]
    answer: Answer = "too few samples"
    if samples < LEAST_SAMPLES or clips < LEAST_CLIPS or len(gains) < len(cells):
        evidence = f"{where}, where {LEAST_SAMPLES} of {LEAST_CLIPS} clips and a target that varies are needed"
    else:
        best = max(proven or gains, key=lambda probe: gains[probe].estimate)
        both, gain = cells[best].both, gains[best]
        assert both is not None
        ends = range_text(gain.low, gain.high) or "without an interval"
        evidence = (
            f"{where}: history explains {both.estimate - gain.estimate:z.2f} of the variance, history and features "
            f"{both.estimate:z.2f}, a gain of {gain.estimate:z.2f} {ends} ({best}); "
            f"{by_chance[best]:z.2f} with features of other samples"
        )
        if stratum != LATE_CURVE and target in BENDING:
            evidence += (
                "; here history may tell it in ways that no probe found: only samples that go straight until t0 and "
                f"curve afterwards decide, {LEAST_SAMPLES} of {LEAST_CLIPS} clips"
            )
        elif proven:
            answer = "there"
        elif could_deny(clips, gains):
            found = planted or {}
            evidence += f". Looked at: {looked_at}. {_told(found)}"
            if found and all(map(_is_found, found.values())):
                answer = "not there"
    words = "too few samples to conclude" if answer == "too few samples" else f"the information is {answer}"
    return Verdict(target=target, stratum=stratum, answer=answer, sentence=f"{target}: {words}. {evidence}.")


def could_deny(clips: int, gains: Mapping[str, Interval]) -> bool:
    """Tell whether these gains on a stratum of so many clips leave room for `not there`."""
    return clips >= CLIPS_TO_DENY and all(gain.high < WORTH for gain in gains.values())


def _is_found(gain: Interval | None) -> bool:
    return gain is not None and gain.estimate >= WORTH and gain.low > 0


def _told(found: Mapping[str, Interval | None]) -> str:
    """Sentence on which planted signals were found."""
    if not found:
        return "Single tokens were not looked at, and one of them may hold what pooled vectors have lost"
    gains = ", ".join(
        f"{probe} {gain.estimate:z.2f} {range_text(gain.low, gain.high)}".rstrip() if gain else f"{probe} none"
        for probe, gain in found.items()
    )
    how = "was found" if all(map(_is_found, found.values())) else "was not found by all, so nothing can be denied"
    return (
        f"A planted signal that explains {PLANTED:g} of what history leaves, {LOUDNESS:g} as loud as the vectors, the "
        f"product of two parts {BENT_LOUDNESS:g} as loud, and as loud as one token, {how}: a gain of {gains}"
    )
