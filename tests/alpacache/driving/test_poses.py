import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.driving.poses import (
    Track,
    frame_indices,
    history_and_future,
    interpolate,
)
from alpacache.errors import BadClipError

T0 = 5_100_000


def circle(*, rate_hz=20, seconds=20.0, speed=10.0, curvature=0.05, start_us=0):
    """A level circle, driven anticlockwise from the origin, heading along x at time 0."""
    t = np.arange(int(seconds * rate_hz) + 1) / rate_hz
    yaw = speed * curvature * t
    xyz = np.stack([np.sin(yaw) / curvature, (1 - np.cos(yaw)) / curvature, np.zeros_like(t)], axis=1)
    quat = Rotation.from_euler("z", yaw[:, None]).as_quat()
    stamps = start_us + np.round(t * 1e6).astype(np.int64)
    return Track(timestamps_us=stamps, xyz=xyz, quaternion_xyzw=quat)


def test_circle_in_ego_frame_has_its_closed_form():
    poses = history_and_future(circle(), T0)
    assert [a.shape for a in poses] == [(16, 3), (16, 3, 3), (64, 3), (64, 3, 3)]
    assert all(a.dtype == np.float32 for a in poses)
    yaw = 0.5 * 0.1 * np.arange(1, 65)
    expected = np.stack([np.sin(yaw) / 0.05, (1 - np.cos(yaw)) / 0.05, 0 * yaw], axis=1)
    np.testing.assert_allclose(poses.future_xyz, expected, atol=2e-5)
    np.testing.assert_allclose(poses.future_rot[:, 1, 0], np.sin(yaw), atol=1e-6)
    np.testing.assert_array_equal(poses.history_xyz[-1], np.zeros(3))
    np.testing.assert_allclose(poses.history_rot[-1], np.eye(3), atol=1e-7)
    np.testing.assert_allclose(poses.history_xyz[0, :2], [np.sin(-0.75) / 0.05, (1 - np.cos(0.75)) / 0.05], atol=2e-5)


def test_ego_frame_uses_the_full_rotation():
    """Tilting and moving the world changes nothing that the vehicle sees."""
    track = circle()
    tilt = Rotation.from_euler("xyz", [0.2, -0.3, 2.0])
    moved = Track(
        timestamps_us=track.timestamps_us,
        xyz=tilt.apply(track.xyz) + np.array([1000.0, -500.0, 30.0]),
        quaternion_xyzw=(tilt * Rotation.from_quat(track.quaternion_xyzw)).as_quat(),
    )
    for a, b in zip(history_and_future(track, T0), history_and_future(moved, T0), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_spline_is_not_a_knot_and_reproduces_cubics_and_slerp_halves():
    stamps = np.array([0, 90_000, 200_000, 330_000, 400_000, 520_000], dtype=np.int64)
    s = stamps / 1e6
    cubic = np.stack([s**3 - s, 2 * s**2, 5 * s], axis=1)
    quat = Rotation.from_euler("z", np.array([[0.0, 0.0, 0.2, 0.2, 0.2, 0.2]]).T).as_quat()
    quat[2] *= -1  # the same rotation: slerp takes the short way
    xyz, rot = interpolate(
        Track(timestamps_us=stamps, xyz=cubic, quaternion_xyzw=quat), np.array([145_000, 460_000], dtype=np.int64)
    )
    want = np.array([0.145, 0.46])
    np.testing.assert_allclose(xyz, np.stack([want**3 - want, 2 * want**2, 5 * want], axis=1), atol=1e-12)
    np.testing.assert_allclose(np.arctan2(rot[:, 1, 0], rot[:, 0, 0]), [0.1, 0.2], atol=1e-12)


def test_large_absolute_times_cost_no_precision():
    epoch = 1_750_000_000_000_000
    for a, b in zip(
        history_and_future(circle(), T0), history_and_future(circle(start_us=epoch), epoch + T0), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_frame_at_or_before_the_time():
    stamps = np.array([0, 33_000, 67_000, 100_000, 133_000], dtype=np.int64)
    assert frame_indices(stamps, np.array([0, 32_999, 33_000, 99_999, 133_000])).tolist() == [0, 0, 1, 2, 4]
    for late in (-1, 133_001):
        with pytest.raises(BadClipError, match="frames cover") as error:
            frame_indices(stamps, np.array([late]))
        assert error.value.kind == "short_clip"


def test_poses_are_never_extrapolated():
    track = circle(seconds=11.5)
    history_and_future(track, T0)
    with pytest.raises(BadClipError, match=r"0\.000 s to 11\.500 s, but 3\.601 s to 11\.501 s is needed") as error:
        history_and_future(track, T0 + 1_000)
    assert error.value.kind == "short_clip"


def broken(kind):
    track = circle()
    stamps, xyz, quat = track.timestamps_us.copy(), track.xyz.copy(), track.quaternion_xyzw.copy()
    if kind == "nan":
        xyz[300, 1] = np.nan
    elif kind == "huge":
        xyz[300, 1] = 1e300
    elif kind == "backwards":
        stamps[120] = stamps[119]
    elif kind == "teleport":
        xyz[120:] += [30.0, 0.0, 0.0]
    elif kind == "spin":
        quat[120:] = (Rotation.from_euler("z", 1.0) * Rotation.from_quat(quat[120:])).as_quat()
    elif kind == "norm":
        quat[7] *= 0.5
    elif kind == "columns":
        xyz = xyz[:, :2]
    elif kind == "hole":
        keep = np.r_[0:110, 140:400]
        stamps, xyz, quat = stamps[keep], xyz[keep], quat[keep]
    elif kind == "single":
        stamps, xyz, quat = stamps[:1], xyz[:1], quat[:1]
    return dataclasses.replace(track, timestamps_us=stamps, xyz=xyz, quaternion_xyzw=quat)


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("nan", "not_finite", "1 of 401 poses hold NaN"),
        ("huge", "not_finite", r"1 of 401 poses hold NaN, infinity or values beyond 1e\+12"),
        ("backwards", "time_order", "row 120"),
        ("teleport", "pose_jump", "moves 29.51 m"),
        ("spin", "pose_jump", "turns 1.02 rad"),
        ("norm", "pose_jump", "length 0.5"),
        ("columns", "wrong_shape", r"\(401, 2\)"),
        ("hole", "time_order", "no poses for 1.55 s"),
        ("single", "short_clip", "at least 2"),
    ],
)
def test_bad_recordings_are_refused_with_a_reason(what, kind, says):
    with pytest.raises(BadClipError, match=says) as error:
        history_and_future(broken(what), T0, where="clip-1")
    assert error.value.kind == kind
    assert str(error.value).startswith("clip-1")


def test_a_jump_far_from_the_sample_does_not_matter():
    track = circle()
    xyz = track.xyz.copy()
    xyz[360:] += [300.0, 0.0, 0.0]
    history_and_future(dataclasses.replace(track, xyz=xyz), T0)
