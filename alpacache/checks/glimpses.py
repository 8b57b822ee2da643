"""Glimpses: a few successive pictures of one camera, small and grey, with the way between them.

Samples hold some, four pictures that are 0.1 s apart; others are read from the film beside them, out of step with the
samples and frame by frame.
"""

import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.motion import Motion
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import HISTORY_STEPS, STEP_US, Floats, Sample
from alpacache.driving.strata import heading

Picture: TypeAlias = NDArray[np.uint8]
WIDTH_PX = 160
MOVED_M = 0.3
"""Least way between two pictures that must differ: 3 m/s at 10 Hz."""
RUNS, FRAMES, LONG = 8, 96, 12
"""Most runs of successive frames of all clips together, most frames of them, and of one run."""
SHORT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """`n` successive pictures of one camera."""

    clip_id: str
    pictures: NDArray[np.uint8]
    """`[n, h, w]` grey, about 160 across."""
    stamps_us: NDArray[np.int64]
    """`[n]`; equal ones are one frame."""
    way_m: Floats
    """`[n]` way along the vehicle's x axis, from any beginning."""
    heading_rad: Floats
    """`[n]`, left positive."""
    camera: str
    is_run: bool
    """True for frames that follow each other in the film, False for those of a sample."""
    newest: NDArray[np.uint8]
    """`[h, w, 3]` the last picture in its colours."""


def glimpses_of_sample(sample: Sample) -> list[Glimpse]:
    """One for each camera."""
    moved = np.diff(sample.history_xyz.astype(np.float64), axis=0)
    way = np.concatenate([[0.0], np.cumsum(np.einsum("ni,ni->n", moved, sample.history_rot[1:, :, 0]))])
    times, headings = sample.ref.t0_us + STEP_US * np.arange(1 - HISTORY_STEPS, 1), heading(sample.history_rot)
    views = zip(sample.cameras, sample.frames, sample.frame_timestamps_us, strict=True)
    return [
        _glimpse(sample.ref.clip_id, camera, frames, stamps, times, way, headings) for camera, frames, stamps in views
    ]


def runs_of_frames(
    clip_id: str,
    stamps_us: NDArray[np.int64],
    motion: Motion,
    *,
    clips: int,
    pairs_us: NDArray[np.int64],
) -> list[NDArray[np.int64]]:
    """Times of the runs of frames to look at, evenly spread over the drive; fewer and shorter ones of many `clips`.

    Of frames that come twice, samples may see nothing, as they show every third frame or so, in step with t0. Runs of
    many clips are as short as `pairs_us` `[N, 2]`, which are read anyway, and begin with one of these.
    """
    if len(stamps_us) < SHORT:
        return []
    runs = max(1, RUNS // clips)
    length = min(len(stamps_us), LONG, max(SHORT, FRAMES // (runs * clips)))
    latest = len(stamps_us) - length
    driving = motion.times_us[np.abs(_speeds(motion)) * float(np.median(np.diff(stamps_us))) / 1e6 >= MOVED_M]
    driving = driving[(driving >= stamps_us[0]) & (driving < stamps_us[latest])] if latest else driving[:1]
    # Out of step with anything: at a place of its own in each clip.
    offset = zlib.crc32(clip_id.encode()) / 2**32
    if length == SHORT and len(pairs_us):
        firsts = np.searchsorted(stamps_us, pairs_us[[int(offset * len(pairs_us))], 0])
    else:
        places = np.unique(((np.arange(runs) + offset) / runs * len(driving)).astype(int))
        firsts = np.searchsorted(stamps_us, driving[places] if len(driving) else driving)
    return [stamps_us[first : first + length] for first in np.minimum(firsts, latest)]


def glimpse_of_run(clip_id: str, stamps_us: NDArray[np.int64], frames: NDArray[np.uint8], motion: Motion) -> Glimpse:
    """The glimpse of successive `frames` `[n, 3, H, W]`."""
    way_m = np.concatenate([[0.0], np.cumsum(_speeds(motion)[1:] * np.diff(motion.times_us) / 1e6)])
    known = (motion.times_us, way_m, motion.heading_rad)
    return _glimpse(clip_id, FRONT_CAMERA, frames, stamps_us, *known, is_run=True)


def _glimpse(
    clip_id: str,
    camera: str,
    frames: NDArray[np.uint8],
    stamps_us: NDArray[np.int64],
    times_us: NDArray[np.int64],
    way_m: Floats,
    heading_rad: Floats,
    *,
    is_run: bool = False,
) -> Glimpse:
    """A glimpse of `frames` `[n, 3, H, W]`; way and heading are given at `times_us`."""
    images = [_small(frame) for frame in frames]
    return Glimpse(
        clip_id=clip_id,
        pictures=np.stack([np.asarray(image.convert("L")) for image in images]),
        stamps_us=stamps_us,
        way_m=np.interp(stamps_us, times_us, way_m),
        heading_rad=np.interp(stamps_us, times_us, heading_rad),
        camera=camera,
        is_run=is_run,
        newest=np.asarray(images[-1]),
    )


def small_grey(picture: Picture) -> Picture:
    """`[3, H, W]` as grey, 160 across."""
    return np.asarray(_small(picture).convert("L"))


def _small(picture: Picture) -> Any:
    """The Pillow image of `[3, H, W]`, 160 across or less."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    size = (WIDTH_PX, max(1, round(image.height * WIDTH_PX / image.width)))
    image = image.reduce(max(1, image.width // WIDTH_PX))
    return image if image.width <= WIDTH_PX else image.resize(size, Image.Resampling.BOX)


def _speeds(motion: Motion) -> Floats:
    """Speeds, backwards negative."""
    return np.where(motion.direction[:, 0] < 0, -motion.speed_mps, motion.speed_mps)
