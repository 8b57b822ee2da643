"""Trackers: what is told to a library that is not installed here."""

import sys
from types import SimpleNamespace

import pytest

from alpacache.errors import UsageError
from alpacache.training.run_log import make_trackers, scalars


class Wandb:
    """As much of the library as is used."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0
        self.util = SimpleNamespace(generate_id=lambda: f"id{len(self.begun)}")

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
    assert [settings["id"] for settings in library.begun] == ["id0", "id0"]
    assert library.begun[0]["config"] == {"toml": "steps = 3\n"}
    assert {settings["resume"] for settings in library.begun} == {"allow"}
    assert library.logged == [(1, {"loss": 1.0}), (3, {"loss": 1.0})]
    assert library.finished == 2


def test_an_absent_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"alpacache\[wandb\]"):
        make_trackers("wandb", tmp_path, first_step=0, config_toml="")


def test_scalars_are_numbers_alone():
    row = {"step": 3, "loss": None, "lr": 1, "skipped": ["a"], "val_loss/straight": 2.5, "flag": True}
    assert scalars(row) == {"lr": 1.0, "val_loss/straight": 2.5}
