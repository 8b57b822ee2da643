"""The two worked converters, on generated drives in the file layout of each dataset."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from alpacache.checks.source import check_source
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.folder import FolderSource
from alpacache.sources.synthetic import SyntheticSource

pytestmark = pytest.mark.system

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
MPS_A_MPH = 0.44704


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments, code=0):
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def drive():
    """A generated drive that curves, with pictures that show it: the track and frames `[N, 3, H, W]` at 20 Hz."""
    source = SyntheticSource(1, seed=5, mix={"early_curve": 1.0})
    (clip_id,) = source.clip_ids
    track = source.track(clip_id)
    return track, source.film(clip_id, FRONT_CAMERA, track.timestamps_us)


def in_first_frame(xyz, quaternion):
    """Poses seen from the first one."""
    turn = Rotation.from_quat(quaternion[0]).inv()
    return turn.apply(xyz - xyz[0]), (turn * Rotation.from_quat(quaternion)).as_matrix()


def sound(folder):
    """What `alpacache check` finds."""
    report = check_source(FolderSource(folder), t0="every:2.0")
    assert report.ok, report.checks
    assert report.refused == ()
    assert {check.name: check.status for check in report.checks}["axes"] == "ok"
    return report


@pytest.fixture
def recording(tmp_path, drive):
    """As the simulator writes it: the first 12 s, a pause, 3 s more."""
    track, frames = drive
    root = tmp_path / "recording"
    (root / "IMG").mkdir(parents=True)
    time_s = track.timestamps_us / 1e6
    yaw = np.unwrap(2 * np.arctan2(track.quaternion_xyzw[:, 2], track.quaternion_xyzw[:, 3]))
    speed = np.linalg.norm(np.gradient(track.xyz[:, :2], time_s, axis=0), axis=1)
    steering = -np.rad2deg(np.arctan(2.5 * np.gradient(yaw, time_s) / speed)) / 23.5
    began = datetime(2016, 12, 1, 13, 30, 48, 287_000, tzinfo=UTC)
    rows = []
    for number in (*range(240), *range(300, 360)):
        name = f"{began + timedelta(seconds=time_s[number]):%Y_%m_%d_%H_%M_%S_%f}"[:-3]
        Image.fromarray(frames[number].transpose(1, 2, 0)).save(root / "IMG" / f"center_{name}.jpg", quality=90)
        paths = [rf"C:\recording\IMG\{camera}_{name}.jpg" for camera in ("center", "left", "right")]
        rows.append([*paths, steering[number], 0.4, 0, speed[number] / MPS_A_MPH])
    with open(root / "driving_log.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.mark.system
def test_a_simulator_log_becomes_a_clip_that_passes_check(recording, tmp_path, drive):
    out = tmp_path / "folder"
    assert "integrated from speed and steering" in run("udacity_to_folder", recording, out).stdout
    source = FolderSource(out)
    assert list(source.clip_ids) == ["udacity-20161201-133048-287000"]  # what follows the pause is too short
    track, _ = drive
    found = source.track(source.clip_ids[0])
    assert found.timestamps_us.tolist() == (1480599048287000 + track.timestamps_us[:240]).tolist()
    xyz, rot = in_first_frame(found.xyz, found.quaternion_xyzw)
    true_xyz, true_rot = in_first_frame(track.xyz[:240], track.quaternion_xyzw[:240])
    assert np.abs(np.diff(true_rot[:, 1, 0])).sum() > 0.2  # there is a curve to get wrong
    np.testing.assert_allclose(xyz, true_xyz, atol=0.05)
    np.testing.assert_allclose(rot, true_rot, atol=2e-3)
    sound(out)


def test_a_heading_line_changes_nothing_and_other_files_are_refused(recording, tmp_path):
    module = example("udacity_to_folder")
    without = module.read_log(recording)
    log = recording / "driving_log.csv"
    log.write_text("center,left,right,steering,throttle,brake,speed\n" + log.read_text())
    assert module.read_log(recording) == without
    assert without[0].steering == pytest.approx(without[1].steering, abs=0.1)
    log.write_text("time,steering\n0,1\n")
    assert "line 1" in run("udacity_to_folder", recording, tmp_path / "folder", code=1).stderr


@pytest.fixture
def segment(tmp_path, drive):
    """As comma2k19 has it: camera in ECEF near San Francisco, scalar-first quaternions, raw HEVC."""
    track, frames = drive
    folder = tmp_path / "Chunk_1" / "b0c9d2329ad1606b|2018-08-02--08-34-47" / "40"
    (folder / "global_pose").mkdir(parents=True)
    latitude, longitude = np.deg2rad([37.5, -122.3])
    normal = 6_378_137.0 / np.sqrt(1 - 0.00669437999014 * np.sin(latitude) ** 2)
    level = normal * np.cos(latitude)
    origin = [level * np.cos(longitude), level * np.sin(longitude), normal * (1 - 0.00669437999014) * np.sin(latitude)]
    ecef_from_enu = Rotation.from_euler("ZYX", [longitude + np.pi / 2, 0, np.pi / 2 - latitude])
    camera = ecef_from_enu * Rotation.from_quat(track.quaternion_xyzw) * Rotation.from_quat([1, 0, 0, 0])
    arrays = {
        "frame_times": 1234.5 + track.timestamps_us / 1e6,
        "frame_positions": origin + ecef_from_enu.apply(track.xyz),
        "frame_orientations": camera.as_quat()[:, [3, 0, 1, 2]],
    }
    for name, array in arrays.items():
        with open(folder / "global_pose" / name, "wb") as file:
            np.save(file, array)
    options = {"preset": "ultrafast", "x265-params": "bframes=0:log-level=none", "crf": "10"}
    with av.open(str(folder / "video.hevc"), "w", format="hevc") as movie:
        stream = movie.add_stream("libx265", rate=20, width=256, height=128, pix_fmt="yuv420p", options=options)
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))):
                movie.mux(packet)
        for packet in stream.encode(None):
            movie.mux(packet)
    return folder


@pytest.mark.ci
def test_a_comma2k19_segment_becomes_a_clip_that_passes_check(segment, tmp_path, drive):
    out = tmp_path / "folder"
    assert run("comma2k19_to_folder", segment, out).stdout == f"1 clips in {out}\n"
    source = FolderSource(out)
    assert list(source.clip_ids) == ["b0c9d2329ad1606b_2018-08-02--08-34-47--40"]
    track, frames = drive
    found = source.track(source.clip_ids[0])
    assert found.timestamps_us.tolist() == (1_234_500_000 + track.timestamps_us).tolist()
    np.testing.assert_allclose(found.xyz, track.xyz - track.xyz[0], atol=1e-3)  # east, north, up is what went in
    turned = Rotation.from_quat(found.quaternion_xyzw) * Rotation.from_quat(track.quaternion_xyzw).inv()
    assert turned.magnitude().max() < 1e-6
    chosen = [0, 133, 399]
    shown = source.film(source.clip_ids[0], FRONT_CAMERA, found.timestamps_us[chosen]).astype(float)
    for got, number in zip(shown, chosen, strict=True):
        errors = {other: np.abs(got - frames[other]).mean() for other in (number, (number + 60) % 400)}
        assert errors[number] < 8 < errors[(number + 60) % 400]
    sound(out)


def test_a_segment_with_a_missing_frame_is_refused(segment, tmp_path):
    times = segment / "global_pose" / "frame_times"
    for name in ("frame_times", "frame_positions", "frame_orientations"):
        array = np.load(segment / "global_pose" / name)
        with open(segment / "global_pose" / name, "wb") as file:
            np.save(file, array[:-1])
    assert len(np.load(times)) == 400
    refused = run("comma2k19_to_folder", segment, tmp_path / "folder", code=1)
    assert "401 frames in video.hevc, 400 in frame_times" in refused.stderr


def lines_of(recording):
    return (recording / "driving_log.csv").read_text().splitlines()


def rewrite(recording, lines):
    (recording / "driving_log.csv").write_text("\n".join(lines) + "\n")


def test_blank_lines_missing_pictures_and_nan_are_skipped_and_named(recording, tmp_path, capsys):
    convert, lines = example("udacity_to_folder").read_log, lines_of(recording)
    whole = convert(recording)
    assert capsys.readouterr().err == ""
    whole[100].picture.unlink()
    fields = lines[40].split(",")
    lines[40] = ",".join([*fields[:3], "nan", *fields[4:]])
    rewrite(recording, [*lines[:7], "", " , ", *lines[7:], "", ""])
    assert convert(recording) == [row for number, row in enumerate(whole) if number not in (40, 100)]
    err = capsys.readouterr().err
    assert "skipped 1 rows with a number that is not finite, the first in line 43" in err
    assert f"skipped 1 rows whose picture is not there, the first in line 103: {whole[100].picture.name}" in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda fields: [*fields[:3], "0,05", *fields[4:]], "decimal points, not commas"),
        (lambda fields: [*fields[:3], '"0,05"', *fields[4:]], "decimal points, not commas"),
        (lambda fields: [*fields[:3], "left", *fields[4:]], "could not convert string to float: 'left'"),
        (lambda fields: fields[:6], "is not a row of the simulator's log"),
        (lambda fields: [fields[0].replace("2016_12", "2016_13"), *fields[1:]], "2016_13"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(recording, change, says):
    lines = lines_of(recording)
    lines[5] = ",".join(change(lines[5].split(",")))
    rewrite(recording, lines)
    with pytest.raises(SystemExit, match=r"driving_log\.csv, line 6: .*" + says):
        example("udacity_to_folder").read_log(recording)


def test_nothing_is_written_over_and_nothing_half_is_left(recording, tmp_path, monkeypatch):
    module, out = example("udacity_to_folder"), tmp_path / "folder"
    before = sorted(tmp_path.iterdir())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_clip", fail)
    with pytest.raises(OSError, match="disk full"):
        module.convert(recording, out)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    names = module.convert(recording, out)
    with pytest.raises(SystemExit, match="exists already"):
        module.convert(recording, out)
    assert list(FolderSource(out).clip_ids) == names


def test_reversing_is_left_out():
    """Forwards at 5 m/s, braked to a stand, back under the brake, braked by the throttle, forwards again."""
    module = example("udacity_to_folder")
    legs = [(1, 0, [5] * 9), (0, 1, [3, 1.5, 0, 0]), (0, 1, [0.5, 1, 2, 3]), (1, 0, [2, 1, 0.1]), (1, 0, [0.5, 2, 4])]
    rows = [
        module.Row(0, Path("p"), 0.1, throttle, brake, speed) for throttle, brake, speeds in legs for speed in speeds
    ]
    kept = module.without_reversing(rows)
    assert [row.speed_mps for row in kept] == [5] * 9 + [3, 1.5, 0, 0] + [0.1, 0.5, 2, 4]
    signed = [row._replace(speed_mps=-1.0, throttle=0, brake=1) for row in rows]
    assert module.without_reversing(signed) == signed


def test_a_signed_speed_drives_backwards():
    module = example("udacity_to_folder")
    clip = [module.Row(number * 100_000, Path("p"), 0.5, 0, 0, -2.0) for number in range(20)]
    xyz, quaternion = module.drive(clip, wheelbase_m=2.5, full_lock_rad=0.4)
    assert xyz[-1, 0] < -3
    assert quaternion[-1, 2] > 0  # wheels to the right, backwards: the nose turns left


def test_segments_that_cannot_be_used_are_skipped_and_named(segment, tmp_path, capsys):
    module = example("comma2k19_to_folder")
    other = shutil.copytree(segment, segment.with_name("41"))
    positions = np.load(other / "global_pose/frame_positions")
    positions[3:5] = np.nan
    with open(other / "global_pose/frame_positions", "wb") as file:
        np.save(file, positions)
    (names, out) = ([f"{segment.parent.name.replace('|', '_')}--40"], tmp_path / "folder")
    assert module.convert([other, segment, tmp_path / "nothing", segment], out) == names
    assert list(FolderSource(out).clip_ids) == names
    assert [path.name for path in (out / "clips").iterdir()] == names
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].startswith("skipped ")
    assert "2 poses are not finite, the first is number 3" in said[0]
    assert "No such file" in said[1]
    assert "named twice" in said[2]
    with pytest.raises(SystemExit, match="exists already"):
        module.convert([segment], out)
    with pytest.raises(SystemExit, match="no segment could be used"):
        module.convert([other], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_index_names_what_was_written(recording, tmp_path):
    names = example("udacity_to_folder").convert(recording, tmp_path / "folder")
    assert json.loads((tmp_path / "folder/dataset.json").read_text())["clips"] == names
