"""Runs of CARLA as the recorder writes them: MCAP in segments, and a manifest with a film in CARLA's own axes."""

import base64
import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.checks.source import check_source
from alpacache.converters.carla import drives
from alpacache.converters.writer import convert
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.errors import SourceError, UsageError
from alpacache.sources.folder import FolderSource

pytestmark = pytest.mark.system  # whole conversions

mcap = pytest.importorskip("mcap.writer")

PITCH_DEG, ROLL_DEG = 1.5, -0.7
"""Nose down and right side down, as the recorder's right-handed angles have them."""


@pytest.fixture(scope="session")
def run(curved):
    """A recorded row every 0.1 s: right-handed places and yaw, steering to the right, commands."""
    rows = slice(0, 400, 2)
    times_us = curved.track.timestamps_us[rows] + 3_050_000
    xyz, yaw = curved.track.xyz[rows], curved.yaw_rad[rows]
    steer = -np.gradient(yaw, times_us / 1e6) * 0.8
    commands = ["lane_follow"] * 40 + ["left"] * 60 + ["straight"] * 30 + ["lane_follow"] * 70
    return SimpleNamespace(
        times_us=times_us,
        xyz=xyz,
        yaw_deg=np.rad2deg(yaw),
        steer=steer,
        commands=commands,
        speed=curved.speed_mps[rows],
        jpegs=curved.jpegs[rows],
        frames=curved.frames[:400][rows],
    )


def write_segment(path, run, rows, *, raw=False, sign=1, control=True):
    """One MCAP file; `raw` is how the first ones were: CARLA's own axes, other topics."""
    names = ["/ego/state", "/camera/front/compressed", "/ego/control", "/ego/planning", "/ego/planning_debug"]
    if raw:
        names = ["/state/ego", "/sensors/front_rgb/compressed", "/control/ego", "/planning/ego", "/planning_debug/ego"]
    axis = -1 if raw else sign
    with open(path, "wb") as file:
        writer = mcap.Writer(file)
        writer.start(profile="carla_alpamayo.route_loop", library="test")
        writer.add_metadata("episode", {"town": "Town04", "episode_id": "7"})
        schema = writer.register_schema("foxglove.CompressedImage", "jsonschema", b"{}")
        other = writer.register_schema("carla_alpamayo.json", "jsonschema", b"{}")
        kinds = [other, schema, other, other, other]
        channels = [writer.register_channel(name, "json", kind) for name, kind in zip(names, kinds, strict=True)]
        for at in rows:
            ns = int(run.times_us[at]) * 1000
            stamp = {"sec": ns // 10**9, "nsec": ns % 10**9}
            x, y, z = run.xyz[at].tolist()
            angles = {"yaw_deg": axis * run.yaw_deg[at], "pitch_deg": axis * PITCH_DEG, "roll_deg": ROLL_DEG}
            state = {"timestamp": stamp, "pose": {"x": x, "y": axis * y, "z": z, **angles}, "speed_mps": run.speed[at]}
            image = {"timestamp": stamp, "format": "jpeg", "data": base64.b64encode(run.jpegs[at]).decode()}
            steering = {"timestamp": stamp, "steer": run.steer[at], "throttle": 0.3, "brake": 0.0}
            debug = {"timestamp": stamp, "core": {"route_command": run.commands[at]}}
            plan = {"timestamp": stamp, "behavior": "left", "planner_state": "overtake"}
            for channel, value in zip(channels, (state, image, steering, plan, debug), strict=True):
                if control or value is not steering:
                    writer.add_message(channel, ns, json.dumps(value).encode(), ns)
        writer.finish()


@pytest.fixture(scope="session")
def telemetry(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run_one"
    (folder / "telemetry").mkdir(parents=True)
    write_segment(folder / "telemetry/segment_0000.mcap", run, range(120))
    write_segment(folder / "telemetry/segment_0001.mcap", run, range(120, 200))
    named = [f"outputs/evaluate/run_one/telemetry/segment_000{at}.mcap" for at in (0, 1)]
    counts = [{"path": path, "start_elapsed_seconds": 12.0 * at, "frame_count": 80} for at, path in enumerate(named)]
    (folder / "telemetry/index.json").write_text(json.dumps({"segments": counts}))
    (folder / "summary.json").write_text(json.dumps({"town": "Town04", "success": False, "failure_reason": "stuck"}))
    return folder


def write_manifest(folder, run, **changes):
    lines = []
    for at in range(200):
        x, y, z = run.xyz[at].tolist()
        line = {"episode_id": 7, "frame_id": 2 * at, "timestamp": run.times_us[at] / 1e6, "front_rgb_path": None}
        line |= {"speed": run.speed[at], "command": run.commands[at], "steer": run.steer[at], "success": True}
        line |= {"vehicle_x": x, "vehicle_y": -y, "vehicle_z": z, "vehicle_yaw_deg": -run.yaw_deg[at]}
        lines.append(json.dumps(line | changes))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def manifest(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others") / "run_one"
    folder.mkdir()
    write_manifest(folder, run)
    with av.open(str(folder / "front_rgb.mp4"), "w") as movie:
        options = {"preset": "ultrafast", "crf": "12", "g": "10"}
        stream = movie.add_stream("libx264", rate=10, width=256, height=128, pix_fmt="yuv420p", options=options)
        for frame in run.frames:
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))))
        movie.mux(stream.encode(None))
    return folder


