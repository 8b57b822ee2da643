"""`alpacache check`: exit codes, JSON, files; what it finds is tested with the library."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

CAMERA = "camera_front_wide_120fov"


def run(*arguments):
    command = [sys.executable, "-m", "cli.main", "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture
def folder(tmp_path):
    """Two clips on a straight road at about 10 m/s."""

    def make(*, scale=1.0, seconds=(12.0, 12.0)):
        root = tmp_path / "drives"
        picture = np.random.default_rng(0).integers(0, 255, (48, 96, 3), dtype=np.uint8)
        for number, length in enumerate(seconds):
            clip = root / "clips" / f"drive-{number}"
            (clip / CAMERA).mkdir(parents=True)
            stamps = np.arange(0, round(length * 1e6) + 1, 100_000)
            still = 0.0 * stamps
            columns = {"x": stamps * 1e-5 * (1 + 0.1 * number) * scale, "y": still, "z": still}
            columns |= {"qx": still, "qy": still, "qz": still, "qw": still + 1}
            pq.write_table(pa.table({"timestamp": stamps, **columns}), clip / "egomotion.parquet")
            pq.write_table(pa.table({"timestamp": stamps}), clip / f"{CAMERA}.timestamps.parquet")
            for frame in range(len(stamps)):
                Image.fromarray(picture).save(clip / CAMERA / f"{frame:06d}.jpg")
        index = {"name": "d", "cameras": [CAMERA], "clips": [f"drive-{n}" for n in range(len(seconds))]}
        (root / "dataset.json").write_text(json.dumps(index))
        return f"folder:{root}"

    return make


@pytest.mark.system
def test_no_package_is_loaded_that_would_take_longer_than_the_checks(folder):
    code = f"import sys; from cli.main import main\nsys.argv = ['alpacache', 'check', {folder()!r}]\n"
    code += "try: main()\nexcept SystemExit: pass\nprint('modules:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"alpacache.checks.actions", "scipy", "PIL"} <= loaded
    assert not {"torch", "pandas", "matplotlib"} & loaded


@pytest.mark.system
def test_sound_recordings_are_exit_0_with_a_report_and_a_picture(folder, tmp_path):
    done = run(folder(), "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["samples"], report["refused"]) == (True, 2, 0)
    assert report["clip_counts"] == {"ok": 2, "warn": 0, "fail": 0}
    assert [check["name"] for check in report["checks"]] == list(report["meanings"])
    assert set(report["checks"][0]) == {"name", "status", "found", "remedy"}
    assert report["strata"]["straight"] == 2
    assert report["lag_curve"] is None  # straight on
    assert report["speeds_mps"]["median"] == pytest.approx(10.5, abs=0.01)
    assert set(report["clips"][0]) == {"clip_id", "samples", "refused", "checks"}
    assert json.loads((tmp_path / "out/check.json").read_text()) == report
    with Image.open(tmp_path / "out/contact_sheet.png") as image:
        assert np.asarray(image.convert("L")).std() > 20


@pytest.mark.ci
def test_a_report_takes_the_place_of_a_report_and_of_nothing_else(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "contact_sheet.png").write_text("mine")
    refused = run(folder(), "--out", out)
    assert refused.returncode == 2
    assert "holds contact_sheet.png, but no whole check; nothing is written over" in " ".join(refused.stderr.split())
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("contact_sheet.png", "mine")]
    (out / "contact_sheet.png").rename(out / "notes")
    for _ in range(2):
        done = run(f"folder:{tmp_path / 'drives'}", "--out", out)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["check.json", "contact_sheet.png", "notes"]
    assert (out / "notes").read_text() == "mine"


@pytest.mark.system
def test_a_refused_clip_is_exit_3(folder):
    done = run(folder(seconds=(12.0, 6.0)), "--json")
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    refused = [entry for clip in report["clips"] for entry in clip["refused"]]
    assert [(entry["where"], entry["kind"]) for entry in refused] == [("drive-1", "short_clip")]
    assert "too short" in refused[0]["message"]


@pytest.mark.system
def test_a_wrong_source_is_exit_1_and_the_table_says_what_to_do(folder):
    done = run(folder(scale=7.0))
    text = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert "fail speed median" in text
    assert "Expected: speeds and sideways accelerations are those of road vehicles" in text
    assert "3.6 times too large" in text


def test_a_source_of_refused_clips_is_exit_1_and_no_check_is_called_ok_unjudged(folder):
    done = run(folder(seconds=(6.0, 7.0)))
    text = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert "fail samples 0 usable, 2 refused (short_clip)" in text
    assert "- times not judged" not in text  # its clocks were read
    assert "- pictures not judged: no usable sample" in text


@pytest.mark.system
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "is no data source"),
        (["folder:nowhere"], "dataset.json"),
        (["synthetic:3", "--split", "test"], "split is 'test'; expected 'train', 'val' or 'all'"),
        (["synthetic:3", "--frames", "0"], "frames is 0; expected 1, 2, 3 or 4."),
        (["synthetic:3", "--frames", "5"], "frames is 5; expected 1, 2, 3 or 4."),
        (["synthetic:3", "--t0", "soon"], "t0 is 'soon'"),
        (["synthetic:3", "--cameras", "top"], "unknown camera 'top'"),
        (["synthetic:3", "--out", "/dev/null/x"], "cannot be made"),
    ],
)
def test_bad_usage_is_exit_2(arguments, said, tmp_path):
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
