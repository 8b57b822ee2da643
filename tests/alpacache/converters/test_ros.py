"""Logs of robots, written by the formats' own libraries, against the drive that they were written from."""

import base64
import json
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.converters import unpacking
from alpacache.converters.drive import Arrays, Packets, Pictures
from alpacache.converters.messages import fetched
from alpacache.converters.ros import drives, list_topics, open_log
from alpacache.converters.ros_pictures import is_key_packet, raw_picture
from alpacache.converters.transforms import FrameTree
from alpacache.converters.writer import convert
from alpacache.driving.cameras import CAMERAS, FRONT_CAMERA
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.sources.folder import FolderSource

pytestmark = pytest.mark.system  # whole conversions

mcap_writer = pytest.importorskip("mcap_ros2.writer")
rosbag1 = pytest.importorskip("rosbags.rosbag1")
rosbag2 = pytest.importorskip("rosbags.rosbag2")

BEGAN_NS = 1_700_000_000_123_456_789
"""A wall clock's time, not a whole microsecond."""
ARRIVAL_NS = 8_000_000
IMAGE, ODOM, FIX, IMU, TWIST = "/camera/front/compressed", "/localization/kinematic_state", "/fix", "/imu", "/twist"

_HEADER = """std_msgs/Header header
"""
_PARTS = """
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: geometry_msgs/Pose
geometry_msgs/Point position
geometry_msgs/Quaternion orientation
================================================================================
MSG: geometry_msgs/Point
float64 x
float64 y
float64 z
================================================================================
MSG: geometry_msgs/Quaternion
float64 x
float64 y
float64 z
float64 w
================================================================================
MSG: geometry_msgs/Vector3
float64 x
float64 y
float64 z
================================================================================
MSG: geometry_msgs/Twist
geometry_msgs/Vector3 linear
geometry_msgs/Vector3 angular
================================================================================
MSG: geometry_msgs/PoseWithCovariance
geometry_msgs/Pose pose
float64[36] covariance
================================================================================
MSG: geometry_msgs/TwistWithCovariance
geometry_msgs/Twist twist
float64[36] covariance
================================================================================
MSG: geometry_msgs/Transform
geometry_msgs/Vector3 translation
geometry_msgs/Quaternion rotation
================================================================================
MSG: sensor_msgs/NavSatStatus
int8 status
uint16 service
================================================================================
MSG: geometry_msgs/TransformStamped
std_msgs/Header header
string child_frame_id
geometry_msgs/Transform transform
"""
SCHEMAS = {
    "sensor_msgs/msg/CompressedImage": _HEADER + "string format\nuint8[] data" + _PARTS,
    "sensor_msgs/msg/Image": _HEADER
    + "uint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data"
    + _PARTS,
    "nav_msgs/msg/Odometry": _HEADER
    + "string child_frame_id\ngeometry_msgs/PoseWithCovariance pose\ngeometry_msgs/TwistWithCovariance twist"
    + _PARTS,
    "geometry_msgs/msg/PoseStamped": _HEADER + "geometry_msgs/Pose pose" + _PARTS,
    "geometry_msgs/msg/TwistStamped": _HEADER + "geometry_msgs/Twist twist" + _PARTS,
    "tf2_msgs/msg/TFMessage": "geometry_msgs/TransformStamped[] transforms" + _PARTS,
    "sensor_msgs/msg/NavSatFix": _HEADER
    + "sensor_msgs/NavSatStatus status\nfloat64 latitude\nfloat64 longitude\nfloat64 altitude"
    + _PARTS,
    "sensor_msgs/msg/Imu": _HEADER + "geometry_msgs/Quaternion orientation" + _PARTS,
    "foxglove_msgs/msg/CompressedVideo": "builtin_interfaces/Time timestamp\nstring frame_id\n"
    "uint8[] data\nstring format",
}


def stamp(ns):
    return {"sec": int(ns) // 10**9, "nanosec": int(ns) % 10**9}


def header(ns, frame="map"):
    return {"stamp": stamp(ns), "frame_id": frame}


def vector(xyz):
    return dict(zip("xyz", map(float, xyz), strict=True))


def quaternion(xyzw):
    return dict(zip("xyzw", map(float, xyzw), strict=True))


def pose(track, at):
    return {"position": vector(track.xyz[at]), "orientation": quaternion(track.quaternion_xyzw[at])}


@pytest.fixture
def times_ns(curved):
    return BEGAN_NS + curved.track.timestamps_us * 1000


def image_messages(curved, times_ns, *, step=2):
    for at in range(0, 400, step):
        value = {
            "header": header(times_ns[at], "camera"),
            "format": "rgb8; jpeg compressed bgr8",
            "data": curved.jpegs[at],
        }
        yield IMAGE, "sensor_msgs/msg/CompressedImage", times_ns[at], value


def odometry_messages(curved, times_ns, child="base_link"):
    still = {"twist": {"linear": vector([0] * 3), "angular": vector([0] * 3)}, "covariance": [0.0] * 36}
    for at in range(400):
        value = {"header": header(times_ns[at]), "child_frame_id": child, "twist": still}
        value["pose"] = {"pose": pose(curved.track, at), "covariance": [0.0] * 36}
        yield ODOM, "nav_msgs/msg/Odometry", times_ns[at], value


def write_mcap(path, *streams, late_ns=ARRIVAL_NS, **options):
    """Messages in the order of their arrival, as CDR."""
    schemas = {}
    with open(path, "wb") as file:
        writer = mcap_writer.Writer(file, **options)
        messages = sorted((message for stream in streams for message in stream), key=lambda message: message[2])
        for topic, kind, ns, value in messages:
            if kind not in schemas:
                schemas[kind] = writer.register_msgdef(kind, SCHEMAS[kind])
            writer.write_message(topic, schemas[kind], value, log_time=int(ns) + late_ns, publish_time=int(ns))
        writer.finish()
    return path


def only(place, **options):
    (drive,) = drives(place, **options)
    return drive


def assert_same_drive(drive, curved, times_ns, *, step=2):
    """Positions to 1 cm, headings to 0.05 degrees, times to 1 us, pictures byte for byte."""
    expected_us = (times_ns + 500) // 1000
    assert drive.track.timestamps_us.tolist() == expected_us.tolist()
    assert np.abs(drive.track.xyz - curved.track.xyz).max() < 1e-6
    turned = Rotation.from_quat(drive.track.quaternion_xyzw) * Rotation.from_quat(curved.track.quaternion_xyzw).inv()
    assert np.rad2deg(turned.magnitude().max()) < 1e-6
    camera = drive.cameras[FRONT_CAMERA]
    assert isinstance(camera, Pictures)
    assert camera.times_us.tolist() == expected_us[::step].tolist()
    assert list(camera.read(0, len(camera.times_us))) == curved.jpegs[::step]
    assert list(camera.read(50, 53)) == curved.jpegs[::step][50:53]


def test_an_mcap_of_ros_2_becomes_the_drive_it_was_written_from(curved, times_ns, tmp_path):
    path = write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), odometry_messages(curved, times_ns))
    drive = only(path)
    assert_same_drive(drive, curved, times_ns)
    assert drive.facts["poses"]["arrival_after_stamp_ms"] == {"median": 8.0, "least": 8.0, "most": 8.0}
    assert (drive.point, drive.dropped) == ("rear axle", [])
    late = only(path, stamp="log")
    assert late.track.timestamps_us.tolist() == ((times_ns + ARRIVAL_NS + 500) // 1000).tolist()
    assert "time of arrival" in late.facts["poses"]["clock"]


def test_topics_are_listed_with_a_command(curved, times_ns, tmp_path):
    path = write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), odometry_messages(curved, times_ns))
    listing = list_topics(path, kind="mcap")
    assert listing.rows[0] == [IMAGE, "sensor_msgs/CompressedImage", "200", "10.0", "19.9", "camera"]
    assert listing.rows[1][:4] == [ODOM, "nav_msgs/Odometry", "400", "20.0"]
    assert listing.command == f"alpacache convert mcap {path} --out drives --camera front_wide={IMAGE} --pose {ODOM}"


