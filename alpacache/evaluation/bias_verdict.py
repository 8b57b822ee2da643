"""The verdict on a model's turning: is it biased, does it not know better, or do its paths disagree?

A slope of predicted on driven below 1 has three causes, and each asks for something else. A biased expert takes less of
the turn than it knows, which training cures. An uncertain one takes all that it knows, and needs better pictures. A
bimodal one has the turn among its paths, and their mean is a path that none of them takes. Only intervals decide; where
they do not, the verdict says what is missing. The rules are on docs/reference/metrics.md.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from alpacache.metrics.bias import Slope
from alpacache.metrics.bootstrap import MIN_CLIPS, MIN_EFFECTIVE, Interval, range_text
from alpacache.metrics.corridor import CorridorSummary

Answer: TypeAlias = Literal[
    "takes the turn", "biased", "uncertain", "bimodal", "overshoots", "turns the other way", "cannot tell"
]

TAKEN, SURELY_TAKEN = 0.8, 0.7
"""A share of the first or more, surely above the second, is the turn."""
MISSING = 0.9
"""A share below is less than the turn."""
STRAIGHT = 0.1
"""A share below is none of the turn; below its negative, the turn is taken to the other side."""
OFTEN = 0.5
"""Paths that leave for each driven one that does: from this on they do not keep to the lane, wherever they go."""
NEAR, FAR = 1.1, 1.4
"""A calibration beyond the first is not 1; one that may be within it, and is not beyond the second, is near 1."""
CONTAINED = 0.5
"""Share of the samples that leave the corridor whose turn lies among the paths: above, it is there."""
BUNDLES = 0.88
"""Share of the paths' variance between two bundles: above, they are two. Six normal draws have 0.79."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasVerdict:
    """The answer for one model on one stratum, and the evidence as the rest of a sentence on the model."""

    answer: Answer
    sentence: str


def judge_bias(slope: Slope | None, corridor: CorridorSummary, *, split_by: str = "clips") -> BiasVerdict:
    """Judge one model on a stratum that was not chosen by how far the road turns.

    Args:
        slope: of the heading change, with its calibration; None where there is no turn to speak of.
        corridor: of the same samples.
        split_by: what was split for the intervals.
    """
    if slope is None:
        return BiasVerdict(answer="cannot tell", sentence="has too few samples that turn")
    taken = f"takes {slope.slope:z.2f} {range_text(slope.low, slope.high)}".rstrip() + " of the turn"
    if not math.isfinite(slope.low):
        reason = too_few(slope, split_by)
        return BiasVerdict(answer="cannot tell", sentence=f"{taken}; {reason}")
    if slope.calibration is None:
        return BiasVerdict(answer="cannot tell", sentence=f"{taken}; one path a sample does not show how much it knows")
    meant = f"calibration {_told(slope.calibration)}" + ("" if slope.r2 is None else f", R² {slope.r2:.2f}")
    answer, reason = _answer(slope, slope.calibration, corridor)
    among = corridor.contained_interval
    shown = (
        "" if among is None else f"; the turn is among its paths in {_told(among)} of the samples that leave the lane"
    )
    return BiasVerdict(answer=answer, sentence=f"{taken}{reason} ({meant}){shown}")


def _answer(slope: Slope, calibration: Interval, corridor: CorridorSummary) -> tuple[Answer, str]:
    """The answer, and the words that follow on the share that is taken.

    A calibration of less than 1 is no bias towards the straight: more is taken than is known.
    """
    is_near = 0 < calibration.low <= NEAR and 1 / NEAR <= calibration.high < FAR
    is_above, is_missing = calibration.low > NEAR, slope.high < MISSING
    is_taken = slope.slope >= TAKEN and slope.low > SURELY_TAKEN
    if slope.high < -STRAIGHT and calibration.high < 0:
        return "turns the other way", ", so its left is the road's right"
    if calibration.high < 1 / NEAR:
        return "overshoots", ", more than it knows of"
    if is_taken and (is_near or (is_above and not is_missing)):
        return "takes the turn", " and means what it predicts"
    if not is_missing:
        return "cannot tell", ", and the intervals do not decide"
    has_turn, has_bundles = _above(corridor.contained_interval, CONTAINED), _above(corridor.split, BUNDLES)
    if has_turn and has_bundles:
        return "bimodal", " on average, but its paths fall into two bundles"
    if has_turn is not False and has_bundles is not False:
        return "cannot tell", ", and whether its paths fall into two bundles is open"
    if is_above:
        return "biased", " and knows more than it takes"
    if slope.high < STRAIGHT and has_turn is False and corridor.departures is not None:
        if corridor.departures < OFTEN:
            return "biased", ", none to speak of"
        return "uncertain", ", none to speak of: its paths leave the lane as often as the road does, but elsewhere"
    if is_near:
        return "uncertain", ", as much as it knows"
    return "cannot tell", ", and the intervals do not decide whether it knows more"


def _above(interval: Interval | None, bound: float) -> bool | None:
    """True or False where the whole interval says so, else None."""
    if interval is None or interval.low <= bound <= interval.high:
        return None
    return interval.low > bound


def _told(interval: Interval) -> str:
    if not math.isfinite(interval.estimate):
        return f"above {interval.low:.2f}" if math.isfinite(interval.low) else "unknown"
    return f"{interval.estimate:z.2f} {range_text(interval.low, interval.high)}".rstrip()


def too_few(slope: Slope, split_by: str) -> str:
    """Say why a slope has no interval."""
    if (slope.clips or 0) < MIN_CLIPS:
        return f"{slope.clips} {split_by} give no interval, {MIN_CLIPS} may"
    return (
        f"the turns in {slope.clips} {split_by} weigh as much as {slope.effective_clips or 0:.1f} equal ones, which "
        f"give no interval; {MIN_EFFECTIVE:g} would"
    )
