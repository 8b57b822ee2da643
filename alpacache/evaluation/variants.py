"""Control runs of one model from the same noise: with another clip's prefix, with none, or in fewer flow steps.

A model that does not look at what it is shown does as well with the pictures of another clip. Its loss tells first:
paths that are wrong either way may be as wrong as before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from alpacache.driving.sample import FUTURE_S, Floats
from alpacache.evaluation.judging import VARIANT_KEYS, Variant
from alpacache.metrics.bias import Departure, Slope, bias_slope
from alpacache.metrics.bootstrap import MIN_CLIPS, Interval, mean_difference, mean_rise

Answer: TypeAlias = Literal[
    "looks", "looks a little", "hardly looks", "needs it", "needs it a little", "hardly needs it", "cannot tell"
]

HARDLY, SURELY_HARDLY = 0.1, 0.2
"""A rise of the loss below the first, surely below the second, is hardly one."""
WELL = 0.5
"""A rise of this or more, surely above `HARDLY`, is much."""
_WITHOUT = {"shuffled": "with another clip's pictures and history", "none": "with no prefix at all"}
_ANSWERS: Mapping[str, tuple[Answer, Answer, Answer]] = {
    "shuffled": ("hardly looks", "looks a little", "looks"),
    "none": ("hardly needs it", "needs it a little", "needs it"),
}
"""Words for a rise that is hardly one, one, and much. No model was trained without a prefix: that its loss rises then
does not show that it looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSummary:
    """One model deprived of what it should look at, compared with the same samples as they are."""

    samples: int
    honest_loss: float
    loss: float
    rise: Interval | None
    """Loss over honest loss, less 1."""
    honest_min_ade: float
    min_ade: float
    honest_slope: Slope | None
    """Slope of the heading change at 6.4 s."""
    slope: Slope | None
    answer: Answer
    sentence: str
    """The rest of a sentence that begins with `its loss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSummary:
    """One model with one number of flow steps."""

    metrics: Mapping[str, float]
    """Means of `VARIANT_KEYS`, metres."""
    slope: Slope | None
    """Slope of the heading change at 6.4 s."""
    change: Interval | None
    """`min_ade` less that with the first number of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The samples that a summary is of; sequences `[N]`."""

    truth: Sequence[Departure]
    units: Sequence[str]
    """Units that are resampled for intervals."""
    weights: Floats
    split_by: str
    """Name of the units: `clips`, or blocks of time."""
    seed: int

    def at(self, rows: Sequence[int]) -> "Judged":
        """Some of the samples, their weights of mean 1."""
        truth, units, weights = [self.truth[row] for row in rows], [self.units[row] for row in rows], self.weights[rows]
        scaled = weights / weights.mean() if weights.size else weights
        return replace(self, truth=truth, units=units, weights=scaled)

    def slope(self, departures: Sequence[Departure]) -> Slope | None:
        """Slopes of predicted departures `[N]`, of the heading change at 6.4 s."""
        return bias_slope(
            self.truth,
            departures,
            self.units,
            quantity="heading",
            horizon_s=FUTURE_S,
            weights=self.weights,
            seed=self.seed,
        )

    def mean(self, values: Sequence[float]) -> float:
        """Mean of `[N]` values."""
        return float(np.average(values, weights=self.weights))


def summarise_control(
    control: str, honest: Sequence[Variant], other: Sequence[Variant], judged: Judged
) -> ControlSummary:
    """Compare one model's results for N samples, at least one, with those of a control; all have a loss."""
    first, second = ([_loss(one) for one in each] for each in (honest, other))
    rise = mean_rise(first, second, judged.units, weights=judged.weights, seed=judged.seed)
    answer, sentence = _answer(control, rise, judged.split_by)
    ades = [judged.mean([one.metrics["min_ade"] for one in each]) for each in (honest, other)]
    slopes = [judged.slope([one.departure for one in each]) for each in (honest, other)]
    return ControlSummary(
        samples=len(honest),
        honest_loss=judged.mean(first),
        loss=judged.mean(second),
        rise=rise,
        honest_min_ade=ades[0],
        min_ade=ades[1],
        honest_slope=slopes[0],
        slope=slopes[1],
        answer=answer,
        sentence=sentence,
    )


def summarise_flow(by_steps: Mapping[int, Sequence[Variant]], judged: Judged) -> dict[int, FlowSummary]:
    """Summarise one model's results for N samples by number of flow steps, the first of which is compared with."""
    errors = {
        steps: {key: [one.metrics[key] for one in each] for key in VARIANT_KEYS} for steps, each in by_steps.items()
    }
    first = next(iter(errors.values()))["min_ade"]
    return {
        steps: FlowSummary(
            metrics={key: judged.mean(errors[steps][key]) for key in VARIANT_KEYS},
            slope=judged.slope([one.departure for one in each]),
            change=mean_difference(
                first, errors[steps]["min_ade"], judged.units, weights=judged.weights, seed=judged.seed
            ),
        )
        for steps, each in by_steps.items()
    }


def _loss(variant: Variant) -> float:
    assert variant.loss is not None
    return variant.loss


def _answer(control: str, rise: Interval | None, split_by: str) -> tuple[Answer, str]:
    """The answer, and the words on the loss that it rests on."""
    if rise is None or not math.isfinite(rise.estimate):
        return "cannot tell", "is nothing that could rise"
    told = f"{'rises' if rise.estimate >= 0 else 'falls'} by {_percent(abs(rise.estimate))}"
    if not (math.isfinite(rise.low) and math.isfinite(rise.high)):
        why = f"{rise.clips} {split_by} give no interval, {MIN_CLIPS} may"
        return "cannot tell", f"{told} {_WITHOUT[control]}; {why}"
    told += f" [{_percent(rise.low)}, {_percent(rise.high)}] {_WITHOUT[control]}"
    hardly, little, well = _ANSWERS[control]
    if rise.estimate < HARDLY and rise.high < SURELY_HARDLY:
        return hardly, f"{told}: it {hardly}"
    if rise.estimate >= WELL and rise.low > HARDLY:
        return well, f"{told}: it {well}"
    if rise.low > 0:
        return little, f"{told}: it {little}"
    return "cannot tell", f"{told}: the interval does not decide"


def _percent(share: float) -> str:
    return f"{100 * share:z.0f} %"