def test_split_files_are_one_drive_and_static_frames_are_in_the_first(curved, times_ns, tmp_path):
    """Poses of an IMU that stands ahead of base_link and is turned; /tf_static, latched, is in the first file alone."""
    place, turn = np.array([1.2, -0.3, 0.5]), Rotation.from_euler("ZYX", [10, -4, 2], degrees=True)
    truth = Rotation.from_quat(curved.track.quaternion_xyzw)
    imu = SimpleNamespace(xyz=curved.track.xyz + truth.apply(place), quaternion_xyzw=(truth * turn).as_quat())
    frames = {"transform": {"translation": vector(place), "rotation": quaternion(turn.as_quat())}}
    static = {"transforms": [{"header": header(BEGAN_NS, "base_link"), "child_frame_id": "imu_link", **frames}]}
    folder = tmp_path / "split"
    folder.mkdir()
    odometry = list(odometry_messages(SimpleNamespace(track=imu), times_ns, child="imu_link"))
    images = list(image_messages(curved, times_ns))
    write_mcap(
        folder / "s_9.mcap", [("/tf_static", "tf2_msgs/msg/TFMessage", BEGAN_NS, static)], odometry[:150], images[:75]
    )
    write_mcap(folder / "s_10.mcap", odometry[150:], images[75:])
    drive = only(folder)
    assert_same_drive(drive, curved, times_ns)
    assert drive.facts["poses"]["moved"] == "from imu_link to base_link by /tf_static"
    (folder / "metadata.yaml").write_text(
        json.dumps(
            {
                "rosbag2_bagfile_information": {
                    "storage_identifier": "mcap",
                    "compression_mode": "",
                    "relative_file_paths": ["../../elsewhere/s_9.mcap", "s_10.mcap"],
                }
            }
        )
    )
    assert_same_drive(only(folder), curved, times_ns)
    (folder / "s_10.mcap").unlink()
    with pytest.raises(SourceError, match=r"s_10\.mcap of metadata\.yaml is not there"):
        only(folder)


def test_a_file_that_was_cut_off_is_read_as_far_as_its_chunks_are_whole(curved, times_ns, tmp_path):
    streams = (image_messages(curved, times_ns), odometry_messages(curved, times_ns))
    path = write_mcap(tmp_path / "a.mcap", *streams, chunk_size=100_000)
    whole = path.read_bytes()
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    drive = only(cut)
    count = len(drive.track.timestamps_us)
    assert 200 < count < 280
    assert np.abs(drive.track.xyz - curved.track.xyz[:count]).max() < 1e-6
    (lost,) = drive.dropped
    assert (lost.what, lost.count) == ("ends of files", 1)
    assert "without a footer" in lost.reason
    frames = len(drive.cameras[FRONT_CAMERA].times_us)
    assert list(drive.cameras[FRONT_CAMERA].read(0, frames)) == curved.jpegs[::2][:frames]
    assert list_topics(cut, kind="mcap").rows[1][2] == str(count)
    # A chunk that is damaged is left out, and the others are read.
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    cut.write_bytes(bytes(damaged))
    drive = only(cut)
    assert [drop.what for drop in drive.dropped] == ["chunks"]
    assert 300 < len(drive.track.timestamps_us) < 400
    cut.write_bytes(whole[:4])
    with pytest.raises(SourceError, match="is neither MCAP nor a bag of ROS"):
        only(cut)


def test_stamps_that_were_not_set_are_refused_or_said(curved, times_ns, tmp_path):
    odometry = list(odometry_messages(curved, times_ns))
    for _, _, _, value in odometry[:3]:
        value["header"]["stamp"] = stamp(0)
    path = write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), odometry)
    drive = only(path)
    (drop,) = drive.dropped
    assert (drop.what, drop.count) == ("poses", 3)
    assert "stamp is 0" in drop.reason
    for _, _, _, value in odometry:
        value["header"]["stamp"] = stamp(0)
    path = write_mcap(tmp_path / "b.mcap", image_messages(curved, times_ns), odometry)
    with pytest.raises(UsageError, match=r"the stamps of all 400 messages of .* are 0.* --stamp log"):
        only(path)
    assert len(only(path, stamp="log").track.timestamps_us) == 400


