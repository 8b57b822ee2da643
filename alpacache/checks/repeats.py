"""Pictures that repeat the one before while the vehicle drives: a camera that froze, or frames that were written twice.

Every other check takes such a recording for sound, and a model learns that the world stands still while it drives.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.motion import Motion
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Floats, Sample
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource

Picture: TypeAlias = NDArray[np.uint8]
MOVED_M = 0.3
"""Least way between two pictures that must differ: 3 m/s at 10 Hz."""
SAME = 0.008
"""Share of changed pixels below which two pictures are one. Repeats that went through H.264 once more have up to 0.005
at usual rates, an empty motorway 0.05 from one metre to the next."""
MIN_SHARE = 0.02
"""Share of repeats from which on they are no accident."""
WIDTH_PX = 160
MIN_CONTRAST = 5.0
MOMENTS, MOST_A_CLIP = 48, 8
"""Most moments to read beside the samples, of all clips together and of one."""


class Moment(NamedTuple):
    """Successive pictures of one camera while the vehicle drives."""

    clip_id: str
    pairs: int
    repeats: int


def repeats_of_sample(sample: Sample) -> list[Moment]:
    """One moment a camera; pictures that are one frame, as its times say, are no pair."""
    count = sample.frames.shape[1]
    moved = np.linalg.norm(np.diff(sample.history_xyz[-count:], axis=0), axis=1) >= MOVED_M
    moments = []
    for pictures, stamps in zip(sample.frames, sample.frame_timestamps_us, strict=True):
        moments += _moment(sample.ref.clip_id, list(pictures), moved & (np.diff(stamps) > 0))
    return moments


def repeats_of_clip(source: RecordedSource, clip_id: str, motion: Motion, *, clips: int) -> list[Moment]:
    """Three successive frames of the front camera at some moments of a drive; none if the source has many clips.

    Samples show every third frame or so: of frames that come twice they see nothing, and of a few samples one cannot
    tell.
    """
    stamps = source.frame_times_us(clip_id, FRONT_CAMERA)
    if len(stamps) < 3 or (np.diff(stamps) <= 0).any():
        return []
    driving = motion.times_us[motion.speed_mps * float(np.median(np.diff(stamps))) / 1e6 >= MOVED_M]
    driving = driving[(driving >= stamps[0]) & (driving < stamps[-3])]
    count = min(len(driving), MOST_A_CLIP, MOMENTS // max(1, clips))
    moments: list[Moment] = []
    for place in np.linspace(0, len(driving) - 1, count).round().astype(int):
        first = int(np.searchsorted(stamps, driving[place]))
        try:
            pictures = list(source.film(clip_id, FRONT_CAMERA, stamps[first : first + 3]))
        except BadClipError:
            return moments  # unreadable pictures are refused where a sample needs them
        moments += _moment(clip_id, pictures, np.ones(2, np.bool_))
    return moments


def judge_repeats(moments: Sequence[Moment]) -> Check:
    """Judge whether pictures differ from the one before, over all moments."""
    pairs, repeats = (sum(getattr(moment, name) for moment in moments) for name in ("pairs", "repeats"))
    if not pairs:
        return not_judged("repeats", f"no two pictures between which the vehicle moved {MOVED_M} m")
    finding = f"{repeats} of {pairs} pictures ({100 * repeats / pairs:.0f} %) repeat the one before"
    if repeats < max(2, MIN_SHARE * pairs):
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


def _moment(clip_id: str, pictures: Sequence[Picture], counts: NDArray[np.bool_]) -> list[Moment]:
    """Compare successive pictures `[3, H, W]` in the pairs that count; even pictures say nothing."""
    if not counts.any():
        return []
    small = [_small(picture) for picture in pictures]
    pairs = [
        pair for pair, count in zip(pairwise(small), counts, strict=True) if count and pair[0].std() >= MIN_CONTRAST
    ]
    return [Moment(clip_id, len(pairs), sum(_is_same(*pair) for pair in pairs))] if pairs else []


def _is_same(one: Floats, other: Floats) -> bool:
    changed = np.abs(one - other) > np.clip(0.15 * one.std(), 3, 8)
    return float(changed.mean()) < SAME


def _small(picture: Picture) -> Floats:
    """Grey, about 160 across."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    return np.asarray(image.reduce(max(1, round(image.width / WIDTH_PX))).convert("L"), dtype=np.float64)
