"""A moment's frames stand for instants that are theirs, and what is out of order is called so."""

import numpy as np
import pytest

from alpacache.driver.moment import moment_of, track_of_poses
from alpacache.errors import BadClipError, UsageError

T0_US = 5_100_000
POSE_TIMES = np.arange(T0_US - 2_000_000, T0_US + 1, 50_000)
POSES = np.zeros((len(POSE_TIMES), 7))
POSES[:, 0], POSES[:, 6] = POSE_TIMES / 1e5, 1


def seen(times_us, *, cameras=("front_wide",), t0_us=None, poses=POSES, pose_times_us=POSE_TIMES):
    times = np.asarray(times_us)
    frames = np.zeros((len(cameras), times.shape[-1], 8, 8, 3), np.uint8)
    track = track_of_poses(poses, pose_times_us, name="log-7")
    return moment_of(frames, times, track, cameras=cameras, count=4, t0_us=t0_us, route=None, name="log-7")


@pytest.mark.parametrize("age_us", [500_000, 1_000_000])
def test_slow_cameras_are_seen_as_they_are(age_us):
    times = [T0_US - 100_000 - age_us, T0_US]
    assert seen(times).frame_timestamps_us.tolist() == [[times[0]] * 3 + [T0_US]]


@pytest.mark.parametrize("times", [[-600_000_000, T0_US], [T0_US - 1_100_001, T0_US]])
def test_old_frames_stand_for_no_moment(times):
    age_s = (T0_US - 100_000 - times[0]) / 1e6
    with pytest.raises(BadClipError, match=r"log-7 at 5\.100 s: camera_front_wide_120fov: the newest") as caught:
        seen(times)
    assert caught.value.kind == "short_clip"
    assert f"5.000 s is {age_s:.3f} s older; at most 1 s" in str(caught.value)


def test_of_two_cameras_the_old_one_is_named():
    steady = T0_US - 100_000 * np.arange(3, -1, -1)
    with pytest.raises(BadClipError, match=r"camera_front_tele_30fov: the newest frame for 5\.000 s is 2\.000 s older"):
        seen(np.stack([steady, [0, 1, 3_000_000, T0_US]]), cameras=("front_wide", "front_tele"))


def test_disorder_is_told_before_lateness():
    times = T0_US - 100_000 * np.arange(5)
    with pytest.raises(BadClipError, match="log-7: camera_front_wide_120fov: frame times go from") as caught:
        seen(times)
    assert caught.value.kind == "time_order"
    with pytest.raises(BadClipError, match="log-7: pose times go from 5100000 to 5050000 us in row 1"):
        seen(times[::-1], poses=POSES[::-1], pose_times_us=POSE_TIMES[::-1])


def test_the_moment_is_whole_microseconds():
    times = T0_US - 100_000 * np.arange(3, -1, -1)
    assert seen(times, t0_us=np.int64(T0_US)).ref.sample_id == "log-7@5100000#0"
    with pytest.raises(UsageError, match=r"log-7: t0_us is 5100000\.0; expected whole microseconds"):
        seen(times, t0_us=float(T0_US))