def test_clocks_that_do_not_meet_are_refused(curved, times_ns, tmp_path):
    path = write_mcap(
        tmp_path / "a.mcap", image_messages(curved, times_ns - BEGAN_NS + 10**9), odometry_messages(curved, times_ns)
    )
    with pytest.raises(UsageError, match="have no time in common by their stamps"):
        only(path)


def test_a_tree_of_frames_is_interpolated_edge_by_edge(curved, times_ns, tmp_path):
    """map -> odom every 0.5 s, odom -> base_link at 20 Hz; the product is the drive."""
    truth = Rotation.from_quat(curved.track.quaternion_xyzw)
    yaw = 0.02 * curved.track.timestamps_us / 1e6  # odom turns in map, steadily
    odom_turn, odom_at = Rotation.from_euler("Z", yaw[:, None]), np.stack([0.1 * yaw, 0 * yaw, 0 * yaw], axis=1) * 50
    inner = SimpleNamespace(
        xyz=odom_turn.inv().apply(curved.track.xyz - odom_at), quaternion_xyzw=(odom_turn.inv() * truth).as_quat()
    )

    def message(at, parent, child, xyz, turn):
        transform = {"translation": vector(xyz), "rotation": quaternion(turn)}
        item = {"header": header(times_ns[at], parent), "child_frame_id": child, "transform": transform}
        return "/tf", "tf2_msgs/msg/TFMessage", times_ns[at], {"transforms": [item]}

    slow = [message(at, "map", "odom", odom_at[at], odom_turn[at].as_quat()) for at in (*range(0, 400, 10), 399)]
    fast = [message(at, "odom", "base_link", inner.xyz[at], inner.quaternion_xyzw[at]) for at in range(400)]
    path = write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), slow, fast)
    drive = only(path)
    assert_same_drive(drive, curved, times_ns)
    assert drive.facts["poses"]["chain"] == ["odom", "base_link"]
    assert drive.facts["poses"]["frame"] == "map"
    odometry = only(path, pose="/tf:odom,base_link")
    assert np.abs(odometry.track.xyz - inner.xyz).max() < 1e-9
    with pytest.raises(UsageError, match="no transform leads from lidar to map; frames: base_link, map, odom"):
        only(path, pose="/tf:map,lidar")


def test_transforms_take_the_logs_time_where_asked_and_unset_ones_are_left_out(curved, times_ns, tmp_path):
    """Each transform has a stamp of its own: one that was not set does not take its neighbour with it."""

    def messages(*, set_stamps):
        for at in range(400):
            place = pose(curved.track, at)
            moved = {"translation": place["position"], "rotation": place["orientation"]}
            still = {"translation": vector([0, 0, 1]), "rotation": quaternion([0, 0, 0, 1])}
            told = header(times_ns[at] if set_stamps else 0, "map")
            items = [
                {"header": header(0, "base_link"), "child_frame_id": "wheel", "transform": still},
                {"header": told, "child_frame_id": "base_link", "transform": moved},
            ]
            yield "/tf", "tf2_msgs/msg/TFMessage", times_ns[at], {"transforms": items}

    drive = only(write_mcap(tmp_path / "a.mcap", messages(set_stamps=True)), pose="/tf")
    assert drive.track.timestamps_us.tolist() == ((times_ns + 500) // 1000).tolist()
    assert [(drop.what, drop.count) for drop in drive.dropped] == [("poses", 400)]
    path = write_mcap(tmp_path / "b.mcap", messages(set_stamps=False))
    with pytest.raises(UsageError, match="stamps of all 800 messages of /tf are 0"):
        only(path, pose="/tf")
    drive = only(path, pose="/tf", stamp="log")
    assert drive.track.timestamps_us.tolist() == ((times_ns + ARRIVAL_NS + 500) // 1000).tolist()
    assert np.abs(drive.track.xyz - curved.track.xyz).max() < 1e-6


def test_poses_of_other_frames_on_one_topic_are_left_out(curved, times_ns, tmp_path):
    others = [
        (topic, kind, ns + 25_000_000, {**value, "child_frame_id": "imu_link"})
        for topic, kind, ns, value in list(odometry_messages(curved, times_ns))[:60:2]
    ]
    drive = only(write_mcap(tmp_path / "a.mcap", others, odometry_messages(curved, times_ns)))
    assert len(drive.track.timestamps_us) == 400
    (drop,) = drive.dropped
    assert (drop.what, drop.count) == ("poses", 30)
    assert "of map -> imu_link, and most are of map -> base_link" in drop.reason


def test_fixes_and_headings_become_metres_east_and_north(curved, times_ns, tmp_path):
    """Against an independent way: geodetic from ECEF by iteration, on GRS's numbers of WGS 84."""
    latitude0, longitude0, height0 = 48.1, 11.6, 520.0
    equator, squared = 6_378_137.0, 6.69437999014e-3

    def ecef(latitude, longitude, height):
        lat, lon = np.deg2rad(latitude), np.deg2rad(longitude)
        normal = equator / np.sqrt(1 - squared * np.sin(lat) ** 2)
        flat = (normal + height) * np.cos(lat)
        return np.array([flat * np.cos(lon), flat * np.sin(lon), (normal * (1 - squared) + height) * np.sin(lat)])

    lat, lon = np.deg2rad([latitude0, longitude0])
    east = [-np.sin(lon), np.cos(lon), 0]
    north = [-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)]
    up = [np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)]
    fixes = []
    for at in range(0, 400, 4):
        target = ecef(latitude0, longitude0, height0) + np.stack([east, north, up]).T @ curved.track.xyz[at]
        guess = np.array([latitude0, longitude0, height0])
        for _ in range(8):  # Newton's method on the ellipsoid itself
            miss = target - ecef(*guess)
            slope = np.stack(
                [(ecef(*(guess + step)) - ecef(*guess)) / step.sum() for step in np.diag([1e-6, 1e-6, 1e-2])]
            ).T
            guess = guess + np.linalg.solve(slope, miss)
        value = {"header": header(times_ns[at], "gps"), "status": {"status": 0, "service": 1}}
        value |= dict(zip(("latitude", "longitude", "altitude"), guess, strict=True))
        fixes.append((FIX, "sensor_msgs/msg/NavSatFix", times_ns[at], value))
    lost = {**value, "status": {"status": -1, "service": 1}, "latitude": 0.0, "longitude": 0.0}
    fixes.append((FIX, "sensor_msgs/msg/NavSatFix", times_ns[202], {**lost, "header": header(times_ns[202], "gps")}))
    level = Rotation.from_euler("Z", curved.yaw_rad[:, None]).as_quat()
    imu = [
        (
            IMU,
            "sensor_msgs/msg/Imu",
            times_ns[at],
            {"header": header(times_ns[at], "imu"), "orientation": quaternion(level[at])},
        )
        for at in range(400)
    ]
    path = write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), fixes, imu)
    drive = only(path, pose=FIX)
    count = len(drive.track.timestamps_us)
    assert count == 396  # up to the last fix
    expected = curved.track.xyz[:count] - curved.track.xyz[0]
    assert np.abs(drive.track.xyz - expected)[::4].max() < 1e-3
    assert np.abs(drive.track.xyz - expected).max() < 0.05  # between fixes at 5 Hz
    yaw = Rotation.from_quat(drive.track.quaternion_xyzw).as_euler("ZYX")[:, 0]
    assert np.abs(np.unwrap(yaw) - curved.yaw_rad[:count]).max() < 1e-4  # north turns by that on the way east
    assert drive.point == "antenna"
    assert [(drop.count, drop.reason) for drop in drive.dropped] == [(1, "/fix: status -1, no fix")]
    path = write_mcap(tmp_path / "b.mcap", image_messages(curved, times_ns), fixes)
    with pytest.raises(UsageError, match=r"positions without headings; name a topic .* --heading"):
        only(path, pose=FIX)


