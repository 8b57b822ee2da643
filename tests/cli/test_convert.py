"""`alpacache convert` as people run it: a run of CARLA with its pictures beside the manifest, which takes no extra."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.folder import FolderSource
from alpacache.sources.synthetic import SyntheticSource

pytestmark = pytest.mark.system  # whole commands

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def carla_run(tmp_path_factory):
    """20 s at 10 Hz of a curve, in CARLA's left-handed axes."""
    source = SyntheticSource(1, seed=5, mix={"early_curve": 1.0})
    (clip_id,) = source.clip_ids
    track = source.track(clip_id)
    rows = slice(0, 400, 2)
    times_us = track.timestamps_us[rows] + 1_000_000
    yaw = np.unwrap(Rotation.from_quat(track.quaternion_xyzw[rows]).as_euler("ZYX")[:, 0])
    steer = -np.gradient(yaw, times_us / 1e6)
    folder = tmp_path_factory.mktemp("runs") / "run_7"
    (folder / "images").mkdir(parents=True)
    lines = []
    for at, frame in enumerate(source.film(clip_id, FRONT_CAMERA, track.timestamps_us[rows])):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "JPEG", quality=90)
        (folder / f"images/{at:06d}.jpg").write_bytes(file.getvalue())
        x, y, z = track.xyz[rows][at].tolist()
        line = {"timestamp": times_us[at] / 1e6, "steer": steer[at], "command": "left" if at < 50 else "lane_follow"}
        line |= {"vehicle_x": x, "vehicle_y": -y, "vehicle_z": z, "vehicle_yaw_deg": -np.rad2deg(yaw[at])}
        lines.append(json.dumps(line | {"front_rgb_path": f"outputs/evaluate/run_7/images/{at:06d}.jpg"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def test_a_log_is_written_checked_and_kept(carla_run, tmp_path, run_here):
    done = json.loads(run_here("convert", "carla", carla_run, "--out", tmp_path / "out", "--json").stdout)
    assert (done["ok"], done["kept"], done["dropped"], done["source"]) == (True, 0, [], f"folder:{tmp_path / 'out'}")
    (clip,) = done["clips"]
    assert (clip["name"], clip["seconds"], clip["poses"], clip["routes"]) == ("run_7", 19.9, 200, 2)
    assert clip["cameras"] == {FRONT_CAMERA: {"frames": 200, "written": "copied", "formats": [".jpg"]}}
    checks = {check["name"]: check["status"] for check in done["check"]["checks"]}
    assert {checks[name] for name in ("axes", "mirrored", "clocks", "speed")} == {"ok"}
    again = run_here("convert", "carla", carla_run, "--out", tmp_path / "out", "--no-check")
    assert "1 of them from before" in again.stdout.replace("\n", " ")
    said = run_here("convert", "carla", carla_run, "--out", tmp_path / "out", "--axes", "left-handed", code=2).stderr
    assert 'was begun with axes null, and this command has "left-handed"' in said


def test_what_the_pictures_show_ends_a_mirrored_log(carla_run, tmp_path, run_here):
    """Axes that somebody insists on are held against the pictures."""
    arguments = ("convert", "carla", carla_run, "--out", tmp_path / "out", "--axes", "right-handed", "--json")
    done = json.loads(run_here(*arguments, code=1).stdout)
    assert {check["name"] for check in done["check"]["checks"] if check["status"] == "fail"} >= {"mirrored"}


def test_runs_that_cannot_be_used_are_named_with_exit_code_3(carla_run, tmp_path, run_here):
    runs = tmp_path / "runs"
    (runs / "broken").mkdir(parents=True)
    (runs / "broken/manifest.jsonl").write_text("{}\n")
    (runs / "good").symlink_to(carla_run)
    done = json.loads(run_here("convert", "carla", runs, "--out", tmp_path / "out", "--json", code=3).stdout)
    assert [(drop["what"], drop["count"]) for drop in done["dropped"]] == [("drives", 1)]
    assert "broken: " in done["dropped"][0]["reason"]
    assert [clip["name"] for clip in done["clips"]] == ["good"]
    said = run_here("convert", "carla", runs / "broken", "--out", tmp_path / "none", code=2).stderr
    assert "holds no line with a timestamp" in said
    assert not (tmp_path / "none").exists()


def test_wrong_usage_is_named(carla_run, tmp_path, run_here):
    assert "'bag' is no kind" in run_here("convert", "bag", carla_run, "--out", tmp_path / "a", code=2).stderr
    assert "--out missing" in run_here("convert", "carla", carla_run, code=2).stderr
    offset = run_here("convert", "carla", carla_run, "--out", tmp_path / "a", "--origin-offset", "1,2", code=2).stderr
    assert "three numbers: metres forward, left, up" in offset
    camera = run_here("convert", "mcap", carla_run, "--out", tmp_path / "a", "--camera", "front_wide", code=2).stderr
    assert "NAME=TOPIC" in camera


def test_the_output_does_not_lie_in_the_input(carla_run, tmp_path, run_here):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "good").symlink_to(carla_run)
    for out in (runs, runs / "drives", runs / "deep" / "drives"):
        said = run_here("convert", "carla", runs, "--out", out, code=2).stderr
        assert f"lies in the input {runs}; choose a folder outside of it" in said.replace("\n", " ")
    assert [path.name for path in runs.iterdir()] == ["good"]


def test_a_request_to_stop_with_the_last_clip_leaves_out_the_check(carla_run, tmp_path, run_here, monkeypatch):
    from alpacache.converters import writer

    def last(*args, **kwargs):
        report = written(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return report

    written = writer.convert
    monkeypatch.setattr(writer, "convert", last)
    said = run_here("convert", "carla", carla_run, "--out", tmp_path / "out", code=130).stderr
    assert "all clips are written; the same command checks them" in said.replace("\n", " ")
    monkeypatch.undo()
    assert json.loads(run_here("convert", "carla", carla_run, "--out", tmp_path / "out", "--json").stdout)["kept"] == 1


@pytest.mark.ci
def test_cropped_pictures_are_not_mixed_with_others(carla_run, tmp_path, run_here, caplog):
    """What was done to the pictures is part of a store's identity, and of what commands say of a run's stores."""
    tiny_checkpoint = make_tiny_checkpoint(tmp_path / "Tiny-R1")
    for name, options in {"plain": (), "cropped": ("--crop",)}.items():
        run_here("convert", "carla", carla_run, "--out", tmp_path / name, "--no-check", *options)
    model = ("--model", tiny_checkpoint, "--device", "cpu", "--frames", 1, "--codec", "int8", "--hidden-states", "none")
    for name in ("plain", "cropped"):
        run_here("extract", f"folder:{tmp_path / name}", "--store", tmp_path / f"{name}-store", *model)
    found = json.loads(run_here("info", tmp_path / "cropped-store", "--json").stdout)
    assert found["identity"]["changes"] == ["crop"]
    assert "changes" not in json.loads(run_here("info", tmp_path / "plain-store", "--json").stdout)["identity"]
    assert "changed by crop" in run_here("info", tmp_path / "cropped-store").stdout
    said = run_here(
        "extract", f"folder:{tmp_path / 'plain'}", "--store", tmp_path / "cropped-store", *model, code=2
    ).stderr
    assert "pictures were changed since they were recorded by crop, this run's by nothing" in said
    stores = ("--store", tmp_path / "plain-store", "--store", tmp_path / "cropped-store", "--on-overlap", "allow")
    more = ("--model", tiny_checkpoint, "--out", tmp_path / "run", "--steps", 1, "--device", "cpu")
    assert "batch_size is 8" in run_here("train", *stores, *more, code=2).stderr  # said before anything is trained
    assert "the stores show pictures that were changed since they were recorded by crop; nothing" in caplog.text


def test_a_killed_command_goes_on_and_the_result_is_the_same(carla_run, tmp_path, run_here):
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["convert", "carla", str(carla_run), "--no-check", "--clip-seconds", "10"]
    process = subprocess.Popen([sys.executable, "-m", "cli.main", *arguments, "--out", str(out)], cwd=ROOT)
    began = time.monotonic()
    while not (out / "clips/run_7-000").exists() and process.poll() is None:
        assert time.monotonic() < began + 120
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    names = {path.name for path in (out / "clips").iterdir()} - {".writing"}
    assert "run_7-000" in names
    for name in names:
        assert (out / "clips" / name / "provenance.json").is_file()
    run_here(*arguments, "--out", out)
    run_here(*arguments, "--out", whole)
    files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert list(FolderSource(out).clip_ids) == ["run_7-000", "run_7-001"]
