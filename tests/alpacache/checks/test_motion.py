"""Headings off the course, positions in degrees, and clocks that were set while they ran."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.checks.motion import judge_axes, judge_speed, judge_standing, motion_of
from alpacache.checks.recordings import Recording, check_poses, check_times, time_unit
from alpacache.driving.poses import Track


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


def with_yaw(track, change):
    yaw = np.unwrap(Rotation.from_quat(track.quaternion_xyzw).as_euler("ZYX")[:, 0])
    return replace(track, quaternion_xyzw=Rotation.from_euler("z", change(yaw)[:, None]).as_quat())


def noise(degrees, count):
    return np.deg2rad(degrees) * np.random.default_rng(1).standard_normal(count)


@pytest.mark.parametrize("noise_m", [0.0, 0.02])
@pytest.mark.parametrize("lever_m", [-1.0, 0.0, 1.5, 4.0])
def test_noise_of_positions_is_not_that_of_headings(drive, lever_m, noise_m):
    """Also of clips that begin or end within a turn."""
    track = drive(lever_m=lever_m)
    xyz = track.xyz + noise_m * np.random.default_rng(0).standard_normal(track.xyz.shape)
    for begin in range(0, 600, 50):
        rows = slice(0, None) if begin == 0 else slice(begin, begin + 120)
        cut = replace(
            track,
            timestamps_us=track.timestamps_us[rows],
            xyz=xyz[rows],
            quaternion_xyzw=track.quaternion_xyzw[rows],
        )
        check = judge_axes([motion_of(cut)])
        assert "headings" not in check.found, check


@pytest.mark.parametrize("lever_m", [0.0, 3.5])
@pytest.mark.parametrize(
    ("change", "ratio"),
    [
        (lambda yaw: 0 * yaw, 0.0),
        (lambda yaw: 2 + noise(0.5, len(yaw)), 0.0),
        (lambda yaw: 0.5 * yaw, 0.5),
        (lambda yaw: 2 * yaw, 2.0),
    ],
    ids=["identity", "constant", "half", "double"],
)
def test_headings_that_do_not_turn_as_the_course_are_wrong(drive, change, ratio, lever_m):
    check = judge_axes([motion_of(with_yaw(drive(lever_m=lever_m), change))])
    assert check.status == "fail"
    assert "do not turn as the course does" in check.found
    measured = float(check.found.partition(": by ")[2].split()[0])
    assert measured == pytest.approx(ratio, abs=0.04)


@pytest.mark.parametrize(("degrees", "status"), [(0.5, "ok"), (3.0, "warn"), (7.0, "fail")])
def test_noise_of_headings_is_measured(drive, degrees, status):
    check = judge_axes([motion_of(with_yaw(drive(), lambda yaw: yaw + noise(degrees, len(yaw))))])
    assert check.status == status, check
    if status != "ok":
        measured = float(check.found.partition("scatter by ")[2].split()[0])
        assert measured == pytest.approx(degrees, rel=0.2)


@pytest.mark.parametrize(("degrees", "status"), [(0.1, "ok"), (2, "warn"), (5, "fail")])
def test_rounded_headings_are_found_with_their_step(drive, degrees, status):
    def rounded(yaw):
        return np.deg2rad(degrees) * np.round(np.rad2deg(yaw) / degrees)

    check = judge_axes([motion_of(with_yaw(drive(), rounded))])
    assert check.status == status, check
    assert status == "ok" or f"in steps of {degrees:.1f} degrees" in check.found


@pytest.mark.parametrize("seconds", [0.6, 1.0, 2.0, 4.0])
def test_arcs_of_one_curvature_are_not_rounded(drive, seconds):
    """Simulators turn the wheel at once, and keep a speed."""
    track = drive()
    since_s = (track.timestamps_us - track.timestamps_us[0]) / 1e6
    yaw = np.cumsum(np.where(since_s % 8 < seconds, 0.035, 0.0))
    xy = 0.8 * np.cumsum(np.stack([np.cos(yaw), np.sin(yaw)], axis=1), axis=0)
    arcs = replace(track, xyz=np.pad(xy, ((0, 0), (0, 1))))
    check = judge_axes([motion_of(with_yaw(arcs, lambda _: yaw))])
    assert check.status == "ok", check


def test_headings_of_a_slower_sensor_are_found(drive):
    check = judge_axes([motion_of(with_yaw(drive(), lambda yaw: yaw[np.arange(len(yaw)) // 10 * 10]))])
    assert check.status == "fail"
    assert "headings stay the same in 8" in check.found


def test_a_vehicle_that_is_steered_by_keys_turns_by_jerks():
    """Its headings stay and jump, and so does the course that was made of them."""
    keys = np.random.default_rng(2).choice([-1.0, 0.0, 0.0, 0.0, 1.0], size=150)
    turns = np.zeros(600)
    turns[::4] = np.deg2rad(7.0) * keys
    yaw = np.cumsum(turns)
    xyz = np.pad(np.cumsum(np.stack([np.cos(yaw), np.sin(yaw)], axis=1), axis=0), ((0, 0), (0, 1)))
    quaternion = Rotation.from_euler("z", yaw[:, None]).as_quat()
    times = np.arange(600) * 100_000
    jerky = Track(timestamps_us=times, xyz=xyz, quaternion_xyzw=quaternion)
    assert judge_axes([motion_of(jerky)]).status == "ok"
    smooth = np.stack([np.convolve(column, np.ones(25) / 25, "same") for column in xyz.T], axis=1)
    part = slice(20, -20)
    held = Track(timestamps_us=times[part], xyz=smooth[part], quaternion_xyzw=quaternion[part])
    check = judge_axes([motion_of(held)])
    assert check.status in ("warn", "fail")


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
    assert "longest gap 19676 days; 1 gap above 1 s" in check.found
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