def test_twists_are_integrated_and_not_over_gaps(curved, times_ns, tmp_path):
    time_s = curved.track.timestamps_us / 1e6
    turning = np.gradient(curved.yaw_rad, time_s)

    def messages(numbers):
        for at in numbers:
            twist = {"linear": vector([curved.speed_mps[at], 0, 0]), "angular": vector([0, 0, turning[at]])}
            yield (
                TWIST,
                "geometry_msgs/msg/TwistStamped",
                times_ns[at],
                {"header": header(times_ns[at]), "twist": twist},
            )

    path = write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), messages(range(400)))
    found = only(path, pose=TWIST).track
    start = Rotation.from_euler("Z", curved.yaw_rad[0])
    expected = start.inv().apply(curved.track.xyz - curved.track.xyz[0])
    driven = np.linalg.norm(np.diff(curved.track.xyz, axis=0), axis=1).sum()
    assert np.linalg.norm((found.xyz - expected)[:, :2], axis=1).max() < 0.005 * driven
    yaw = Rotation.from_quat(found.quaternion_xyzw).as_euler("ZYX")[:, 0]
    assert np.rad2deg(np.abs(np.unwrap(yaw) - (curved.yaw_rad - curved.yaw_rad[0])).max()) < 0.05
    path = write_mcap(tmp_path / "b.mcap", image_messages(curved, times_ns), messages([*range(100), *range(130, 400)]))
    drive = only(path, pose=TWIST)
    assert len(drive.track.timestamps_us) == 270
    assert drive.dropped[0].count == 100
    assert "beyond a gap" in drive.dropped[0].reason


def test_a_camera_frame_that_looks_along_z_is_turned(curved, times_ns, tmp_path):
    """x right, y down, z forward, as the public rule for optical frames has it."""
    optical = Rotation.from_matrix(np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float))  # optical axes in the body
    truth = Rotation.from_quat(curved.track.quaternion_xyzw)
    seen = SimpleNamespace(track=SimpleNamespace(xyz=curved.track.xyz, quaternion_xyzw=(truth * optical).as_quat()))
    odometry = odometry_messages(seen, times_ns, child="front_camera_optical_frame")
    drive = only(write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), odometry))
    assert_same_drive(drive, curved, times_ns)
    assert drive.point == "camera"


def test_which_topic_is_said_when_it_cannot_be_told(curved, times_ns, tmp_path):
    images = list(image_messages(curved, times_ns))
    other = [("/camera/rear_tele/compressed", *message[1:]) for message in images]
    poses = [
        ("/a", "geometry_msgs/msg/PoseStamped", ns, {"header": header(ns), "pose": pose(curved.track, at)})
        for at, ns in enumerate(times_ns)
    ]
    path = write_mcap(tmp_path / "a.mcap", images, other, poses, [("/b", *message[1:]) for message in poses])
    with pytest.raises(UsageError, match=r"2 topics have pictures: /camera/front/compressed, /camera/rear_tele"):
        only(path)
    with pytest.raises(UsageError, match=r"poses can be made of /a, /b; say which with --pose"):
        only(path, camera=[f"front_wide={IMAGE}"])
    with pytest.raises(UsageError, match=r"/c is no topic of .*; its topics: /a, /b,"):
        only(path, camera=[f"front_wide={IMAGE}"], pose="/c")
    with pytest.raises(UsageError, match=r"/a is of type geometry_msgs/PoseStamped, which holds no pictures"):
        only(path, camera=["front_wide=/a"], pose="/a")
    drive = only(path, camera=[f"front_wide={IMAGE}", "rear_tele=/camera/rear_tele/compressed"], pose="/a")
    assert set(drive.cameras) == {FRONT_CAMERA, CAMERAS[4]}
    assert_same_drive(drive, curved, times_ns)


