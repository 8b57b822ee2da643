"""Stretches: consecutive samples of one clip, which one worker reads in one pass.

Here alone samples are put into the order in which they are read. What is stored of a sample depends on none of it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from alpacache.driving.sample import SampleRef
from alpacache.sources.source import OnePassSource, Source

LONGEST = 64
"""Moments of a stretch: beginning one costs as much as a sample alone, and at the end of a run some workers wait."""

_PIECES = 4
"""Least number of pieces of a worker's share, if there are enough samples: so much do shares differ in size."""


def stretches(refs: Sequence[SampleRef], source: Source, *, workers: int) -> list[list[SampleRef]]:
    """Samples cut into stretches, clips in the order of their first samples, each clip in the order of time.

    There is one for each of so many workers, if there are enough moments. A source that reads each sample for itself
    keeps its own order: a stretch then is one moment with its views.
    """
    if not isinstance(source, OnePassSource):
        return list(_moments(refs))
    clips: dict[str, list[SampleRef]] = {}
    for ref in refs:
        clips.setdefault(ref.clip_id, []).append(ref)
    by_clip = [list(_moments(sorted(clip, key=lambda ref: (ref.t0_us, ref.view)))) for clip in clips.values()]
    longest = min(LONGEST, math.ceil(sum(map(len, by_clip)) / workers))
    cut = (part for moments in by_clip for part in _parts(moments, math.ceil(len(moments) / longest)))
    return [[ref for moment in part for ref in moment] for part in cut]


def share_of(refs: Sequence[SampleRef], source: Source, worker: int, workers: int) -> list[SampleRef]:
    """One worker's part of a selection, in stretches: each is dealt to the worker that has the fewest samples so far.

    It depends on the selection alone. Of clips with one moment each, every worker has each `workers`th.
    """
    has = [0] * workers
    mine: list[SampleRef] = []
    for stretch in stretches(refs, source, workers=_PIECES * workers):
        least = has.index(min(has))
        has[least] += len(stretch)
        mine += stretch if least == worker else ()
    return mine


def _moments(refs: Sequence[SampleRef]) -> Iterator[list[SampleRef]]:
    """Neighbours that are views of one moment."""
    return (list(views) for _, views in groupby(refs, key=lambda ref: (ref.clip_id, ref.t0_us)))


def _parts(moments: Sequence[list[SampleRef]], count: int) -> list[Sequence[list[SampleRef]]]:
    """Cut a sequence into so many parts, the first of them longer by one where they cannot be equal."""
    shortest, longer = divmod(len(moments), count)
    ends = [number * shortest + min(number, longer) for number in range(count + 1)]
    return [moments[start:end] for start, end in pairwise(ends)]
