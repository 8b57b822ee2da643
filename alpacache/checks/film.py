"""Frames of a clip's film that are looked at beside its samples: pairs in turns, and runs of successive frames.

A film is read from the key frame before what is wanted, so that a few frames cost as much as twenty: where a run may
begin anywhere, it begins with a pair and is read with it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.glance import glance, most_at_once
from alpacache.checks.glimpses import WIDTH_PX as GLIMPSE_PX
from alpacache.checks.glimpses import Glimpse, glimpse_of_run, runs_of_frames
from alpacache.checks.motion import Motion
from alpacache.checks.pictures import WIDTH_PX, Turn, turn_of_pair, turning_pairs
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource

CLIPS = 32
"""Most clips whose film is looked at, evenly spread over all."""


class Seen(NamedTuple):
    """Findings in the front camera's film of one clip."""

    turns: list[Turn]
    glimpses: list[Glimpse]


def look_at_film(source: RecordedSource, clip_id: str, motion: Motion, *, number: int, clips: int) -> Seen:
    """Look at the film of the clip with this number of `clips`; the more there are, the less is seen of each."""
    seen = Seen([], [])
    if clips > CLIPS and number * CLIPS // clips == (number - 1) * CLIPS // clips:
        return seen
    stamps = source.frame_times_us(clip_id, FRONT_CAMERA)
    if len(stamps) < 2 or (np.diff(stamps) <= 0).any():
        return seen
    pairs = turning_pairs(stamps, motion, number=number, clips=clips)
    runs = runs_of_frames(clip_id, stamps, motion, clips=min(clips, CLIPS), pairs_us=pairs)
    for batch in _batches(sorted([*pairs, *runs], key=lambda times: int(times[0])), most_at_once(source)):
        wanted = np.unique(np.concatenate(batch))
        try:
            frames = glance(source, clip_id, wanted, about_px=WIDTH_PX if len(pairs) else GLIMPSE_PX)
        except BadClipError:
            break  # unreadable pictures are refused where a sample needs them
        for times in batch:
            shown = frames[np.searchsorted(wanted, times)]
            if len(times) == 2:
                seen.turns.extend(turn_of_pair(clip_id, times, shown, motion))
            else:
                seen.glimpses.append(glimpse_of_run(clip_id, times, shown, motion))
    return seen


def _batches(groups: Sequence[NDArray[np.int64]], most: int) -> Iterator[list[NDArray[np.int64]]]:
    """Successive groups of times that are at most so many together."""
    batch: list[NDArray[np.int64]] = []
    for times in groups:
        if batch and sum(map(len, batch)) + len(times) > most:
            yield batch
            batch = []
        batch.append(times)
    if batch:
        yield batch
