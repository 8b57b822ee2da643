"""Segments of comma2k19 in their own layout."""

import re
import shutil

import av
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.converters.comma2k19 import drives
from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.errors import UsageError

COUNT = 60
NUMBERS = np.arange(COUNT)[:, None]
PLACE = np.deg2rad([37.5, -122.3])
ECCENTRICITY = 0.00669437999014


def motion():
    """Times (s, uneven), places in east, north, up (m) and vehicle to world, of a curve that climbs."""
    seconds = np.cumsum(np.random.default_rng(4).uniform(0.0487, 0.0513, COUNT))
    angle = 0.3 * seconds
    xyz = np.stack([80 * np.sin(angle), 80 * (1 - np.cos(angle)), 0.5 * seconds], axis=1)
    return seconds, xyz - xyz[0], Rotation.from_euler("ZYX", np.stack([angle, 0 * angle - 0.02, 0 * angle], axis=1))


def save(file, array):
    with open(file, "wb") as opened:
        np.save(opened, array)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    file = tmp_path_factory.mktemp("film") / "video.hevc"
    options = {"preset": "ultrafast", "x265-params": "bframes=0:log-level=none"}
    with av.open(str(file), "w", format="hevc") as movie:
        stream = movie.add_stream("libx265", rate=20, width=64, height=64, pix_fmt="yuv420p", options=options)
        for number in range(COUNT):
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), number, np.uint8))))
        movie.mux(stream.encode(None))
    return file


@pytest.fixture
def segment(tmp_path, film):
    """Camera in ECEF near San Francisco, scalar-first quaternions of forward, right, down."""
    folder = tmp_path / "Chunk_1" / "b0c9d2329ad1606b|2018-08-02--08-34-47" / "40"
    (folder / "global_pose").mkdir(parents=True)
    shutil.copyfile(film, folder / "video.hevc")
    seconds, xyz, turned = motion()
    latitude, longitude = PLACE
    normal = 6_378_137.0 / np.sqrt(1 - ECCENTRICITY * np.sin(latitude) ** 2) + 30
    level = normal * np.cos(latitude)
    upward = (normal - ECCENTRICITY * (normal - 30)) * np.sin(latitude)
    ecef_from_enu = Rotation.from_euler("ZYX", [longitude + np.pi / 2, 0, np.pi / 2 - latitude])
    camera = ecef_from_enu * turned * Rotation.from_quat([1, 0, 0, 0])
    place = np.array([level * np.cos(longitude), level * np.sin(longitude), upward])
    save(folder / "global_pose/frame_times", 1234.5 + seconds)
    save(folder / "global_pose/frame_positions", place + ecef_from_enu.apply(xyz))
    save(folder / "global_pose/frame_orientations", camera.as_quat()[:, [3, 0, 1, 2]])
    return folder


def test_a_segment_is_the_cameras_poses_in_east_north_up(segment, tmp_path):
    (drive,) = drives(tmp_path)
    assert drive.name == "b0c9d2329ad1606b_2018-08-02--08-34-47--40"
    assert (drive.point, drive.mount_deg) == ("camera", "estimate")
    assert drive.facts["origin"] == "latitude 37.50000000, longitude -122.30000000, height 30.000 m"
    seconds, xyz, turned = motion()
    np.testing.assert_allclose(drive.track.timestamps_us, 1_234_500_000 + seconds * 1e6, atol=0.6)
    np.testing.assert_allclose(drive.track.xyz, xyz, atol=1e-3)
    assert (Rotation.from_quat(drive.track.quaternion_xyzw) * turned.inv()).magnitude().max() < 1e-6
    front = drive.cameras["camera_front_wide_120fov"]
    assert front.path.name == "video.hevc"
    assert front.times_us.tolist() == drive.track.timestamps_us.tolist()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("frame_times", lambda array: array[:-1], r"\(59,\), \(60, 3\)"),
        ("frame_times", lambda array: array[::-1], "do not increase at number 1"),
        (
            "frame_positions",
            lambda array: np.where(np.arange(COUNT)[:, None] // 2 == 2, np.nan, array),
            "2 poses .* 4$",
        ),
        ("frame_orientations", lambda array: 2 * array, "have not length 1"),
        ("frame_positions", lambda array: array.astype(object), "cannot be read as an array"),
        ("frame_positions", lambda array: array.astype("U8"), "expected numbers"),
    ],
)
def test_poses_that_are_none_are_refused(segment, name, change, says):
    file = segment / "global_pose" / name
    changed = change(np.load(file))
    with open(file, "wb") as opened:
        np.save(opened, changed, allow_pickle=True)
    (found,) = drives(segment)
    assert isinstance(found, Dropped)
    assert re.search(says, found.reason)


def test_a_damaged_header_of_an_array_is_named_whatever_it_holds(segment):
    file = segment / "global_pose/frame_times"
    whole = file.read_bytes()
    for mark in (b"'descr'", b"}", b"(60,)", b"NUMPY"):
        for instead in (b"(", b"'", b"\xff", b"[" * 3000, b""):
            file.write_bytes(whole.replace(mark, instead, 1))
            (found,) = drives(segment)
            assert "frame_times cannot be read as an array" in found.reason


def test_segments_that_cannot_be_used_are_named_beside_those_that_can(segment, tmp_path):
    short = shutil.copytree(segment, segment.with_name("5"))
    for name in ("frame_times", "frame_positions", "frame_orientations"):
        save(short / "global_pose" / name, np.load(short / "global_pose" / name)[:-1])
    promises = shutil.copytree(segment, segment.with_name("41")) / "global_pose/frame_times"
    promises.write_bytes(promises.read_bytes().replace(b"(60,)", b"(9999999999,)").replace(b"        ", b"", 1))
    (shutil.copytree(segment, segment.with_name("42")) / "video.hevc").unlink()
    found = list(drives(tmp_path))
    assert [isinstance(item, LoggedDrive) for item in found] == [False, True, False, True]
    assert "60 frames in video.hevc, 59 in frame_times" in found[0].reason
    assert "frame_times cannot be read" in found[2].reason
    assert "42/video.hevc is not there: the clip holds poses alone" in found[3].dropped[0].reason
    assert found[3].cameras == {}
    with pytest.raises(UsageError, match="global_pose"):
        list(drives(segment / "global_pose"))
