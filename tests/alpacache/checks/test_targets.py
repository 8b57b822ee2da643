"""Targets of a drive as it is are those of a car; noise, grids, times of arrival and wrong units are named."""

from dataclasses import replace

import numpy as np
import pytest

from alpacache.checks.targets import judge_targets, targets_of
from alpacache.driving.poses import Track


def judged(track):
    return judge_targets([targets_of(track)])


def noisy(track, metres, seed=0):
    noise = np.random.default_rng(seed).normal(0, metres, track.xyz.shape)
    return replace(track, xyz=track.xyz + noise * [1, 1, 0])


@pytest.mark.parametrize("hz", [10, 50])
@pytest.mark.parametrize("metres", [0.0, 0.01, 0.02])
def test_a_drive_with_good_localisation_is_fine(drive, hz, metres):
    check = judged(noisy(drive(hz=hz), metres))
    assert check.status == "ok", check
    assert "accelerations up to" in check.found


def test_values_are_those_of_the_drive(drive):
    targets = targets_of(drive())
    assert len(targets.speed_mps) == 33  # one in 1.6 s, from 1.5 s after the start to 6.4 s before the end
    assert np.abs(targets.accel_mps2).max() < 6
    assert 1 / 6 < np.abs(targets.curvature_pm[targets.speed_mps > 2]).max() < 1 / 4
    assert targets.speed_mps[0, 0] == pytest.approx(10.1, abs=0.2)
    assert targets.grid_m < 1e-5
    assert targets.late_share == 0.0


@pytest.mark.parametrize(("centimetres", "status"), [(5, "warn"), (10, "warn"), (20, "fail")])
def test_noise_is_measured(drive, centimetres, status):
    check = judged(noisy(drive(), centimetres / 100))
    assert check.status == status, check
    measured = float(check.found.split(" cm")[0].split()[-1])
    assert measured == pytest.approx(centimetres, rel=0.15)


@pytest.mark.parametrize("axes", [[0, 1], [1, 0]], ids=["east, north", "north, east"])
def test_utm_in_float32_is_named(drive, axes):
    track = drive()
    utm = (track.xyz[:, [*axes, 2]] + np.array([456_123.0, 5_428_765.0, 110.0])[[*axes, 2]]).astype(np.float32)
    check = judged(replace(track, xyz=utm.astype(np.float64)))
    assert check.status == "fail"
    assert "grid of 0.5 m, float32's" in check.found


def test_rounded_positions_are_named_and_a_steady_speed_is_not(drive):
    track = drive()
    check = judged(replace(track, xyz=np.round(track.xyz, 1)))
    assert (check.status, check.found) == ("warn", "positions lie on a grid of 0.1 m")
    assert judged(replace(track, xyz=np.round(track.xyz, 2))).status == "ok"
    times = np.arange(0, 20_000_000, 100_000)
    still, one = np.zeros(len(times)), np.ones(len(times))
    steady = Track(
        timestamps_us=times,
        xyz=np.stack([np.arange(len(times)) * 1.0, still, still], axis=1),
        quaternion_xyzw=np.stack([still, still, still, one], axis=1),
    )
    assert judged(steady).status == "ok"


def test_times_of_arrival_are_told_from_uneven_ones(drive):
    track, rng = drive(), np.random.default_rng(1)
    arrived = track.timestamps_us + rng.integers(0, 40_000, len(track.timestamps_us))
    check = judged(replace(track, timestamps_us=arrived))
    assert check.status == "warn"
    assert "times of arrival" in check.remedy
    fine = drive(hz=100)
    uneven = np.cumsum(rng.integers(8, 13, 550))  # 80 to 120 ms, and true
    fine = Track(
        timestamps_us=fine.timestamps_us[uneven], xyz=fine.xyz[uneven], quaternion_xyzw=fine.quaternion_xyzw[uneven]
    )
    assert judged(fine).status == "ok"


@pytest.mark.parametrize(("factor", "said"), [(3.6, "too large: km/h"), (1 / 3.6, "too small")])
def test_wrong_units_are_named(drive, factor, said):
    track = drive()
    check = judged(replace(track, xyz=track.xyz * factor))
    assert check.status == "fail"
    assert said in check.remedy


def test_hard_pedals_are_no_noise(drive):
    """A simulator's driver: full throttle and full brake in turn, positions exact."""
    track = drive()
    seconds = (track.timestamps_us - track.timestamps_us[0]) / 1e6
    accel = np.where(seconds // 1.5 % 2 == 0, 7.0, -7.0)
    ahead = np.zeros_like(track.xyz)
    ahead[:, 0] = np.cumsum(3.0 + np.cumsum(accel) * 0.1) * 0.1
    track = replace(track, xyz=ahead, quaternion_xyzw=np.broadcast_to([0.0, 0.0, 0.0, 1.0], (len(ahead), 4)))
    targets = targets_of(track)
    assert np.sqrt((targets.changes_mps2**2).mean()) > 0.85
    assert judge_targets([targets]).status == "ok"


def test_a_walking_pace_is_named(drive):
    track = drive()
    straight = np.zeros_like(track.xyz)
    straight[:, 0] = 2.5 * (track.timestamps_us - track.timestamps_us[0]) / 1e6
    track = replace(track, xyz=straight, quaternion_xyzw=np.broadcast_to([0.0, 0.0, 0.0, 1.0], (len(straight), 4)))
    check = judged(track)
    assert check.status == "warn"
    assert "never faster than 2.5 m/s in" in check.found


def test_what_cannot_be_cut_is_not_judged(drive):
    track = drive(seconds=7)
    assert targets_of(track) is None
    assert not judge_targets([]).is_judged
