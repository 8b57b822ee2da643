"""Logs of several kinds the whole way: from their own layout to a folder that passes `check`."""

import csv
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import av
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.checks.source import check_source
from alpacache.converters import comma2k19, kitti, udacity
from alpacache.converters.drive import LoggedDrive
from alpacache.converters.geodesy import ecef_of, geodetic_of, level_axes
from alpacache.converters.writer import convert
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.sources.folder import FolderSource

pytestmark = pytest.mark.system
PLACE = (37.5, -122.3, 30.0)


def ecef(track):
    return ecef_of(*PLACE) + track.xyz @ level_axes(*PLACE[:2])


def sound(drives, out, **options):
    """The folder's source, once `check` has found nothing, and its only clip."""
    convert(drives, out, name="test", settings={}, **options)
    source = FolderSource(out)
    report = check_source(source, t0="every:2.0")
    assert report.ok, report.checks
    assert report.refused == ()
    assert {check.name: check.status for check in report.checks}["axes"] == "ok"
    (clip_id,) = source.clip_ids
    return source, clip_id


def in_first_frame(track, rows=slice(None)):
    """Poses seen from the first one."""
    turned = Rotation.from_quat(track.quaternion_xyzw[rows])
    first = turned[0].inv()
    return first.apply(track.xyz[rows] - track.xyz[rows][0]), (first * turned).as_matrix()


def test_a_kitti_drive(curved, tmp_path):
    drive = tmp_path / "2011_09_26" / "2011_09_26_drive_0001_sync"
    for part in ("oxts", "image_02"):
        (drive / part / "data").mkdir(parents=True)
    places = geodetic_of(ecef(curved.track))
    velocity = np.gradient(curved.track.xyz[:, :2], 0.05, axis=0)
    began = datetime(2011, 9, 26, 13, 2, 25)
    stamps = []
    for number, yaw in enumerate(curved.yaw_rad):
        row = [*(value[number] for value in places), 0, 0, yaw, velocity[number, 1], velocity[number, 0], *[0] * 22]
        (drive / "oxts/data" / f"{number:010d}.txt").write_text(" ".join(f"{value:.15g}" for value in row))
        (drive / "image_02/data" / f"{number:010d}.jpg").write_bytes(curved.jpegs[number])
        stamps.append(f"{began + timedelta(seconds=number * 0.05):%Y-%m-%d %H:%M:%S.%f}000")
    for part in ("oxts", "image_02"):
        (drive / part / "timestamps.txt").write_text("\n".join(stamps))
    source, clip_id = sound(kitti.drives(tmp_path), tmp_path / "out", offset_m=(0.0, 0.0, 0.0))
    assert clip_id == "2011_09_26_drive_0001_sync"
    xyz, _ = in_first_frame(source.track(clip_id))
    true_xyz, _ = in_first_frame(curved.track)
    np.testing.assert_allclose(xyz, true_xyz, atol=0.01)
    assert (tmp_path / "out/clips" / clip_id / FRONT_CAMERA / "000007.jpg").read_bytes() == curved.jpegs[7]


def test_a_recording_of_the_simulator(curved, tmp_path):
    root = tmp_path / "recording"
    (root / "IMG").mkdir(parents=True)
    time_s = curved.track.timestamps_us / 1e6
    steering = -np.rad2deg(np.arctan(2.5 * np.gradient(curved.yaw_rad, time_s) / curved.speed_mps)) / 23.5
    began = datetime(2016, 12, 1, 13, 30, 48, 287_000, tzinfo=UTC)
    rows = []
    for number in range(240):
        name = f"{began + timedelta(seconds=time_s[number]):%Y_%m_%d_%H_%M_%S_%f}"[:-3]
        (root / "IMG" / f"center_{name}.jpg").write_bytes(curved.jpegs[number])
        paths = [rf"C:\recording\IMG\{camera}_{name}.jpg" for camera in ("center", "left", "right")]
        rows.append([*paths, steering[number], 0.4, 0, curved.speed_mps[number] / 0.44704])
    with open(root / "driving_log.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    source, clip_id = sound(udacity.drives(root), tmp_path / "out")
    assert clip_id == "udacity-20161201-133048-287000"
    xyz, rot = in_first_frame(source.track(clip_id))
    true_xyz, true_rot = in_first_frame(curved.track, slice(240))
    np.testing.assert_allclose(xyz, true_xyz, atol=0.05)
    np.testing.assert_allclose(rot, true_rot, atol=2e-3)


@pytest.mark.ci
def test_a_comma2k19_segment(curved, tmp_path):
    folder = tmp_path / "Chunk_1" / "b0c9d2329ad1606b|2018-08-02--08-34-47" / "40"
    (folder / "global_pose").mkdir(parents=True)
    from_enu = Rotation.from_matrix(level_axes(*PLACE[:2]).T)
    camera = from_enu * Rotation.from_quat(curved.track.quaternion_xyzw) * Rotation.from_quat([1, 0, 0, 0])
    arrays = {
        "frame_times": 1234.5 + curved.track.timestamps_us / 1e6,
        "frame_positions": ecef(curved.track),
        "frame_orientations": camera.as_quat()[:, [3, 0, 1, 2]],
    }
    for name, array in arrays.items():
        with open(folder / "global_pose" / name, "wb") as file:
            np.save(file, array)
    options = {"preset": "ultrafast", "x265-params": "bframes=0:log-level=none", "crf": "10"}
    with av.open(str(folder / "video.hevc"), "w", format="hevc") as movie:
        stream = movie.add_stream("libx265", rate=20, width=256, height=128, pix_fmt="yuv420p", options=options)
        for frame in curved.frames:
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))))
        movie.mux(stream.encode(None))
    source, clip_id = sound(comma2k19.drives(folder), tmp_path / "out", mount_deg=(0.0, 0.0, 0.0))
    assert clip_id == "b0c9d2329ad1606b_2018-08-02--08-34-47--40"
    found = source.track(clip_id)
    np.testing.assert_allclose(found.xyz, curved.track.xyz - curved.track.xyz[0], atol=1e-3)
    chosen = [0, 133, 399]
    shown = source.film(clip_id, FRONT_CAMERA, found.timestamps_us[chosen]).astype(float)
    for got, number in zip(shown, chosen, strict=True):
        errors = {other: np.abs(got - curved.frames[other]).mean() for other in (number, (number + 60) % 400)}
        assert errors[number] < 8 < errors[(number + 60) % 400]


def test_a_camera_whose_mount_cannot_be_told_is_left_out_beside_others(tmp_path):
    straight = np.arange(200)
    track = Track(
        timestamps_us=straight * 100_000,
        xyz=np.stack([1.2 * straight, 0 * straight, 0 * straight], axis=1),
        quaternion_xyzw=np.tile([0, 0, np.sin(0.007), np.cos(0.007)], (200, 1)),
    )
    still = replace(track, xyz=track.xyz * 0)
    logged = [
        LoggedDrive(name=name, cameras={}, track=it, point="camera", mount_deg="estimate")
        for name, it in (("still", still), ("straight", track))
    ]
    report = convert(logged, tmp_path / "out", name="test", settings={})
    assert [clip["name"] for clip in report.clips] == ["straight"]
    (reason,) = (drop.reason for drop in report.dropped if drop.what == "drives")
    assert "give it as --mount" in reason
    found = Rotation.from_quat(FolderSource(tmp_path / "out").track("straight").quaternion_xyzw)
    np.testing.assert_allclose(found.as_euler("ZYX"), 0, atol=1e-9)
