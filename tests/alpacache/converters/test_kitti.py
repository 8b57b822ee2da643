"""KITTI drives in their own layout, values against formulas of another kind."""

import shutil
from datetime import datetime, timedelta

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.converters.kitti import drives
from alpacache.converters.log_files import UnusableError, as_microseconds, increasing_part
from alpacache.errors import UsageError

ORIGIN = (49.011212804408, 8.4228850417969, 112.83492)
PNG = b"\x89PNG picture "
COUNT = 120
BEGAN = datetime(2011, 9, 26, 13, 2, 25)


def motion():
    """A drive of 12 s: time (s), heading (rad, 0 = east), east, north and up (m), pitch, roll."""
    seconds = np.arange(COUNT) * 0.1
    yaw = 0.4 + 0.9 * np.sin(0.2 * seconds)
    speed = 11.0
    east = np.concatenate([[0], np.cumsum(speed * 0.1 * np.cos((yaw[1:] + yaw[:-1]) / 2))])
    north = np.concatenate([[0], np.cumsum(speed * 0.1 * np.sin((yaw[1:] + yaw[:-1]) / 2))])
    return seconds, yaw, east, north, 0.02 * seconds, np.full(COUNT, -0.02), np.full(COUNT, 0.01)


def degrees(east, north):
    """Latitude and longitude of metres from `ORIGIN`, by the ellipsoid's radii of curvature (to millimetres here)."""
    latitude = np.deg2rad(ORIGIN[0])
    squared = 0.00669437999014
    bent = 1 - squared * np.sin(latitude) ** 2
    meridian = 6378137 * (1 - squared) / bent**1.5 + ORIGIN[2]
    normal = 6378137 / np.sqrt(bent) + ORIGIN[2]
    there = latitude + (north - east**2 * np.tan(latitude) / (2 * normal)) / meridian
    wide = ORIGIN[1] + np.rad2deg(east / (normal * np.cos(latitude)) * (1 + north / normal * np.tan(latitude)))
    return np.rad2deg(there), wide


def stamp(seconds, late_ns=0):
    whole = BEGAN + timedelta(seconds=float(np.floor(seconds)))
    return f"{whole:%Y-%m-%d %H:%M:%S}.{round((seconds % 1) * 1e9) + late_ns:09d}"


@pytest.fixture
def drive_folder(tmp_path):
    folder = tmp_path / "2011_09_26" / "2011_09_26_drive_0001_sync"
    for part in ("oxts", "image_02"):
        (folder / part / "data").mkdir(parents=True)
    seconds, yaw, east, north, up, pitch, roll = motion()
    latitude, longitude = degrees(east, north)
    for number in range(COUNT):
        velocity = [11 * np.sin(yaw[number]), 11 * np.cos(yaw[number])]
        row = [latitude[number], longitude[number], ORIGIN[2] + up[number], roll[number], pitch[number], yaw[number]]
        numbers = [*row, *velocity, *[0.0] * 15, 0.05, 0.02, 4, 9, 4, 4, 0]
        (folder / "oxts/data" / f"{number:010d}.txt").write_text(" ".join(f"{value:.14g}" for value in numbers))
        (folder / "image_02/data" / f"{number:010d}.png").write_bytes(PNG + bytes([number]))
    (folder / "oxts/timestamps.txt").write_text("\n".join(stamp(value, 4_389_445) for value in seconds) + "\n")
    (folder / "image_02/timestamps.txt").write_text("\n".join(stamp(value) for value in seconds) + "\n")
    return folder


