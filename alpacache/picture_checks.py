"""Whether pictures are there, alike, and not mirrored against the poses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alpacache.checks import Check
from alpacache.driving.sample import FRONT_CAMERA, Sample
from alpacache.driving.strata import heading
from alpacache.errors import BadClipError
from alpacache.motion import Motion
from alpacache.picture_flow import agrees, sideways_shift_px
from alpacache.sources.source import RecordedSource

APART_US = 200_000
MIN_TURN_RADPS = 0.06
"""Slower, lane changes and noise move the picture as much as the turn."""
MIN_TURNED_RAD = 0.01
PAIRS = 96
"""Pairs of frames looked at, all clips together."""
MOST_A_CLIP = 8
MIN_MOMENTS = 10
OPPOSITE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One moment of turning at which the picture clearly moved sideways."""

    clip_id: str
    agrees: bool
    """With the heading's change."""


def turns_of_clip(source: RecordedSource, clip_id: str, motion: Motion, *, clips: int) -> list[Turn]:
    """Moments of one recording, evenly spread over its turns; fewer where the source has many clips."""
    rate = motion.turn_rate_radps
    turning = motion.times_us[motion.moving & (np.abs(rate) > MIN_TURN_RADPS)]
    stamps = source.frame_times_us(clip_id, FRONT_CAMERA)
    if len(stamps) < 2 or (np.diff(stamps) <= 0).any():
        return []
    turning = turning[(turning - APART_US > stamps[0]) & (turning + APART_US < stamps[-1])]
    count = min(len(turning), max(1, min(MOST_A_CLIP, PAIRS // max(1, clips))))
    found: list[Turn] = []
    for place in np.unique(np.linspace(0, len(turning) - 1, count).round().astype(int)) if count else ():
        pair = np.searchsorted(stamps, turning[place] + np.array([-APART_US // 2, APART_US // 2]))
        try:
            earlier, later = source.film(clip_id, FRONT_CAMERA, stamps[pair])
        except BadClipError:
            return found  # unreadable pictures are refused where a sample needs them
        turned = np.diff(np.interp(stamps[pair], motion.times_us, motion.heading_rad))[0]
        alike = agrees(sideways_shift_px(earlier, later), float(turned))
        if alike is not None and abs(turned) >= MIN_TURNED_RAD:
            found.append(Turn(clip_id=clip_id, agrees=alike))
    return found


def turns_of_sample(sample: Sample) -> list[Turn]:
    """The moment before t0, if the vehicle turns in it; for sources that have samples only."""
    if FRONT_CAMERA not in sample.cameras:
        return []
    place = sample.cameras.index(FRONT_CAMERA)
    frames, stamps = sample.frames[place], sample.frame_timestamps_us[place]
    if len(frames) < 2:
        return []
    steps = round((stamps[-1] - stamps[0]) / 1e5)
    headings = heading(sample.history_rot)
    turned = float(headings[-1] - headings[max(0, len(headings) - 1 - steps)])
    if abs(turned) < max(MIN_TURNED_RAD, MIN_TURN_RADPS * steps / 10):
        return []
    alike = agrees(sideways_shift_px(frames[0], frames[-1]), turned)
    return [] if alike is None else [Turn(clip_id=sample.ref.clip_id, agrees=alike)]


def judge_mirrored(turns: Sequence[Turn]) -> Check:
    """Whether pictures move against the turn, as they should, over all moments."""
    count, against = len(turns), sum(not turn.agrees for turn in turns)
    if count < MIN_MOMENTS:
        found = f"not enough turns to tell: {count} moments, {MIN_MOMENTS} are needed"
        return Check(name="mirrored", status="ok", found=found)
    found = f"pictures and poses turn the same way at {count - against} of {count} moments"
    if against >= OPPOSITE * count:
        remedy = (
            "Either the pictures are mirrored (signs are unreadable) or the poses are: left turns must have a positive "
            "yaw rate (y left, z up; not y right, z down). The contact sheet tells which."
        )
        return Check(name="mirrored", status="fail", found=found, remedy=remedy)
    if against > (1 - OPPOSITE) * count:
        clips = sorted({turn.clip_id for turn in turns if not turn.agrees})
        remedy = f"Look at clips such as {', '.join(clips[:3])}: mirrored, another camera, or clocks that are apart?"
        return Check(name="mirrored", status="warn", found=found, remedy=remedy)
    return Check(name="mirrored", status="ok", found=found)


def judge_pictures(sizes: Mapping[tuple[int, int], Sequence[str]], blank: Sequence[str]) -> Check:
    """Sizes (width, height) with the samples that have them, and samples with a picture of one colour."""
    listed = sorted(sizes, key=lambda size: -len(sizes[size]))
    found = ", ".join(f"{width} x {height}" for width, height in listed[:4])
    if blank:
        found += f"; {len(blank)} samples show one colour only, such as {blank[0]}"
        remedy = "Open such a frame: black or grey frames teach the model that the picture says nothing."
        return Check(name="pictures", status="warn", found=found, remedy=remedy)
    if len(listed) > 1:
        remedy = (
            f"Different cameras in one set, such as {sizes[listed[-1]][0]}? "
            "Samples differ in their number of tokens; split the set or leave them out."
        )
        return Check(name="pictures", status="warn", found=found, remedy=remedy)
    return Check(name="pictures", status="ok", found=found or "no usable sample")
