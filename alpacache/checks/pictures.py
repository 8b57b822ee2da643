"""Checks of pictures: that they show something, have one size, and are not mirrored against the poses."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.glance import glance
from alpacache.checks.motion import Motion
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Floats, Sample
from alpacache.driving.strata import heading
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource

Picture: TypeAlias = NDArray[np.uint8]
WIDTH_PX = 256
"""Width at which pictures are matched."""
BLOCK_PX = 48
REACH_PX = 36
"""Furthest shift of a block that is looked for."""
ROWS = (0.25, 0.62)
"""Share of the height around the horizon: the far field, above road and bonnet."""
PLACES = (0.12, 0.24, 0.36)
"""Distances of the blocks' middles from the picture's middle, as a share of its width."""
MIN_LIKENESS = 0.6
MIN_CONTRAST = 2.0
MIN_SHIFT_PX = 0.75
ONE_COLOUR = 1.0
"""Standard deviation below which a picture shows one colour only."""


def sideways_shift_px(earlier: Picture, later: Picture) -> float | None:
    """Pixels, of 256 across, by which the far field of `[3, H, W]` pictures moved right; None if that is not clear."""
    return shift_px(far_field(earlier), far_field(later))


def shift_px(before: Floats, after: Floats, *, quick: bool = False) -> float | None:
    """Pixels by which a far field moved right; None if that is not clear. `quick`: one band of rows, not three."""
    middle, shifts = len(before) // 2, []
    for rows in (slice(None),) if quick else (slice(middle), slice(middle, None), slice(None)):
        for place in PLACES:
            left, right = (_block_shift(before[rows], after[rows], 0.5 + side * place) for side in (-1, 1))
            if left is not None and right is not None:
                shifts.append((left + right) / 2)
    return float(np.median(shifts)) if len(shifts) >= 2 else None


def far_field(picture: Picture) -> Floats:
    """Rows around the horizon of a `[3, H, W]` picture: grey, 256 across, a little blurred."""
    small = _small(picture)
    low, high = (int(share * len(small)) for share in ROWS)
    return small[low:high]


def _small(picture: Picture) -> Floats:
    """Grey `[h, 256]`, a little blurred."""
    from PIL import Image, ImageFilter

    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).convert("L")
    height = max(16, round(image.height * WIDTH_PX / image.width))
    small = image.resize((WIDTH_PX, height), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(1))
    return np.asarray(small, dtype=np.float64)


def _block_shift(before: Floats, after: Floats, place: float) -> float | None:
    """Shift of the block around the column `place` of `before`, by normalised correlation; None if it is not clear."""
    left = round(place * WIDTH_PX) - BLOCK_PX // 2
    start, end = max(0, left - REACH_PX), min(WIDTH_PX, left + BLOCK_PX + REACH_PX)
    block = before[:, left : left + BLOCK_PX]
    block = block - block.mean(axis=1, keepdims=True)  # rows differ from sky to road; a shift shows in columns only
    if block.std() < MIN_CONTRAST:
        return None
    views = np.lib.stride_tricks.sliding_window_view(after[:, start:end], BLOCK_PX, axis=1)
    sums, squares = (np.cumsum(np.pad(part, ((0, 0), (1, 0))), axis=1) for part in (after, after**2))
    sums, squares = (
        part[:, start + BLOCK_PX : end + 1] - part[:, start : end + 1 - BLOCK_PX] for part in (sums, squares)
    )
    norms = np.linalg.norm(block) * np.sqrt(np.maximum(0.0, (squares - sums**2 / BLOCK_PX).sum(axis=0)))
    likeness = np.einsum("rc,rsc->s", block, views) / np.maximum(1e-9, norms)  # the block's rows have mean 0
    best = int(np.argmax(likeness))
    if likeness[best] < MIN_LIKENESS or best in (0, len(likeness) - 1):
        return None
    fine = (likeness[best - 1] - likeness[best + 1]) / 2
    fine /= likeness[best - 1] - 2 * likeness[best] + likeness[best + 1] - 1e-12
    return start + best + float(fine) - left


APART_US = 200_000
MIN_TURN_RADPS = 0.06
"""Turn rate below which lane changes and noise move the picture as much as the turn does."""
MIN_TURNED_RAD = 0.01
PAIRS = 96
"""Most pairs of frames to look at, all clips together."""
MOST_A_CLIP = 8
CLIPS = 48
"""Most clips of which pairs are looked at."""
MIN_MOMENTS = 10
OPPOSITE = 0.8


def one_of(number: int, clips: int, *, most: int) -> bool:
    """Tell whether the clip of this number is one of at most `most`, evenly spread over all."""
    return clips <= most or number * most // clips != (number - 1) * most // clips


class Turn(NamedTuple):
    """One moment of turning at which the picture clearly moved sideways."""

    clip_id: str
    agrees: bool
    """Tell whether the picture moved as the change of heading makes it move."""


def turns_of_clip(source: RecordedSource, clip_id: str, motion: Motion, *, number: int, clips: int) -> list[Turn]:
    """Moments of one recording, evenly spread over its turns; fewer if the source has many clips."""
    if not one_of(number, clips, most=CLIPS):
        return []
    turning = motion.times_us[motion.moving & (np.abs(motion.turn_rate_radps) > MIN_TURN_RADPS)]
    stamps = source.frame_times_us(clip_id, FRONT_CAMERA)
    if len(stamps) < 2 or (np.diff(stamps) <= 0).any():
        return []
    turning = turning[(turning - APART_US > stamps[0]) & (turning + APART_US < stamps[-1])]
    count = min(len(turning), max(1, min(MOST_A_CLIP, PAIRS // max(1, clips))))
    turns: list[Turn] = []
    for place in np.unique(np.linspace(0, len(turning) - 1, count).round().astype(int)):
        pair = np.searchsorted(stamps, turning[place] + np.array([-APART_US // 2, APART_US // 2]))
        try:
            earlier, later = glance(source, clip_id, stamps[pair], about_px=WIDTH_PX)
        except BadClipError:
            return turns  # unreadable pictures are refused where a sample needs them
        turned = np.diff(np.interp(stamps[pair], motion.times_us, motion.heading_rad))[0]
        if abs(turned) >= MIN_TURNED_RAD:
            turns += _turn(clip_id, earlier, later, turned)
    return turns


def turns_of_sample(sample: Sample) -> list[Turn]:
    """The moment before t0, if the vehicle turns in it; for sources that have samples only."""
    if FRONT_CAMERA not in sample.cameras:
        return []
    place = sample.cameras.index(FRONT_CAMERA)
    frames, stamps = sample.frames[place], sample.frame_timestamps_us[place]
    steps = round((stamps[-1] - stamps[0]) / 1e5)
    headings = heading(sample.history_rot)
    turned = float(headings[-1] - headings[max(0, len(headings) - 1 - steps)])
    if abs(turned) < max(MIN_TURNED_RAD, MIN_TURN_RADPS * steps / 10):
        return []
    return _turn(sample.ref.clip_id, frames[0], frames[-1], turned)


def _turn(clip_id: str, earlier: Picture, later: Picture, turned_rad: float) -> list[Turn]:
    """This moment, unless it is not clear whether the picture moved; `turned_rad`: change of heading, left positive."""
    shift_px = sideways_shift_px(earlier, later)
    if shift_px is None or abs(shift_px) < MIN_SHIFT_PX:
        return []
    return [Turn(clip_id, bool((shift_px > 0) == (turned_rad > 0)))]


def judge_mirrored(turns: Sequence[Turn]) -> Check:
    """Check that pictures move as the poses turn, over all moments."""
    count, against = len(turns), sum(not turn.agrees for turn in turns)
    if count < MIN_MOMENTS:
        return not_judged("mirrored", f"not enough turns to tell: {count} moments, {MIN_MOMENTS} are needed")
    finding = f"pictures and poses turn the same way at {count - against} of {count} moments"
    if against >= OPPOSITE * count:
        remedy = (
            "Either the pictures are mirrored (signs are unreadable) or the poses are: left turns must have a positive "
            "yaw rate (y left, z up; not y right, z down). The contact sheet tells which."
        )
        return verdict("mirrored", finding, fail=remedy)
    clips = sorted({turn.clip_id for turn in turns if not turn.agrees})
    remedy = f"Look at clips such as {', '.join(clips[:3])}: mirrored, another camera, or clocks that are apart?"
    return verdict("mirrored", finding, warn=remedy if against > (1 - OPPOSITE) * count else "")


def judge_pictures(sizes: Mapping[tuple[int, int], Sequence[str]], blank: Mapping[str, int], seen: int) -> Check:
    """Check that all samples have one size and no picture has one colour; `sizes`: (width, height) -> samples.

    `blank`: clip -> how many of its pictures show one colour only, of `seen` pictures of all clips.
    """
    if not sizes:
        return not_judged("pictures", "no usable sample")
    listed = sorted(sizes, key=lambda size: -len(sizes[size]))
    finding = ", ".join(f"{width} x {height}" for width, height in listed[:4])
    remedy = ""
    count = sum(blank.values())
    if count:
        example = max(blank, key=lambda clip_id: blank[clip_id])
        finding += (
            f"; {count} of {seen} pictures ({100 * count / seen:.0f} %) show one colour only, such as in {example}"
        )
        remedy = "Open such a frame: black or grey frames teach the model that the picture says nothing."
    elif len(listed) > 1:
        remedy = (
            f"Different cameras in one set, such as {sizes[listed[-1]][0]}? "
            "Samples differ in their number of tokens; split the set or leave them out."
        )
    return verdict("pictures", finding, warn=remedy)