def test_a_raw_drive_is_metres_on_the_ellipsoid_with_its_own_clocks(drive_folder):
    (drive,) = drives(drive_folder.parents[1])
    assert (drive.name, drive.point, drive.dropped) == ("2011_09_26_drive_0001_sync", "imu", [])
    _, yaw, east, north, up, pitch, roll = motion()
    away = np.stack([east, north, up - (east**2 + north**2) / 2 / 6.38e6], axis=1)  # the earth falls away
    np.testing.assert_allclose(drive.track.xyz, away, atol=0.005)
    turned = Rotation.from_quat(drive.track.quaternion_xyzw)
    about = turned.inv() * Rotation.from_euler("ZYX", np.stack([yaw, pitch, roll], axis=1))
    assert np.rad2deg(about.magnitude().max()) < 0.01
    nose = turned.as_matrix()[:, :, 0]
    assert nose[0, 2] > 0  # a negative pitch is nose up
    assert turned.as_matrix()[0, 2, 1] > 0  # a positive roll is left side up
    began_us = 1317042145_000_000
    assert drive.track.timestamps_us[:2].tolist() == [began_us + 4389, began_us + 104389]
    pictures = drive.cameras["camera_front_wide_120fov"]
    assert pictures.times_us[:2].tolist() == [began_us, began_us + 100_000]
    assert list(pictures.read(3, 5)) == [PNG + b"\x03", PNG + b"\x04"]


def test_lenses_are_those_of_the_pictures(drive_folder):
    (drive_folder.parent / "calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\nS_02: 1.392e+03 5.12e+02\nK_02: 959.8 0 696.0 0 956.9 224.2 0 0 1\n"
        "D_02: -0.3691 0.1968 0.001353 0.0005677 -0.06770\nS_rect_02: 1.242e+03 3.75e+02\n"
        "P_rect_02: 721.5 0 609.6 44.86 0 721.5 172.9 0.2164 0 0 1 0.0027\n"
    )
    (drive,) = drives(drive_folder)
    lens = drive.calibration["camera_front_wide_120fov"]
    assert (lens["width"], lens["K"], lens["D"]) == (1242, [721.5, 0, 609.6, 0, 721.5, 172.9, 0, 0, 1], [])
    (drive,) = drives(drive_folder.rename(drive_folder.with_name("2011_09_26_drive_0001_extract")))
    lens = drive.calibration["camera_front_wide_120fov"]
    assert (lens["width"], lens["K"][0], lens["D"][0]) == (1392, 959.8, -0.3691)


def test_times_that_step_back_and_absent_files_are_left_out_and_said(drive_folder):
    (drive_folder / "image_02/data/0000000007.png").unlink()
    stamps = drive_folder / "oxts/timestamps.txt"
    lines = stamps.read_text().splitlines()
    lines[50] = lines[20]
    stamps.write_text("\n".join(lines))
    (drive,) = drives(drive_folder)
    assert [(item.what, item.count) for item in drive.dropped] == [("poses", 1), ("camera_front_wide_120fov frames", 1)]
    assert "line 51" in drive.dropped[0].reason
    assert len(drive.track.timestamps_us) == COUNT - 1
    assert list(drive.cameras["camera_front_wide_120fov"].read(7, 8)) == [PNG + b"\x08"]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("oxts/data/0000000003.txt", lambda text: text.replace(" ", " nan ", 1), "31 numbers"),
        ("oxts/data/0000000003.txt", lambda text: text + "x", "could not convert"),
        ("oxts/timestamps.txt", lambda text: text.replace("2011", "20xx", 1), "line 1: '20xx-09-26"),
        ("oxts/timestamps.txt", lambda text: "", "0 poses"),
        ("image_02/timestamps.txt", lambda text: text[:30], "1 pictures with times"),
    ],
)
def test_what_cannot_be_read_is_a_dropped_drive_with_the_place(drive_folder, file, change, says):
    (drive_folder / file).write_text(change((drive_folder / file).read_text()))
    (found,) = drives(drive_folder)
    assert isinstance(found, Dropped)
    assert says in found.reason


def test_a_compass_heading_is_refused(drive_folder):
    for number in range(COUNT):
        file = drive_folder / "oxts/data" / f"{number:010d}.txt"
        fields = file.read_text().split()
        fields[5] = str(np.pi / 2 - float(fields[5]))
        file.write_text(" ".join(fields))
    (found,) = drives(drive_folder)
    assert "yaw and velocity are" in found.reason


def test_without_pictures_the_poses_are_there(drive_folder):
    shutil.rmtree(drive_folder / "image_02")
    (drive,) = drives(drive_folder)
    assert (drive.cameras, len(drive.track.timestamps_us)) == ({}, COUNT)
    assert "the clip holds poses alone" in drive.dropped[0].reason


