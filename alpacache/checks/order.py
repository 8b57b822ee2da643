"""Order of pictures: each follows the one before, and time runs forwards.

Whoever lists names as text gets frame 10 before frame 2, and numbers the pictures in that order. All of them are there
and sound, most even follow the one before; at a few places they jump.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.flow import BACKWARDS, MIN_STEPS, Flow
from alpacache.checks.glance import glance
from alpacache.checks.glimpses import WIDTH_PX, Glimpse, small_grey
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource

ROWS = (0.2, 0.7)
"""Share of the height in which pictures are compared: what is far moves little."""
CELL_PX = 4
SMOOTH = 5
REACH = 4
"""Cells by which a turn may move the picture sideways."""
MIN_CONTRAST = 2.0
LIKE = 0.5
"""Likeness below which two pictures do not follow each other: 0.1 s apart hardly any is below 0.7."""
SOON_US = 150_000
MIN_JUMPS, JUMP_SHARE = 3, 0.08
PLACES = 8
"""Places at which an order of names as text is looked for."""
BETTER = 0.1
"""Least gain in likeness that counts; a vehicle that stands, or passes a place again, shows none."""


def likenesses(glimpse: Glimpse) -> Floats:
    """Likeness of each picture to the next one; NaN where nothing is to be seen, or where time has passed."""
    fields = [_far(picture) for picture in glimpse.pictures]
    soon = np.diff(glimpse.stamps_us) <= SOON_US
    return np.array([_likeness(*pair) if near else np.nan for pair, near in zip(pairwise(fields), soon, strict=True)])


def clips_that_jump(glimpses: Sequence[Glimpse]) -> tuple[list[str], int]:
    """Clip of each picture that does not follow the one before, and how many pictures could be told."""
    each = [(glimpse.clip_id, likenesses(glimpse)) for glimpse in glimpses]
    with np.errstate(invalid="ignore"):
        jumps = [clip_id for clip_id, likeness in each for _ in range(int((likeness < LIKE).sum()))]
    return jumps, sum(int(np.isfinite(likeness).sum()) for _, likeness in each)


def names_as_text(source: RecordedSource, clip_id: str) -> bool:
    """Tell whether a clip's pictures follow each other as if numbered in the order of their former numbers as text."""
    try:
        stamps = source.frame_times_us(clip_id, FRONT_CAMERA)
        return any(_fits(source, clip_id, stamps, first=first) for first in (0, 1))
    except BadClipError:
        return False


def _fits(source: RecordedSource, clip_id: str, stamps: NDArray[np.int64], *, first: int) -> bool:
    """The same if numbers began at `first`."""
    former = np.array(sorted(range(first, first + len(stamps)), key=str)) - first
    place_of = np.argsort(former)
    breaks = np.flatnonzero((np.diff(former) != 1) & (former[:-1] + 1 < len(former)))
    if len(breaks) < PLACES:
        return False
    chosen = breaks[np.linspace(0, len(breaks) - 1, PLACES).round().astype(int)]
    gained = []
    for place in chosen:
        shown = np.array([place, place + 1, place_of[former[place] + 1]])
        pictures = glance(source, clip_id, stamps[shown], about_px=WIDTH_PX)
        here, following, expected = (_far(small_grey(picture)) for picture in pictures)
        gained.append(_likeness(here, expected) - _likeness(here, following))
    better, worse = (sum(sign * gain > BETTER for gain in gained) for sign in (1, -1))
    return better >= PLACES / 2 and worse <= PLACES / 8


def judge_order(flow: Flow | None, jumps: Sequence[str], pictures: int, *, as_text: str | None) -> Check:
    """Judge the direction of time, and whether pictures follow each other; `as_text`: a clip in the order of text."""
    if as_text is not None:
        finding = f"pictures are in the order of their former names as text, 10 before 2, such as in {as_text}"
        remedy = "Sort pictures by their numbers, not as text, before they are numbered or written as a film."
        return verdict("order", finding, fail=remedy)
    share = len(jumps) / max(1, pictures)
    finding = f"{len(jumps)} of {pictures} pictures ({100 * share:.0f} %) do not follow the one before"
    if len(jumps) >= MIN_JUMPS and share >= JUMP_SHARE:
        remedy = f"Are pictures out of order, or of several drives, such as in {max(set(jumps), key=jumps.count)}?"
        return verdict("order", finding, warn=remedy)
    if flow is not None and flow.steps >= MIN_STEPS:
        away = f"the road goes away in place of coming nearer at {flow.backwards} of {flow.steps} moments"
        away += f", such as in {flow.clips_against[0]}" if flow.clips_against else ""
        remedy = "Are pictures in reverse order of time, or does the camera look back? Look at the contact sheet."
        if flow.clips_against or flow.backwards > (1 - BACKWARDS) * flow.steps:
            return verdict("order", away, **{"fail" if flow.backwards >= BACKWARDS * flow.steps else "warn": remedy})
    if pictures < MIN_STEPS:
        return not_judged("order", f"only {pictures} pictures 0.1 s after another in which anything is seen")
    if flow is not None and flow.steps >= MIN_STEPS:
        finding += f"; the road comes nearer at {flow.steps - flow.backwards} of {flow.steps} moments"
    return verdict("order", finding)


def _far(picture: NDArray[np.uint8]) -> Floats:
    """Coarse picture of the band around the horizon, high-pass filtered."""
    from scipy.ndimage import uniform_filter

    height, width = (length // CELL_PX for length in picture.shape)
    if not height or not width:
        return np.zeros((0, 0))
    cells = picture[: height * CELL_PX, : width * CELL_PX].reshape(height, CELL_PX, width, CELL_PX).mean(axis=(1, 3))
    cells -= uniform_filter(cells, 2 * SMOOTH + 1, mode="nearest")
    low, high = (int(share * height) for share in ROWS)
    return np.asarray(cells[low:high])


def _likeness(one: Floats, other: Floats) -> float:
    """Correlation of two fields, shifted sideways as fits best; NaN if either is even."""
    if one.shape != other.shape or not one.size or min(one.std(), other.std()) < MIN_CONTRAST:
        return float("nan")
    width, best = one.shape[1], -1.0
    reach = min(REACH, width // 4)
    for shift in range(-reach, reach + 1):
        left, right = one[:, max(0, shift) : width + min(0, shift)], other[:, max(0, -shift) : width - max(0, shift)]
        left, right = left - left.mean(), right - right.mean()
        best = max(best, float((left * right).sum() / np.sqrt((left**2).sum() * (right**2).sum() + 1e-9)))
    return best