def test_json_messages_are_read(curved, times_ns, tmp_path):
    """As bridges and simulators write them: base64, `timestamp` with `nsec`, foxglove's names."""
    from mcap.writer import Writer

    path = tmp_path / "a.mcap"
    with open(path, "wb") as file:
        writer = Writer(file)
        writer.start()
        channels = {}
        for topic, name in ((IMAGE, "foxglove.CompressedImage"), ("/tf", "foxglove.FrameTransforms")):
            schema = writer.register_schema(name, "jsonschema", b"{}")
            channels[topic] = writer.register_channel(topic, "json", schema)
        for at, ns in enumerate(times_ns):
            time = {"sec": int(ns) // 10**9, "nsec": int(ns) % 10**9}
            move = {
                "translation": vector(curved.track.xyz[at]),
                "rotation": quaternion(curved.track.quaternion_xyzw[at]),
            }
            frames = {
                "transforms": [{"timestamp": time, "parent_frame_id": "map", "child_frame_id": "ego/base_link", **move}]
            }
            values = {"/tf": frames}
            if at % 2 == 0:
                data = base64.b64encode(curved.jpegs[at]).decode()
                values[IMAGE] = {"timestamp": time, "frame_id": "camera", "format": "jpeg", "data": data}
            for topic, value in values.items():
                writer.add_message(channels[topic], int(ns), json.dumps(value).encode(), int(ns))
        writer.finish()
    assert_same_drive(only(path), curved, times_ns)


def bag_messages(store, curved, times_ns, *, ros1):
    from rosbags.typesys.stores import ros1_noetic, ros2_humble  # noqa: F401

    types = store.types
    head, at_time = types["std_msgs/msg/Header"], types["builtin_interfaces/msg/Time"]

    def header_of(ns, frame, seq):
        time = at_time(sec=int(ns) // 10**9, nanosec=int(ns) % 10**9)
        return head(seq=seq, stamp=time, frame_id=frame) if ros1 else head(stamp=time, frame_id=frame)

    point, turn = types["geometry_msgs/msg/Point"], types["geometry_msgs/msg/Quaternion"]
    for at, ns in enumerate(times_ns):
        place = point(*map(float, curved.track.xyz[at]))
        value = types["geometry_msgs/msg/Pose"](place, turn(*map(float, curved.track.quaternion_xyzw[at])))
        kind = "geometry_msgs/msg/PoseStamped"
        yield "/pose", kind, ns, types[kind](header_of(ns, "map", at), value)
        if at % 2 == 0:
            kind = "sensor_msgs/msg/CompressedImage"
            data = np.frombuffer(curved.jpegs[at], np.uint8)
            yield IMAGE, kind, ns, types[kind](header_of(ns, "camera", at), "jpeg", data)


def fill(writer, store, curved, times_ns, *, ros1):
    """Write the drive's messages into a bag that is not open yet."""
    serialize = store.serialize_ros1 if ros1 else store.serialize_cdr
    with writer:
        connections = {}
        for topic, kind, ns, value in bag_messages(store, curved, times_ns, ros1=ros1):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(connections[topic], int(ns) + ARRIVAL_NS, serialize(value, kind))


def write_ros_1_bag(folder, curved, times_ns, *, compression, chunk_bytes=None):
    from rosbags.typesys import Stores, get_typestore

    path = folder / "a.bag"
    writer = rosbag1.Writer(path)
    if chunk_bytes is not None:
        writer.chunk_threshold = chunk_bytes
    if compression != "NONE":
        writer.set_compression(writer.CompressionFormat[compression])
    fill(writer, get_typestore(Stores.ROS1_NOETIC), curved, times_ns, ros1=True)
    return path


def test_a_bag_of_ros_1_becomes_the_drive_it_was_written_from(curved, times_ns, tmp_path):
    path = write_ros_1_bag(tmp_path, curved, times_ns, compression="LZ4")
    drive = only(path)
    assert_same_drive(drive, curved, times_ns)
    assert drive.facts["poses"]["arrival_after_stamp_ms"]["median"] == 8.0
    assert list_topics(path, kind="rosbag").rows[1][:4] == ["/pose", "geometry_msgs/PoseStamped", "400", "20.0"]


@pytest.mark.parametrize("compression", ["NONE", "BZ2", "LZ4"])
def test_a_bag_of_ros_1_that_was_cut_off_is_read_as_far_as_it_is_whole(curved, times_ns, tmp_path, compression):
    path = write_ros_1_bag(tmp_path, curved, times_ns, compression=compression, chunk_bytes=100_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    drive = only(path)
    count = len(drive.track.timestamps_us)
    assert 200 < count < 280
    assert np.abs(drive.track.xyz - curved.track.xyz[:count]).max() < 1e-6
    assert drive.facts["poses"]["arrival_after_stamp_ms"]["median"] == 8.0
    frames = len(drive.cameras[FRONT_CAMERA].times_us)
    assert list(drive.cameras[FRONT_CAMERA].read(3, frames)) == curved.jpegs[::2][3:frames]
    assert [drop.what for drop in drive.dropped] == ["ends of files"]
    assert "ends without its index" in drive.dropped[0].reason
    assert list_topics(path, kind="rosbag").rows[1][:3] == ["/pose", "geometry_msgs/PoseStamped", str(count)]


def write_bag(path, curved, times_ns, *, compression="none", storage="SQLITE3"):
    """A bag of ROS 2, in SQLite or MCAP."""
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    writer = rosbag2.Writer(path, version=8, storage_plugin=rosbag2.StoragePlugin[storage])
    if compression != "none":
        writer.set_compression(rosbag2.CompressionMode[compression.upper()], rosbag2.CompressionFormat.ZSTD)
    fill(writer, store, curved, times_ns, ros1=False)


def replaced_message(database, data, *, topic="/pose", number=100):
    """Put other bytes in the place of one message of a bag in SQLite."""
    with closing(sqlite3.connect(database)) as opened, opened:
        of_topic = "SELECT messages.id FROM messages JOIN topics ON topic_id = topics.id WHERE name = ? ORDER BY 1"
        (row, *_) = opened.execute(of_topic, (topic,)).fetchall()[number]
        opened.execute("UPDATE messages SET data = ? WHERE id = ?", (data, row))


@pytest.mark.parametrize("storage", ["SQLITE3", "MCAP"])
@pytest.mark.parametrize("compression", ["none", "message", "file"])
def test_a_bag_of_ros_2_becomes_the_drive_it_was_written_from(curved, times_ns, tmp_path, compression, storage):
    path = tmp_path / "a"
    write_bag(path, curved, times_ns, compression=compression, storage=storage)
    assert_same_drive(only(path), curved, times_ns)
    assert not list(Path(tempfile.gettempdir()).glob("alpacache-bag-*"))
    if compression == "none":
        (file,) = (file for file in path.iterdir() if file.suffix in (".db3", ".mcap"))
        assert_same_drive(only(file), curved, times_ns)


def test_a_message_that_unfolds_beyond_what_a_log_has_is_left_out(curved, times_ns, tmp_path, monkeypatch):
    import zstandard

    write_bag(tmp_path / "a", curved, times_ns, compression="message")
    (db3,) = (tmp_path / "a").glob("*.db3")
    replaced_message(db3, zstandard.compress(bytes(2**24)))
    replaced_message(db3, zstandard.compress(bytes(2**10))[:-3], number=101)
    monkeypatch.setattr(unpacking, "MOST_CHUNK_BYTES", 2**20)
    drive = only(tmp_path / "a")
    assert len(drive.track.timestamps_us) == 398
    assert [(drop.what, drop.count) for drop in drive.dropped] == [("messages", 2)]
    assert "it unfolds to more than 1,048,576 bytes" in drive.dropped[0].reason


def test_a_file_that_unfolds_beyond_any_recording_is_refused(curved, times_ns, tmp_path, monkeypatch):
    import zstandard

    write_bag(tmp_path / "a", curved, times_ns, compression="file")
    (packed,) = (tmp_path / "a").glob("*.zstd")
    whole = packed.read_bytes()
    monkeypatch.setattr(unpacking, "_SMALLEST_LIMIT_BYTES", 2**20)
    for content, message in (
        (zstandard.compress(bytes(2**28)), r"unfolds to more than 1,\d{3},\d{3} bytes"),
        (whole[: len(whole) // 2], r"lacks .* bytes|cannot be read as a bag"),
        (b"none of this is zstd", "cannot be unpacked"),
    ):
        packed.write_bytes(content)
        with pytest.raises(SourceError, match=message):
            only(tmp_path / "a")
    packed.write_bytes(whole)
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20 + 1000))
    with pytest.raises(SourceError, match=r"more than the 1,000 bytes free for it; set TMPDIR"):
        only(tmp_path / "a")
    assert not list(Path(tempfile.gettempdir()).glob("alpacache-bag-*"))


@pytest.mark.parametrize("damage", ["bomb", "flip"])
def test_a_damaged_chunk_of_a_bag_of_ros_1_is_refused(curved, times_ns, tmp_path, monkeypatch, damage):
    path = write_ros_1_bag(tmp_path, curved, times_ns, compression="BZ2")
    if damage == "bomb":
        monkeypatch.setattr(unpacking, "MOST_CHUNK_BYTES", 1000)
    else:
        whole = bytearray(path.read_bytes())
        whole[whole.index(b"BZh") + 1000] ^= 4
        path.write_bytes(whole)
    with pytest.raises(SourceError, match=r"a\.bag cannot be read as a bag .*Copy it again"):
        only(path)


def test_packets_of_video_begin_at_a_key_frame(curved, times_ns, tmp_path):
    import av

    film = tmp_path / "film.h264"
    with av.open(str(film), "w", format="h264") as movie:
        options = {"preset": "ultrafast", "g": "20", "bf": "0"}
        stream = movie.add_stream("libx264", rate=20, width=256, height=128, pix_fmt="yuv420p", options=options)
        for frame in curved.frames[:200]:
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))))
        movie.mux(stream.encode(None))
    with av.open(str(film)) as movie:
        packets = [(bytes(packet), packet.is_keyframe) for packet in movie.demux(movie.streams.video[0]) if packet.size]
    assert [is_key_packet(data, "h264") for data, _ in packets] == [bool(key) for _, key in packets]
    video = [
        (
            "/video",
            "foxglove_msgs/msg/CompressedVideo",
            times_ns[at],
            {"timestamp": stamp(times_ns[at]), "frame_id": "c", "data": packets[at][0], "format": "h264"},
        )
        for at in range(7, 200)
    ]
    path = write_mcap(tmp_path / "a.mcap", video, odometry_messages(curved, times_ns))
    drive = only(path)
    camera = drive.cameras[FRONT_CAMERA]
    assert isinstance(camera, Packets)
    assert camera.codec == "h264"
    assert camera.times_us.tolist() == ((times_ns[20:200] + 500) // 1000).tolist()
    assert list(camera.read()) == [data for data, _ in packets[20:]]
    (drop,) = drive.dropped
    assert (drop.count, "before the first key frame" in drop.reason) == (13, True)


def raw(encoding, data, width, height, step, **more):
    return SimpleNamespace(encoding=encoding, data=data.tobytes(), width=width, height=height, step=step, **more)


def test_raw_pictures_become_red_green_blue():
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)
    padded = np.zeros((6, 32), np.uint8)
    padded[:, :24] = rgb.reshape(6, 24)
    assert (raw_picture(raw("rgb8", padded, 8, 6, 32), where="t") == rgb).all()
    assert (raw_picture(raw("bgr8", np.ascontiguousarray(rgb[:, :, ::-1]), 8, 6, 24), where="t") == rgb).all()
    alpha = np.dstack([rgb[:, :, ::-1], np.full((6, 8), 255, np.uint8)])
    assert (raw_picture(raw("bgra8", alpha, 8, 6, 32), where="t") == rgb).all()
    grey = raw_picture(raw("mono16", np.arange(48, dtype="<u2").reshape(6, 8) * 256, 8, 6, 16), where="t")
    assert (grey[:, :, 1] == np.arange(48).reshape(6, 8)).all()
    flat = np.array([200, 100, 50], np.uint8)
    mosaic = np.empty((6, 8), np.uint8)
    mosaic[0::2, 0::2], mosaic[1::2, 1::2] = flat[0], flat[2]
    mosaic[0::2, 1::2] = mosaic[1::2, 0::2] = flat[1]
    assert (raw_picture(raw("bayer_rggb8", mosaic, 8, 6, 8), where="t") == flat).all()
    assert (raw_picture(raw("bayer_bggr8", mosaic, 8, 6, 8), where="t") == flat[::-1]).all()
    yuv = np.tile(np.array([128, 126, 128, 126], np.uint8), (6, 4))  # U Y V Y: a grey of (126 - 16) * 1.164
    assert (raw_picture(raw("yuv422", yuv, 8, 6, 16), where="t") == 128).all()
    red = np.tile(np.array([90, 81, 240, 81], np.uint8), (6, 4))  # BT.601's red in video range
    assert np.abs(raw_picture(raw("yuv422", red, 8, 6, 16), where="t").astype(int) - [255, 0, 0]).max() <= 2
    odd = np.tile(np.array([90, 81, 240, 81], np.uint8), (6, 2))  # three pixels, in two pairs
    assert raw_picture(raw("uyvy", odd, 3, 6, 8), where="t").shape == (6, 3, 3)
    odd = np.tile(np.array([81, 90, 81, 240], np.uint8), (6, 2))
    assert np.abs(raw_picture(raw("yuv422_yuy2", odd, 3, 6, 8), where="t").astype(int) - [255, 0, 0]).max() <= 2
    with pytest.raises(BadClipError, match="36 bytes for 6 rows of 6, 3 pixels wide as uyvy"):
        raw_picture(raw("uyvy", odd[:, :6], 3, 6, 6), where="t")
    with pytest.raises(BadClipError, match="144 bytes for 6 rows of 32"):
        raw_picture(raw("rgb8", rgb, 8, 6, 32), where="t")
    with pytest.raises(BadClipError, match="encoding '32fc1' is not read"):
        raw_picture(raw("32FC1", rgb, 8, 6, 24), where="t")


