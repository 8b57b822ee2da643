"""Recordings of Udacity's simulator in its own layout."""

import csv
import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.converters.udacity import Row, drives, integrated, read_log, without_reversing
from alpacache.errors import UsageError

MPS_A_MPH = 0.44704
JPEG = b"\xff\xd8\xff picture "
BEGAN = datetime(2016, 12, 1, 13, 30, 48, 287_000, tzinfo=UTC)
SPEED_MPS, LOCK = 12.0, 0.25
"""A circle to the left: steering is negative to the left."""


@pytest.fixture
def recording(tmp_path):
    """As the simulator writes it: 12 s at steps of 65 to 135 ms, a pause, 3 s more."""
    root = tmp_path / "recording"
    (root / "IMG").mkdir(parents=True)
    rng, rows, at = np.random.default_rng(3), [], 0.0
    for number in range(150):
        at += rng.uniform(0.065, 0.135) if number != 120 else 2.0
        name = f"{BEGAN + timedelta(seconds=at):%Y_%m_%d_%H_%M_%S_%f}"[:-3]
        (root / "IMG" / f"center_{name}.jpg").write_bytes(JPEG + bytes([number]))
        paths = [rf"C:\recording\IMG\{camera}_{name}.jpg" for camera in ("center", "left", "right")]
        rows.append([*paths, -LOCK, 0.4, 0, SPEED_MPS / MPS_A_MPH])
    with open(root / "driving_log.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def lines_of(recording):
    return (recording / "driving_log.csv").read_text().splitlines()


def rewrite(recording, lines):
    (recording / "driving_log.csv").write_text("\n".join(lines) + "\n")


def test_a_log_becomes_stretches_whose_poses_are_a_bicycles(recording):
    first, second = drives(recording)
    assert (len(first.track.timestamps_us), len(second.track.timestamps_us)) == (120, 30)
    assert first.name.startswith("udacity-20161201-133048-")
    seconds = (first.track.timestamps_us - first.track.timestamps_us[0]) / 1e6
    radius = 2.5 / np.tan(np.deg2rad(23.5) * LOCK)  # a circle of constant speed
    angle = SPEED_MPS * seconds / radius
    np.testing.assert_allclose(first.track.xyz[:, 0], radius * np.sin(angle), atol=0.01)
    np.testing.assert_allclose(first.track.xyz[:, 1], radius * (1 - np.cos(angle)), atol=0.01)
    np.testing.assert_allclose(2 * np.arctan2(*first.track.quaternion_xyzw[:, 2:].T), angle, atol=1e-9)
    front = first.cameras["camera_front_wide_120fov"]
    assert list(front.read(7, 9)) == [JPEG + b"\x07", JPEG + b"\x08"]
    name = lines_of(recording)[7].split(",")[0][-12:-4]
    assert f"{datetime.fromtimestamp(front.times_us[7] / 1e6, UTC):%M_%S_%f}"[-10:-3] in name
    assert (first.point, first.facts["wheelbase_m"]) == ("rear axle", 2.5)
    (wider, _) = drives(recording, wheelbase_m=5.0)
    np.testing.assert_allclose(wider.track.xyz[40, 1], 2 * radius * (1 - np.cos(angle[40] / 2)), atol=0.01)


def test_a_heading_line_changes_nothing_and_other_files_are_refused(recording):
    without = read_log(recording)
    rewrite(recording, ["center,left,right,steering,throttle,brake,speed", *lines_of(recording)])
    assert read_log(recording) == without
    rewrite(recording, ["time,steering", "0,1"])
    with pytest.raises(UsageError, match="line 1"):
        list(drives(recording))
    (recording / "driving_log.csv").unlink()
    with pytest.raises(UsageError, match="is not there"):
        list(drives(recording))


def test_blank_lines_missing_pictures_and_nan_are_skipped_and_named(recording):
    lines = lines_of(recording)
    whole, nothing = read_log(recording)
    assert nothing == []
    whole[100].picture.unlink()
    fields = lines[40].split(",")
    lines[40] = ",".join([*fields[:3], "nan", *fields[4:]])
    rewrite(recording, [*lines[:7], "", " , ", *lines[7:], "", ""])
    rows, dropped = read_log(recording)
    assert rows == [row for number, row in enumerate(whole) if number not in (40, 100)]
    assert dropped == [
        Dropped(what="rows", count=1, reason="a number in them is not finite, the first in line 43"),
        Dropped(
            what="rows",
            count=1,
            reason=f"their picture is not there, the first in line 103: {whole[100].picture.name}",
        ),
    ]
    found = list(drives(recording))
    assert [type(item) for item in found] == [Dropped, Dropped, LoggedDrive, LoggedDrive]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda fields: [*fields[:3], "0,05", *fields[4:]], "decimal points, not commas"),
        (lambda fields: [*fields[:3], '"0,05"', *fields[4:]], "decimal points, not commas"),
        (lambda fields: [*fields[:3], "left", *fields[4:]], "could not convert string to float: 'left'"),
        (lambda fields: fields[:6], "is no row of the simulator's log"),
        (lambda fields: [fields[0].replace("2016_12", "2016_13"), *fields[1:]], "2016_13"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(recording, change, says):
    lines = lines_of(recording)
    lines[5] = ",".join(change(lines[5].split(",")))
    rewrite(recording, lines)
    with pytest.raises(UsageError, match=r"driving_log\.csv, line 6: .*" + says):
        list(drives(recording))


def test_a_log_alone_gives_its_poses(recording):
    shutil.rmtree(recording / "IMG")
    said, first, _ = drives(recording)
    assert said.what == "cameras"
    assert (first.cameras, len(first.track.timestamps_us)) == ({}, 120)


def test_reversing_is_left_out(tmp_path):
    """Forwards at 5 m/s, braked to a stand, back under the brake, braked by the throttle, forwards again."""
    legs = [(1, 0, [5] * 9), (0, 1, [3, 1.5, 0, 0]), (0, 1, [0.5, 1, 2, 3]), (1, 0, [2, 1, 0.1]), (1, 0, [0.5, 2, 4])]
    rows = [Row(0, tmp_path, 0.1, throttle, brake, speed) for throttle, brake, speeds in legs for speed in speeds]
    kept = without_reversing(rows)
    assert [row.speed_mps for row in kept] == [5] * 9 + [3, 1.5, 0, 0] + [0.1, 0.5, 2, 4]
    signed = [row._replace(speed_mps=-1.0, throttle=0, brake=1) for row in rows]
    assert without_reversing(signed) == signed


def test_a_signed_speed_drives_backwards(tmp_path):
    rows = [Row(number * 100_000, tmp_path, 0.5, 0, 0, -2.0) for number in range(20)]
    xyz, quaternion = integrated(rows, wheelbase_m=2.5, full_lock_rad=0.4)
    assert xyz[-1, 0] < -3
    assert quaternion[-1, 2] > 0  # wheels to the right, backwards: the nose turns left
