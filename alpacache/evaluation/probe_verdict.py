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
"""Least number of clips for `not there`: fitted to fewer, a probe may miss what is there."""
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
    fitted_clips: int,
    cells: Mapping[str, Cell],
    control: Mapping[str, Cell],
) -> Verdict:
    """Decide by the gain of the better probe.

    Args:
        counts: number of samples and of clips of the stratum.
        fitted_clips: number of clips that the probes were fitted and judged on, of all strata.
        cells: probe -> its numbers.
        control: probe -> its numbers with features of other samples.
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
        if proven:
            answer = "there"
        elif fitted_clips >= CLIPS_TO_DENY and all(gain.high < WORTH for gain in gains.values()):
            answer = "not there"
        best = max(proven or gains, key=lambda probe: gains[probe].estimate)
        both, gain = cells[best].both, gains[best]
        assert both is not None
        ends = range_text(gain.low, gain.high) or "without an interval"
        evidence = (
            f"{where}: history explains {both.estimate - gain.estimate:z.2f} of the variance, history and features "
            f"{both.estimate:z.2f}, a gain of {gain.estimate:z.2f} {ends} ({best}); "
            f"{by_chance[best]:z.2f} with features of other samples"
        )
    words = "too few samples to conclude" if answer == "too few samples" else f"the information is {answer}"
    return Verdict(target=target, stratum=stratum, answer=answer, sentence=f"{target}: {words}. {evidence}.")
