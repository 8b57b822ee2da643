"""Pictures that repeat the one before while the vehicle drives: a camera that froze, or frames that were written twice.

Every other check takes such a recording for sound, and a model learns that the world stands still while it drives.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.glimpses import MOVED_M, Glimpse
from alpacache.driving.sample import Floats

SAME = 0.008
"""Share of changed pixels below which two pictures are one. Repeats that went through H.264 once more have up to 0.005
at usual rates, an empty motorway 0.05 from one metre to the next."""
MIN_SHARE = 0.02
"""Share of repeats from which on they are no accident."""
MIN_CONTRAST = 5.0
RUN_MIN, RUN_SHARE = 3, 0.04
"""The same for frames that were read beside the samples: they are few, and in step with nothing."""


class Moment(NamedTuple):
    """Successive pictures of one camera while the vehicle drives."""

    clip_id: str
    pairs: int
    repeats: int
    is_run: bool
    """True for frames that follow each other in the film, False for those of a sample."""


def moments_of(glimpse: Glimpse) -> list[Moment]:
    """The moment that a glimpse shows; none if its pictures are one frame, as their times say, or even."""
    counts = (np.abs(np.diff(glimpse.way_m)) >= MOVED_M) & (np.diff(glimpse.stamps_us) > 0)
    if not counts.any():
        return []
    pictures = glimpse.pictures.astype(np.float64)
    counted = (pair for pair, count in zip(pairwise(pictures), counts, strict=True) if count)
    pairs = [pair for pair in counted if pair[0].std() >= MIN_CONTRAST]
    repeats = sum(_is_same(*pair) for pair in pairs)
    return [Moment(glimpse.clip_id, len(pairs), repeats, glimpse.is_run)] if pairs else []


def judge_repeats(moments: Sequence[Moment]) -> Check:
    """Judge whether pictures differ from the one before, over all moments."""
    pairs, repeats = (sum(getattr(moment, name) for moment in moments) for name in ("pairs", "repeats"))
    if not pairs:
        return not_judged("repeats", f"no two pictures between which the vehicle moved {MOVED_M} m")
    finding = f"{repeats} of {pairs} pictures ({100 * repeats / pairs:.0f} %) repeat the one before"
    if repeats < max(2, MIN_SHARE * pairs):
        runs = [moment for moment in moments if moment.is_run]
        in_step = len(runs) < len(moments) and sum(moment.repeats for moment in runs) >= RUN_MIN
        if in_step and sum(moment.repeats for moment in runs) >= RUN_SHARE * sum(moment.pairs for moment in runs):
            return judge_repeats(runs)  # samples may be in step with what is there twice
        return verdict("repeats", finding)
    frozen = [moment for moment in moments if moment.pairs > 1 and moment.repeats == moment.pairs]
    doubled = [moment for moment in moments if 0 < moment.repeats < moment.pairs]
    if sum(moment.repeats for moment in frozen) > repeats / 2:
        finding += f"; at {len(frozen)} of {len(moments)} moments ({100 * len(frozen) / len(moments):.0f} %) all do"
        example = frozen[0].clip_id
        remedy = f"The camera stood still while the vehicle drove, such as in {example}: cut these parts out."
        return verdict("repeats", finding, warn=remedy)
    example = (doubled or frozen or [moment for moment in moments if moment.repeats])[0].clip_id
    remedy = f"Frames are there twice, such as in {example}: keep one of each, with the time at which it was taken."
    return verdict("repeats", finding, warn=remedy)


def _is_same(one: Floats, other: Floats) -> bool:
    changed = np.abs(one - other) > np.clip(0.15 * one.std(), 3, 8)
    return float(changed.mean()) < SAME