@pytest.mark.parametrize("big", [0, 1])
@pytest.mark.parametrize(
    ("encoding", "order"),
    [
        ("rgb", "rgb"),
        ("bgr", "bgr"),
        ("rgba", "rgba"),
        ("bgra", "bgra"),
        ("mono", "g"),
        ("UC1", "g"),
        ("UC3", "bgr"),
        ("UC4", "bgra"),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_raw_pictures_of_every_order_depth_and_padding(encoding, order, bits, big):
    """Values of each pixel in the order that the name says, 8 or 16 bits, rows longer than the picture."""
    name = f"{bits}{encoding}" if encoding.startswith("UC") else f"{encoding}{bits}"
    colours = np.random.default_rng(2).integers(0, 256, (5, 7, 4), np.uint8)
    values = np.stack([colours[:, :, "rgba".index(letter)] for letter in order], axis=2)
    if bits == 16:
        values = (values.astype(np.uint16) * 256 + 77).astype(">u2" if big else "<u2")
    width = values.itemsize * values.shape[2] * 7
    rows = np.full((5, width + 6), 99, np.uint8)
    rows[:, :width] = np.ascontiguousarray(values).view(np.uint8).reshape(5, -1)
    found = raw_picture(raw(name, rows, 7, 5, width + 6, is_bigendian=big), where="t")
    assert (found == (colours[:, :, [1, 1, 1]] if order == "g" else colours[:, :, :3])).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "grbg", "gbrg"])
