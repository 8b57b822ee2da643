"""What a clip holds before any sample is cut from it: all poses and all frame times, as they were recorded.

Loading a sample says whether it can be used; whether the numbers in it mean what they should shows only in the whole
recording. Nothing is checked on the way: what is broken is what a check wants to see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.poses import Track
from alpacache.driving.sample import (
    FUTURE_STEPS,
    HISTORY_STEPS,
    STEP_US,
    Sample,
)
from alpacache.errors import BadClipError
from alpacache.sources.source import RecordedSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One clip; vehicle to world."""

    track: Track
    frame_times_us: Mapping[str, NDArray[np.int64]]
    """Per camera that the clip has."""
    missing: Mapping[str, str]
    """Camera that it has not, and why."""


def read_recording(source: RecordedSource, clip_id: str, cameras: Sequence[str]) -> Recording:
    """Raises `BadClipError` where there are no readable poses."""
    found: dict[str, NDArray[np.int64]] = {}
    missing = {}
    for camera in cameras:
        try:
            found[camera] = source.frame_times_us(clip_id, camera)
        except BadClipError as error:
            missing[camera] = str(error)
    return Recording(track=source.track(clip_id), frame_times_us=found, missing=missing)


def recording_of(sample: Sample) -> Recording:
    """The 8 s that a sample holds, in its ego frame: all there is of a prepared dataset."""
    from scipy.spatial.transform import Rotation

    times = sample.ref.t0_us + STEP_US * np.arange(1 - HISTORY_STEPS, FUTURE_STEPS + 1, dtype=np.int64)
    rot = np.concatenate([sample.history_rot, sample.future_rot]).astype(np.float64)
    track = Track(
        timestamps_us=times,
        xyz=np.concatenate([sample.history_xyz, sample.future_xyz]).astype(np.float64),
        quaternion_xyzw=Rotation.from_matrix(rot).as_quat(),
    )
    stamps = dict(zip(sample.cameras, sample.frame_timestamps_us, strict=True))
    return Recording(track=track, frame_times_us=stamps, missing={})
