"""Trackers: what is told to them, and that training goes on without one that fails."""

import json
import os
import subprocess
import sys

import pytest

from alpacache.errors import UsageError
from alpacache.progress import ignore
from alpacache.training.run_directory import RunDirectory
from alpacache.training.run_log import RunLog, make_trackers, scalars


class Wandb:
    """As much of the library as is used."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0
        self.Error = RuntimeError

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_a_resumed_run_goes_on_under_its_id(tmp_path, monkeypatch):
    library = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", library)
    for first_step in (0, 2):
        trackers = make_trackers("wandb", tmp_path, first_step=first_step, config_toml="steps = 3\n")
        for tracker in trackers:
            tracker.log(first_step + 1, {"loss": 1.0})
            tracker.close()
    first, second = (settings["id"] for settings in library.begun)
    assert first == second == (tmp_path / "wandb-id").read_text().strip()
    assert library.begun[0]["config"] == {"toml": "steps = 3\n"}
    assert {settings["resume"] for settings in library.begun} == {"allow"}
    assert library.logged == [(1, {"loss": 1.0}), (3, {"loss": 1.0})]
    assert library.finished == 2


def test_an_absent_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"alpacache\[wandb\]"):
        make_trackers("wandb", tmp_path, first_step=0, config_toml="")


TRACK = """
import sys
from pathlib import Path
from alpacache.training.run_log import make_trackers
for step in (1, 2):
    trackers = make_trackers("wandb", Path(sys.argv[1]), first_step=step - 1, config_toml="steps = 3")
    for tracker in trackers:
        tracker.log(step, {"loss": 0.5})
        tracker.close()
"""


@pytest.mark.ci
@pytest.mark.parametrize("key", ["offline", "no key", "nonsense"])
def test_the_library_itself_tracks_offline_and_asks_for_a_key(tmp_path, key):
    """In a process of its own: the library has one of its own, too."""
    pytest.importorskip("wandb")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    settings |= {"HOME": str(tmp_path), "WANDB_SILENT": "true"} | ({} if key == "no key" else {"WANDB_MODE": key})
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", TRACK, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, stdin=subprocess.DEVNULL)
    if key == "offline":
        assert done.returncode == 0, done.stderr
        run_id = (tmp_path / "run/wandb-id").read_text().strip()
        found = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")]
        assert found == [f"run-{run_id}.wandb"] * 2
        return
    assert done.stderr.splitlines()[-1].startswith(
        "alpacache.errors.UsageError: Weights & Biases cannot track this run ("
    )
    assert "Run `wandb login`" in done.stderr
    assert not (tmp_path / "run/wandb-id").exists()


class Failing:
    name = "Board"

    def log(self, step, scalars):
        raise OSError(28, "No space left on device")

    close = log


def test_training_goes_on_without_a_tracker_that_fails(tmp_path, caplog):
    log = RunLog(RunDirectory(tmp_path), first=0, total=2, batch_size=1, on_progress=ignore, writes=True)
    (tmp_path / "metrics.jsonl").touch()
    log.trackers = [Failing()]
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0, "samples_per_s": 1.0}, {})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["Board takes no more numbers ([Errno 28] No space left on device); training goes on without it."]


def test_scalars_are_numbers_alone():
    row = {"step": 3, "loss": None, "lr": 1, "skipped": ["a"], "val_loss/straight": 2.5, "flag": True}
    assert scalars(row) == {"lr": 1.0, "val_loss/straight": 2.5}