def test_mosaics_of_every_pattern(pattern, bits):
    """Each pixel keeps the colour that it has; the others are means of its neighbours', here of a ramp."""
    y, x = np.mgrid[:8, :10]
    colours = np.stack([10 + 4 * x, 60 + 3 * y, 120 + 2 * x + 5 * y], axis=2).astype(np.uint8)
    letters = np.array([list(pattern[:2]), list(pattern[2:])])[y % 2, x % 2]
    mosaic = np.take_along_axis(colours, np.vectorize("rgb".index)(letters)[:, :, None], 2)[:, :, 0]
    data = mosaic if bits == 8 else mosaic.astype("<u2") * 256
    found = raw_picture(raw(f"bayer_{pattern}{bits}", data, 10, 8, 10 * bits // 8), where="t")
    assert (found == colours)[1:-1, 1:-1].all()
    for colour, letter in enumerate("rgb"):
        assert (found[:, :, colour] == mosaic)[letters == letter].all()


def test_raw_pictures_are_encoded_and_files_in_them_are_not(curved, times_ns, tmp_path):
    def messages(make):
        for at in range(0, 400, 2):
            value = {"header": header(times_ns[at]), "height": 128, "width": 256, "encoding": "rgb8", "is_bigendian": 0}
            yield "/image", "sensor_msgs/msg/Image", times_ns[at], value | {"step": 768, "data": make(at)}

    pixels = messages(lambda at: np.ascontiguousarray(curved.frames[at].transpose(1, 2, 0)).tobytes())
    drive = only(write_mcap(tmp_path / "a.mcap", pixels, odometry_messages(curved, times_ns)))
    assert isinstance(drive.cameras[FRONT_CAMERA], Arrays)
    (frame,) = drive.cameras[FRONT_CAMERA].read(3, 4)
    assert (frame == curved.frames[6].transpose(1, 2, 0)).all()
    files = messages(lambda at: curved.jpegs[at])  # says rgb8, holds JPEG
    assert_same_drive(
        only(write_mcap(tmp_path / "b.mcap", files, odometry_messages(curved, times_ns))), curved, times_ns
    )


def test_frames_out_of_order_are_put_in_order(curved, times_ns, tmp_path):
    images = list(image_messages(curved, times_ns))
    images[10], images[11] = (
        (*images[10][:3], images[11][3]),
        (*images[11][:3], images[10][3]),
    )  # arrived the wrong way round
    path = write_mcap(tmp_path / "a.mcap", images, odometry_messages(curved, times_ns))
    assert_same_drive(only(path), curved, times_ns)
    log = open_log(path)
    assert [message.topic for message in log.messages([ODOM])] == [ODOM] * 400
    assert list(fetched(log, IMAGE, [])) == []


def test_static_transforms_are_followed_both_ways():
    tree = FrameTree()
    for parent, child, x in (("base_link", "mount", 1.0), ("mount", "imu", 0.5), ("base_link", "camera", 2.0)):
        transform = {"translation": vector([x, 0, 0]), "rotation": quaternion([0, 0, 0, 1])}
        item = {"header": header(1, parent), "child_frame_id": child, "transform": transform}
        tree.take({"transforms": [item]}, static=True)
    assert tree.static_pose("base_link", "imu")[0].tolist() == [-1.5, 0, 0]
    assert tree.static_pose("imu", "base_link")[0].tolist() == [1.5, 0, 0]
    assert tree.static_pose("camera", "imu")[0].tolist() == [0.5, 0, 0]
    assert tree.static_pose("lidar", "imu") is None


def test_a_log_without_pictures_gives_its_poses_alone(curved, times_ns, tmp_path):
    path = write_mcap(tmp_path / "a.mcap", odometry_messages(curved, times_ns))
    report = convert(drives(path), tmp_path / "out", name="a", settings={})
    assert [drop.what for drop in report.dropped] == ["cameras"]
    source = FolderSource(tmp_path / "out")
    assert np.abs(source.track("a").xyz - curved.track.xyz).max() < 1e-6
    with pytest.raises(BadClipError, match="no camera_front_wide_120fov"):
        source.frame_times_us("a", FRONT_CAMERA)


@pytest.mark.parametrize("compression", ["LZ4", "NONE"])
def test_chunks_of_every_compression_are_read(curved, times_ns, tmp_path, compression):
    from mcap.writer import CompressionType

    options = {"compression": CompressionType[compression]}
    streams = (image_messages(curved, times_ns), odometry_messages(curved, times_ns))
    assert_same_drive(only(write_mcap(tmp_path / "a.mcap", *streams, **options)), curved, times_ns)


def test_a_chunk_that_unfolds_beyond_what_it_says_is_left_out(curved, times_ns, tmp_path):
    import zstandard
    from mcap.data_stream import RecordBuilder
    from mcap.records import Chunk

    path = write_mcap(tmp_path / "a.mcap", image_messages(curved, times_ns), odometry_messages(curved, times_ns))
    whole = path.read_bytes()
    bombs = RecordBuilder()
    packed = zstandard.compress(bytes(2**26))
    for says in (1000, 2**34):
        fields = {"message_start_time": 0, "message_end_time": 1, "uncompressed_crc": 0, "compression": "zstd"}
        Chunk(data=packed, uncompressed_size=says, **fields).write(bombs)
    begin = 8 + 9 + int.from_bytes(whole[9:17], "little")  # behind the magic and the header
    path.write_bytes(whole[:begin] + bombs.end() + whole[begin:])
    drive = only(path)
    assert_same_drive(drive, curved, times_ns)
    assert [drop.what for drop in drive.dropped] == ["chunks", "chunks"]
    assert "1,001 bytes or more, and says 1,000" in drive.dropped[0].reason
    assert "says that it holds 17,179,869,184 bytes" in drive.dropped[1].reason


def test_messages_that_cannot_be_decoded_are_counted(curved, times_ns, tmp_path):
    path = tmp_path / "a.mcap"
    images, odometry = list(image_messages(curved, times_ns)), list(odometry_messages(curved, times_ns))
    with open(path, "wb") as file:
        writer = mcap_writer.Writer(file)
        schemas = {kind: writer.register_msgdef(kind, SCHEMAS[kind]) for kind in (images[0][1], odometry[0][1])}
        for topic, kind, ns, value in sorted([*images, *odometry], key=lambda message: message[2]):
            writer.write_message(topic, schemas[kind], value, log_time=int(ns), publish_time=int(ns))
        channel = next(iter(writer._channel_ids.values()))
        writer._writer.add_message(channel, int(times_ns[-1]), b"\0\1\0\0abc", int(times_ns[-1]))
        writer.finish()
    drive = only(path)
    assert_same_drive(drive, curved, times_ns)
    assert [(drop.what, drop.count) for drop in drive.dropped] == [("messages", 1)]
    assert "cannot be decoded" in drive.dropped[0].reason


@pytest.mark.parametrize("name", ["a.bag", "a.mcap", "a.db3"])
def test_a_pipe_among_the_files_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match=rf"{name} cannot be read: it is a FIFO; expected a regular file"):
        open_log(tmp_path)
    listed = {"storage_identifier": "sqlite3", "relative_file_paths": [f"../elsewhere/{name}"]}
    (tmp_path / "metadata.yaml").write_text(json.dumps({"rosbag2_bagfile_information": listed}))
    with pytest.raises(SourceError, match=rf"{name} cannot be read: it is a FIFO; expected a regular file"):
        open_log(tmp_path)


def test_a_json_message_of_another_form_is_left_out_and_told(curved, times_ns, tmp_path):
    from mcap.writer import Writer

    path, at_pose = tmp_path / "a.mcap", "/pose"
    odd = {
        40: {"header": 3, "pose": {"position": [1], "orientation": None}},
        42: {"header": {"stamp": {"sec": 10**30, "nanosec": 0}}, "pose": {"position": {"x": 10**400}}},
        44: [],
        46: None,
        48: {"header": {"frame_id": {}}, "pose": {"position": {"x": "a"}}},
    }
    odd_pictures = {40: 10**13, 42: [300], 44: ["a"], 46: "%%", 48: 1.5}
    with open(path, "wb") as file:
        writer = Writer(file)
        writer.start()
        names = {IMAGE: "sensor_msgs/msg/CompressedImage", at_pose: "geometry_msgs/msg/PoseStamped"}
        channels = {
            topic: writer.register_channel(topic, "json", writer.register_schema(name, "jsonschema", b"{}"))
            for topic, name in names.items()
        }
        for at, ns in enumerate(times_ns):
            data = base64.b64encode(curved.jpegs[at]).decode()
            values = {
                at_pose: odd.get(at, {"header": header(ns), "pose": pose(curved.track, at)}),
                IMAGE: {"header": header(ns), "format": "jpeg", "data": odd_pictures.get(at, data)},
            }
            for topic, value in values.items():
                writer.add_message(channels[topic], int(ns), json.dumps(value).encode(), int(ns))
        writer.finish()
    drive = only(path)
    assert len(drive.track.timestamps_us) == len(drive.cameras[FRONT_CAMERA].times_us) == 395
    assert sum(drop.count for drop in drive.dropped) == 10