def folder_of(place, out, **options):
    convert(drives(place), out, name="carla", settings={}, **options)
    return FolderSource(out)


def rotation(yaw_deg, pitch_deg, roll_deg):
    """The rotation of these angles written out, row by row."""
    (cy, cp, cr), (sy, sp, sr) = (function(np.deg2rad([yaw_deg, pitch_deg, roll_deg])) for function in (np.cos, np.sin))
    return [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]


def test_segments_become_one_drive_with_its_commands(telemetry, run, tmp_path):
    source = folder_of(telemetry, tmp_path / "out")
    assert list(source.clip_ids) == ["run_one"]
    track = source.track("run_one")
    assert track.timestamps_us.tolist() == run.times_us.tolist()
    assert np.abs(track.xyz - run.xyz).max() < 1e-6
    expected = [rotation(yaw, PITCH_DEG, ROLL_DEG) for yaw in run.yaw_deg]
    assert np.abs(Rotation.from_quat(track.quaternion_xyzw).as_matrix() - expected).max() < 1e-9
    pictures = sorted((tmp_path / f"out/clips/run_one/{FRONT_CAMERA}").iterdir())
    assert [file.read_bytes() for file in pictures] == run.jpegs
    texts = [(int(source.route_times_us("run_one")[at])) for at in range(3)]
    assert texts == run.times_us[[40, 100, 130]].tolist()
    column = source._routes("run_one")[2]
    assert column.to_pylist() == ["Turn left", "Go straight", ""]
    record = json.loads((tmp_path / "out/clips/run_one/provenance.json").read_text())
    assert record["facts"]["run"] == {"town": "Town04", "success": False, "failure_reason": "stuck"}
    assert record["facts"]["episode"]["town"] == "Town04"
    assert record["facts"]["steering"]["rows"] == record["facts"]["steering"]["turning_as_steered"] > 20
    assert check_source(source, t0="every:2.0").ok


def test_both_recordings_of_a_run_give_one_folder(telemetry, manifest, run, tmp_path):
    first, second = folder_of(telemetry, tmp_path / "a"), folder_of(manifest, tmp_path / "b")
    assert first.clip_ids == second.clip_ids
    one, other = first.track("run_one"), second.track("run_one")
    assert (one.timestamps_us == other.timestamps_us).all()
    assert np.abs(one.xyz - other.xyz).max() < 1e-6
    yaws = [Rotation.from_quat(track.quaternion_xyzw).as_euler("ZYX", degrees=True)[:, 0] for track in (one, other)]
    assert np.abs(yaws[0] - yaws[1]).max() < 1e-6
    frames = [source.frame_times_us("run_one", FRONT_CAMERA) for source in (first, second)]
    assert (frames[0] == frames[1]).all()
    routes = [source._routes("run_one") for source in (first, second)]
    assert routes[0][1].tolist() == routes[1][1].tolist()
    assert routes[0][2].to_pylist() == routes[1][2].to_pylist()
    shown = second.film("run_one", FRONT_CAMERA, frames[0][[0, 77, 199]]).astype(float)
    for picture, at in zip(shown, (0, 77, 199), strict=True):
        around = range(max(0, at - 2), min(200, at + 3))
        errors = {other: np.abs(picture - run.frames[other]).mean() for other in around}
        assert min(errors, key=errors.get) == at
    assert check_source(second, t0="every:2.0").ok


def test_a_run_is_cut(telemetry, tmp_path):
    assert list(folder_of(telemetry, tmp_path / "out", clip_seconds=10.0).clip_ids) == ["run_one-000", "run_one-001"]


def test_the_first_files_have_carlas_own_axes(run, tmp_path):
    write_segment(tmp_path / "telemetry.mcap", run, range(200), raw=True)
    (drive,) = drives(tmp_path)
    assert np.abs(drive.track.xyz - run.xyz).max() < 1e-9
    expected = [rotation(yaw, PITCH_DEG, ROLL_DEG) for yaw in run.yaw_deg]
    assert np.abs(Rotation.from_quat(drive.track.quaternion_xyzw).as_matrix() - expected).max() < 1e-9
    assert [text for _, text in drive.routes] == ["Turn left", "Go straight", ""]