def test_other_cameras_by_name(drive_folder, tmp_path):
    (drive_folder / "image_02").rename(drive_folder / "image_03")
    (found,) = drives(drive_folder)
    assert "cameras there: image_03" in found.reason
    (drive,) = drives(drive_folder, camera=("front_tele=image_03",))
    assert isinstance(drive, LoggedDrive)
    assert list(drive.cameras) == ["camera_front_tele_30fov"]
    with pytest.raises(UsageError, match="image_00 to image_03"):
        list(drives(drive_folder, camera=("front_wide=../../etc",)))
    with pytest.raises(UsageError, match="oxts"):
        list(drives(drive_folder / "oxts"))


def test_odometry_poses_are_turned_on_both_sides(tmp_path):
    folder = tmp_path / "sequences" / "07"
    (folder / "image_2").mkdir(parents=True)
    (tmp_path / "poses").mkdir()
    yaw = np.linspace(0, 1, 20)  # to the left
    forward, left = 10 * np.sin(yaw), 10 * (1 - np.cos(yaw))
    rows = []
    for number, angle in enumerate(yaw):
        cos, sin = np.cos(angle), np.sin(angle)
        # x right, y down, z forward: turning left is about -y
        turn = [[cos, 0, -sin, -left[number]], [0, 1, 0, 0.1], [sin, 0, cos, forward[number]]]
        rows.append(" ".join(f"{value:.9e}" for value in np.ravel(turn)))
        (folder / "image_2" / f"{number:06d}.png").write_bytes(PNG)
    (tmp_path / "poses/07.txt").write_text("\n".join(rows) + "\n")
    (folder / "times.txt").write_text("".join(f"{number * 0.1038:.6e}\n" for number in range(20)))
    (drive,) = drives(tmp_path)
    np.testing.assert_allclose(drive.track.xyz, np.stack([forward, left, 0 * yaw - 0.1], axis=1), atol=1e-6)
    found = Rotation.from_quat(drive.track.quaternion_xyzw).as_euler("ZYX")
    np.testing.assert_allclose(found, np.stack([yaw, 0 * yaw, 0 * yaw], axis=1), atol=1e-6)
    assert drive.track.timestamps_us[:3].tolist() == [0, 103800, 207600]
    assert (drive.point, drive.mount_deg) == ("camera", "estimate")
    (alone,) = drives(tmp_path / "poses/07.txt")
    assert alone.name == drive.name == "kitti-odometry-07"
    shutil.rmtree(folder / "image_2")
    (alone,) = drives(tmp_path)
    assert (alone.cameras, alone.dropped[0].what) == ({}, "cameras")
    (tmp_path / "poses/07.txt").write_text("\n".join(rows[:-1]))
    (found,) = drives(tmp_path)
    assert found.reason == "sequence 07: 19 poses in 07.txt, 20 times in times.txt"
    (tmp_path / "poses/07.txt").write_text("\n".join(rows))
    (folder / "times.txt").rename(tmp_path / "poses/07_times.txt")
    (alone,) = drives(tmp_path / "poses/07.txt")
    assert (alone.name, alone.track.timestamps_us[1]) == ("kitti-odometry-07", 103800)
    (tmp_path / "poses/07_times.txt").unlink()
    with pytest.raises(UsageError, match="has no times, and neither"):
        list(drives(tmp_path / "poses/07.txt"))


def test_increasing_part():
    assert increasing_part(np.array([1, 2, 90, 3, 3, 4, 0, 5])).tolist() == [0, 1, 4, 5, 7]
    assert increasing_part(np.array([], dtype=np.int64)).tolist() == []


def test_a_time_that_no_clock_says_is_named():
    assert as_microseconds(np.array([0.0, 0.1000004]), where="times.txt").tolist() == [0, 100_000]
    for odd in (np.nan, np.inf, 1e300):
        with pytest.raises(UnusableError, match=r"times\.txt: time 1 is .*, which no clock says"):
            as_microseconds(np.array([0.0, odd]), where="times.txt")
