"""A drive that curves, with pictures that show it, which each kind's miniature log is written from."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.sources.synthetic import SyntheticSource


@pytest.fixture(scope="session")
def curved():
    """400 poses and pictures at 20 Hz: `track`, `speed_mps`, `yaw_rad` (unwrapped), JPEG files `jpegs`, one a pose."""
    source = SyntheticSource(1, seed=5, mix={"early_curve": 1.0})
    (clip_id,) = source.clip_ids
    whole = source.track(clip_id)
    track = Track(
        timestamps_us=whole.timestamps_us[:400], xyz=whole.xyz[:400], quaternion_xyzw=whole.quaternion_xyzw[:400]
    )
    frames = source.film(clip_id, FRONT_CAMERA, track.timestamps_us)
    jpegs = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    yaw = np.unwrap(Rotation.from_quat(track.quaternion_xyzw).as_euler("ZYX")[:, 0])
    time_s = track.timestamps_us / 1e6
    speed = np.linalg.norm(np.gradient(track.xyz[:, :2], time_s, axis=0), axis=1)
    assert np.abs(np.diff(yaw)).sum() > 0.2  # there is a curve to get wrong
    return SimpleNamespace(track=track, yaw_rad=yaw, speed_mps=speed, jpegs=jpegs, frames=frames)
