"""`alpacache doctor`: exit code, JSON, and that nothing stays behind."""

import json
import os
import subprocess
import sys

import pytest


def run(*arguments, **environment):
    command = [sys.executable, "-m", "cli.main", "doctor", *map(str, arguments)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secret"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | hidden | environment)


@pytest.mark.system
def test_without_a_gpu_it_is_exit_1_and_json_names_every_check(tmp_path):
    done = run("--store", tmp_path / "store", "--model", "owner/model-that-is-not-there", "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    checks = {check["name"]: check for check in report["checks"]}
    assert [checks[name]["status"] for name in ("python", "packages", "gpu", "hard links")] == [
        "ok",
        "ok",
        "fail",
        "ok",
    ]
    assert all(set(check) == {"name", "status", "found", "remedy"} for check in report["checks"])
    assert checks["hub"]["found"] == "a token, offline"
    assert "is not in the local hub cache" in checks["model"]["found"]
    assert "hf_secret" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci
def test_the_table_has_the_next_steps(tmp_path):
    done = run("--store", tmp_path)
    text = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "fail gpu no GPU" in text
    assert "HF_HUB_OFFLINE is set" in text
