"""nuScenes' tables in their own layout."""

import json
import shutil

import numpy as np
import pytest

from alpacache.converters import nuscenes
from alpacache.converters.drive import Dropped
from alpacache.converters.nuscenes import drives, rows_of
from alpacache.errors import UsageError

BEGAN_US = 1_532_402_927_612_460
JPEG = b"\xff\xd8\xff picture "


def pose_at(seconds):
    """Place and rotation (scalar first) of a vehicle on a circle, in the map's frame."""
    angle = 0.2 * np.asarray(seconds)
    xyz = np.stack([600 + 40 * np.sin(angle), 1600 - 40 * np.cos(angle), 0 * angle], axis=-1)
    return xyz, np.stack([np.cos(angle / 2), 0 * angle, 0 * angle, np.sin(angle / 2)], axis=-1)


@pytest.fixture
def root(tmp_path):
    """A scene of 10 s: camera at 12 Hz (2 Hz of them key frames), laser at 20 Hz."""
    for folder in ("v1.0-mini", "samples/CAM_FRONT", "sweeps/CAM_FRONT", "can_bus"):
        (tmp_path / folder).mkdir(parents=True)
    tables = {name: [] for name in ("sample", "sample_data", "ego_pose")}
    tables["log"] = [{"token": "l", "vehicle": "n015", "location": "singapore-onenorth"}]
    tables["scene"] = [{"token": "s", "name": "scene-0061", "log_token": "l"}]
    tables["sensor"] = [{"token": "c", "channel": "CAM_FRONT"}, {"token": "t", "channel": "LIDAR_TOP"}]
    matrix = [[1266.4, 0, 816.2], [0, 1266.4, 491.5], [0, 0, 1]]
    tables["calibrated_sensor"] = [
        {"token": "cc", "sensor_token": "c", "camera_intrinsic": matrix},
        {"token": "tt", "sensor_token": "t", "camera_intrinsic": []},
    ]
    tables["sample"] = [{"token": f"sample{number}", "scene_token": "s"} for number in range(20)]
    for sensor, rate in (("cc", 12), ("tt", 20)):
        for number in range(10 * rate):
            token, seconds = f"{sensor}{number}", number / rate + (0.013 if sensor == "tt" else 0)
            kind = "samples" if number % 6 == 0 else "sweeps"
            file = f"{kind}/CAM_FRONT/{number:04d}.jpg" if sensor == "cc" else f"{kind}/LIDAR_TOP/{number}.bin"
            if sensor == "cc":
                (tmp_path / file).write_bytes(JPEG + bytes([number]))
            stamp = BEGAN_US + round(seconds * 1e6)
            row = {"token": token, "sample_token": f"sample{int(seconds * 2)}", "ego_pose_token": token}
            row |= {"calibrated_sensor_token": sensor, "timestamp": stamp, "filename": file, "width": 1600}
            tables["sample_data"].append(row | {"height": 900})
            xyz, rotation = pose_at(seconds)
            pose = {"token": token, "timestamp": stamp, "translation": xyz.tolist(), "rotation": rotation.tolist()}
            tables["ego_pose"].append(pose)
    for name, rows in tables.items():
        (tmp_path / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows[::-1], indent=0))
    return tmp_path


def can_bus(root, *, shift_m=0.0):
    rows = []
    for number in range(500):
        xyz, rotation = pose_at(number * 0.02)
        stamp = BEGAN_US + number * 20_000
        rows.append(
            {"utime": stamp, "pos": (xyz + np.array([shift_m, 0, 0])).tolist(), "orientation": rotation.tolist()}
        )
    (root / "can_bus/scene-0061_pose.json").write_text(json.dumps(rows))


def test_sweeps_and_the_poses_of_all_sensors(root):
    (drive,) = drives(root)
    assert (drive.name, drive.point, drive.dropped) == ("scene-0061", "rear axle", [])
    front = drive.cameras["camera_front_wide_120fov"]
    assert len(front.times_us) == 120
    assert front.times_us[:2].tolist() == [BEGAN_US, BEGAN_US + 83_333]
    assert list(front.read(5, 7)) == [JPEG + b"\x05", JPEG + b"\x06"]  # a sweep, and the key frame behind it
    seconds = (drive.track.timestamps_us - BEGAN_US) / 1e6
    assert len(seconds) == 320
    xyz, rotation = pose_at(seconds)
    np.testing.assert_allclose(drive.track.xyz, xyz, atol=1e-4)
    np.testing.assert_allclose(drive.track.quaternion_xyzw[:, [3, 0, 1, 2]], rotation, atol=1e-6)
    lens = drive.calibration["camera_front_wide_120fov"]
    assert (lens["K"][0], lens["K"][2], lens["K"][5], lens["width"]) == (1266.4, 816.2, 491.5, 1600)
    assert drive.facts["frame"] == "the map's of singapore-onenorth"


def test_the_can_bus_is_taken_where_it_is_and_agrees(root):
    can_bus(root)
    (drive,) = drives(root / "v1.0-mini")
    assert drive.facts["poses"].startswith("can_bus, 0.0")
    assert np.diff(drive.track.timestamps_us).tolist() == [20_000] * 499
    xyz, _ = pose_at(np.arange(500) * 0.02)
    np.testing.assert_allclose(drive.track.xyz, xyz, atol=1e-6)
    can_bus(root, shift_m=3.0)
    (refused,) = drives(root)
    assert isinstance(refused, Dropped)
    assert "3.00 m and 0.0" in refused.reason
    (drive,) = drives(root, pose="ego_pose")
    assert len(drive.track.timestamps_us) == 320
    (root / "can_bus/scene-0061_pose.json").unlink()
    (refused,) = drives(root, pose="can_bus")
    assert "is not there; take --pose ego_pose" in refused.reason


def test_absent_sweeps_are_counted_and_names_stay_inside(root):
    (root / "sweeps/CAM_FRONT/0007.jpg").unlink()
    (drive,) = drives(root)
    (dropped,) = drive.dropped
    assert (dropped.count, "0007.jpg" in dropped.reason) == (1, True)
    table = root / "v1.0-mini/sample_data.json"
    table.write_text(table.read_text().replace("sweeps/CAM_FRONT/0008.jpg", "../../etc/passwd"))
    (refused,) = drives(root)
    assert "../../etc/passwd" in refused.reason
    with pytest.raises(UsageError, match="CAM_FRONT"):
        list(drives(root, camera=("camera_front_wide_120fov=CAM_NONE",)))
    shutil.rmtree(root / "samples")
    shutil.rmtree(root / "sweeps")
    (alone,) = drives(root)
    assert (alone.cameras, alone.calibration, alone.dropped[0].what) == ({}, {}, "cameras")
    (root / "v1.0-mini/sensor.json").write_text("[]")
    with pytest.raises(UsageError, match="do not fit together"):
        list(drives(root))


@pytest.mark.parametrize("size", [1, 7, 64, 2**20])
def test_tables_are_read_row_by_row(tmp_path, monkeypatch, size):
    monkeypatch.setattr(nuscenes, "CHUNK_BYTES", size)
    rows = [{"token": "a", "text": 'ü ] "', "list": [1, {"b": []}]}, {"token": "b"}]
    file = tmp_path / "table.json"
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    assert list(rows_of(file)) == rows
    file.write_text(json.dumps(rows)[:-4])
    with pytest.raises(ValueError, match="cut off"):
        list(rows_of(file))
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="no JSON list"):
        list(rows_of(file))