def test_a_log_that_is_mirrored_throughout_is_found_by_its_steering(run, tmp_path):
    """Wrong in y and yaw together, which no motion shows."""
    write_segment(tmp_path / "telemetry.mcap", run, range(200), sign=-1)
    with pytest.raises(UsageError, match=r"should be right-handed, but in \d+ of \d+ frames .* against its steering"):
        list(drives(tmp_path))
    (drive,) = drives(tmp_path, axes="left-handed")
    assert np.abs(drive.track.xyz - run.xyz).max() < 1e-9


def test_a_log_that_cannot_tell_wants_to_be_told(run, tmp_path):
    write_segment(tmp_path / "telemetry.mcap", run, range(200), control=False)
    with pytest.raises(UsageError, match=r"only 0 frames turn with the wheel turned.*--axes right-handed or"):
        list(drives(tmp_path))
    (drive,) = drives(tmp_path, axes="right-handed")
    assert np.abs(drive.track.xyz - run.xyz).max() < 1e-9


def test_telemetry_and_manifest_of_different_runs_are_told_apart(telemetry, run, tmp_path):
    import shutil

    folder = shutil.copytree(telemetry, tmp_path / "run_one")
    write_manifest(folder, run)
    (drive,) = drives(folder)
    assert drive.facts["manifest"] == "agrees within 0.000 m at 200 times"
    write_manifest(folder, run, vehicle_y=5.0)
    with pytest.raises(UsageError, match=r"telemetry and manifest\.jsonl are .* m apart"):
        list(drives(folder))


def test_losses_are_said(telemetry, manifest, run, tmp_path):
    import shutil

    folder = shutil.copytree(telemetry, tmp_path / "run_one")
    (folder / "telemetry/segment_0001.mcap").unlink()
    (drive,) = drives(folder)
    assert len(drive.track.timestamps_us) == 120
    assert drive.dropped[0].reason == "segment_0001.mcap of index.json is not there"

    folder = shutil.copytree(manifest, tmp_path / "run_two")
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace('"left"', "left").replace('"timestamp"', "timestamp")
    lines += [lines[-1].replace(f'"timestamp": {run.times_us[199] / 1e6}', '"timestamp": 99.0')] * 2
    (folder / "manifest.jsonl").write_text("\n".join(lines)[:-40])
    (drive,) = drives(folder)
    assert [(drop.what, drop.count) for drop in drive.dropped] == [("lines", 2), ("frames", 1), ("frames", 3)]
    camera = drive.cameras[FRONT_CAMERA]
    assert camera.first == 4
    assert camera.times_us.tolist() == run.times_us[4:200].tolist()


def test_runs_of_a_folder_are_drives_and_bad_ones_are_named(telemetry, run, tmp_path):
    import shutil

    shutil.copytree(telemetry, tmp_path / "one")
    (tmp_path / "two").mkdir()
    write_segment(tmp_path / "two/telemetry.mcap", run, range(200), sign=-1)
    (tmp_path / "notes").mkdir()
    found = list(drives(tmp_path))
    assert found[0].name == "one"
    assert found[1].what == "drives"
    assert found[1].reason.startswith("two: /ego/state of telemetry.mcap should be right-handed")
    with pytest.raises(SourceError, match=r"holds neither manifest\.jsonl nor telemetry"):
        list(drives(tmp_path / "notes"))


def test_commands_that_are_none_end_a_route_and_are_counted(run, tmp_path):
    commands = ["RoadOption.LEFT"] * 50 + ["void"] * 50 + ["changelaneleft"] * 60 + ["Straight"] * 40
    write_segment(tmp_path / "telemetry.mcap", SimpleNamespace(**{**vars(run), "commands": commands}), range(200))
    (drive,) = drives(tmp_path)
    assert [(time, text) for time, text in drive.routes] == [
        (run.times_us[0], "Turn left"),
        (run.times_us[50], ""),
        (run.times_us[160], "Go straight"),
    ]
    assert [(drop.what, drop.count) for drop in drive.dropped] == [("commands", 60)]


def test_pictures_that_a_manifest_names_stay_in_the_run(run, tmp_path):
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(run.jpegs[0])
    write_manifest(folder, run)
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for at, line in enumerate(lines):
        line["front_rgb_path"] = f"outputs/evaluate/run/images/{at:06d}.jpg"
        (folder / f"images/{at:06d}.jpg").write_bytes(run.jpegs[at])
    lines[5]["front_rgb_path"] = "../secret.jpg"
    lines[6]["front_rgb_path"] = str(tmp_path / "secret.jpg")
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (drive,) = drives(folder)
    assert len(drive.cameras[FRONT_CAMERA].times_us) == 198
    assert list(drive.cameras[FRONT_CAMERA].read(4, 6)) == [run.jpegs[4], run.jpegs[7]]
    assert drive.dropped[0].count == 2
