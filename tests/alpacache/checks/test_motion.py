"""Headings off the course, positions in degrees, and clocks that were set while they ran."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.checks.motion import judge_axes, judge_speed, judge_standing, motion_of
from alpacache.checks.recordings import Recording, check_poses, check_times, time_unit


def turned(track, degrees):
    rot = Rotation.from_quat(track.quaternion_xyzw) * Rotation.from_euler("z", degrees, degrees=True)
    return replace(track, quaternion_xyzw=rot.as_quat())


@pytest.mark.parametrize("lever_m", [0.0, 3.0])
@pytest.mark.parametrize(
    ("degrees", "status", "said"),
    [
        (0, "ok", ""),
        (1.2, "ok", ""),
        (3, "warn", "3.0 degrees to the left"),
        (-15, "fail", "15.0 degrees to the right"),
    ],
)
def test_headings_off_the_course_are_measured(drive, degrees, status, said, lever_m):
    check = judge_axes([motion_of(turned(drive(lever_m=lever_m), degrees))])
    assert check.status == status, check
    assert said in check.found


@pytest.mark.parametrize(
    ("degrees", "status", "said"),
    [(3.8, "ok", ""), (15, "warn", "15.0 degrees below"), (-8, "warn", "8.0 degrees above")],
)
def test_axes_that_point_at_the_road_are_named(drive, degrees, status, said):
    """Rotated about y by a positive angle, x points down."""
    track = drive()
    rot = Rotation.from_quat(track.quaternion_xyzw) * Rotation.from_euler("y", degrees, degrees=True)
    check = judge_axes([motion_of(replace(track, quaternion_xyzw=rot.as_quat()))])
    assert check.status == status, check
    assert said in check.found


@pytest.mark.parametrize("columns", [[0, 1], [1, 0]], ids=["longitude first", "latitude first"])
def test_positions_in_degrees_are_named(drive, columns):
    track = drive()
    degrees = track.xyz / [111_320 * np.cos(np.deg2rad(49)), 111_320, 1] + [8.4, 49.0, 110.0]
    degrees[:, 2] += 3 * np.sin(np.arange(len(degrees)) / 50)  # heights are metres
    check = judge_speed([motion_of(replace(track, xyz=degrees[:, [*columns, 2]]))])
    assert check.status == "fail"
    assert "Latitude and longitude" in check.remedy


def test_a_vehicle_that_creeps_is_not_in_degrees(drive):
    """A simulator's car at rest slides by some tenths of a millimetre a second, always the same way."""
    track = drive()
    creep = np.zeros_like(track.xyz)
    creep[:, 0] = 3e-4 * (track.timestamps_us - track.timestamps_us[0]) / 1e6
    still = np.broadcast_to([0.0, 0.0, 0.0, 1.0], (len(creep), 4))
    assert judge_speed([motion_of(replace(track, xyz=creep, quaternion_xyzw=still))]).status == "warn"


def test_heading_noise_at_a_standstill_is_measured(drive):
    track = drive()
    yaw = 0.5 * np.random.default_rng(0).standard_normal(len(track.xyz))
    at_rest = Rotation.from_euler("z", yaw[:, None], degrees=True).as_quat()
    check = judge_standing(motion_of(replace(track, xyz=np.zeros_like(track.xyz), quaternion_xyzw=at_rest)))
    assert check.status == "warn"
    wanders = float(check.found.partition("wanders by ")[2].split()[0])
    assert wanders == pytest.approx(0.5, rel=0.15)


def test_a_clock_that_was_set_late_takes_no_memory(drive):
    track = drive()
    times = track.timestamps_us.copy()
    times[0] = 5_000_000
    track = replace(track, timestamps_us=times)
    tracemalloc.start()
    motion, check = motion_of(track), check_poses(track)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert 250 < len(motion.times_us) < 310
    assert check.status == "warn"
    assert "1 gaps above 1 s, the longest 19676 days" in check.found
    assert "clock was set" in check.remedy


def times_check(track, stamps):
    return check_times(Recording(track=replace(track, timestamps_us=stamps), frame_times_us={}, missing={}))


def test_whole_seconds_and_rows_out_of_order_are_named(drive):
    track = drive()
    stamps = track.timestamps_us
    check = times_check(track, stamps // 1_000_000 * 1_000_000)
    assert check.status == "fail"
    assert "do not increase in 540 rows" in check.found
    assert "finest step is 1 s" in check.found
    shuffled = np.random.default_rng(0).permutation(stamps)
    assert time_unit(shuffled) == "microseconds"
    check = times_check(track, shuffled)
    assert check.status == "fail"
    assert "Sort the rows" in check.remedy
    assert "in seconds" in times_check(track, stamps // 1_000_000).found
    assert times_check(track, np.full_like(stamps, 7)).status == "fail"
