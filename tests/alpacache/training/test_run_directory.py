"""The run directory: a kill or a full disk at any moment leaves checkpoints and links that can be read."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from alpacache.errors import DataError, UsageError
from alpacache.training import run_directory
from alpacache.training.run_directory import (
    RunCheckpoint,
    RunDirectory,
    find_checkpoint,
    read_checkpoint,
)
from cache_store.storage import local_files


@pytest.fixture
def content(run_state):
    return lambda step: RunCheckpoint(model={"w": torch.full((3,), float(step))}, optimizer={}, state=run_state())


def linked(path, name):
    """The step that a link leads to, once its bytes are checked."""
    return int(read_checkpoint(path / name).model["w"][0])


class Kill(BaseException):
    """What no handler may swallow."""


def kill_at(monkeypatch, call):
    """Die before the call-th change of a name, or after a first file is gone from a folder that is deleted."""
    left = [call]

    def dying(function):
        def wrapped(*given, **named):
            left[0] -= 1
            if left[0] == 0:
                if function.__name__ == "rmtree":
                    min(Path(given[0]).iterdir()).unlink()
                raise Kill
            return function(*given, **named)

        return wrapped

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "symlink_to"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    return left


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_moment_leaves_links_that_lead_to_whole_checkpoints(tmp_path, again, content):
    """With a new best, which is what drops the old one; `again`: the same step is written a second time."""
    for call in range(1, 30):
        path = tmp_path / str(call)
        directory = RunDirectory(path)
        for step, best in ((1, 1), (2, 1), (3, 1)) + ((4, 4),) * again:
            directory.save(step, content(step), keep=1 + again, best=best)
        with pytest.MonkeyPatch.context() as patched:
            left = kill_at(patched, call)
            with suppress(Kill):
                directory.save(4, content(4), keep=1 + again, best=4)
        for step in directory.steps:
            assert linked(directory.checkpoints, f"step-{step:07d}") == step
        if not again:  # else the step is not there between two renames
            assert linked(path, "last") in (3, 4)
            assert linked(path, "best") in (1, 4)
            assert find_checkpoint(path) == path / "best"
        best = 4 if 4 in directory.steps else 3
        directory.save(5, content(5), keep=1, best=best)
        assert directory.steps == [best, 5]
        assert (linked(path, "best"), linked(path, "last")) == (best, 5)
        assert {each.name for each in directory.checkpoints.iterdir()} == {f"step-000000{n}" for n in (best, 5)}
        if left[0] > 0:
            break
    assert 5 < call < 20


def test_a_best_that_was_never_written_costs_no_earlier_one(tmp_path, content):
    directory = RunDirectory(tmp_path)
    for step, best in ((1, 1), (3, 2), (4, 2), (5, 2)):
        directory.save(step, content(step), keep=2, best=best)
    assert directory.steps == [1, 4, 5]
    assert linked(tmp_path, "best") == 1
    directory.save(6, content(6), keep=2, best=6)
    assert directory.steps == [5, 6]


def test_links_are_mended_where_a_run_goes_on(tmp_path, content):
    directory = RunDirectory(tmp_path)
    for step in (1, 2):
        directory.save(step, content(step), keep=2, best=1)
    directory.point_links(2, best=2)
    assert (linked(tmp_path, "last"), linked(tmp_path, "best")) == (2, 2)


def test_a_link_that_leads_nowhere_is_named_and_no_other_taken_for_it(tmp_path, content):
    directory = RunDirectory(tmp_path / "run")
    directory.save(1, content(1), keep=2)
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/last"
    (tmp_path / "latest").symlink_to("run")
    assert find_checkpoint(tmp_path / "latest") == tmp_path / "latest/last"
    directory.point("best", 7)
    with pytest.raises(DataError, match=r"run/best points at checkpoints/step-0000007, which is no checkpoint"):
        find_checkpoint(tmp_path / "run")
    assert find_checkpoint(directory.checkpoint(1)) == directory.checkpoint(1)
    with pytest.raises(UsageError, match="neither a run directory"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_told_with_what_would_help_wherever_it_is_met(tmp_path, monkeypatch, code, content):
    directory = RunDirectory(tmp_path)
    directory.save(1, content(1), keep=2)
    directory.append_metrics({"step": 1})

    def full(*given):
        raise OSError(code, os.strerror(code))

    def appending(path, mode="r", *given, **named):
        return full() if mode == "a" else good(path, mode, *given, **named)

    good = Path.open

    calls = {
        "metrics could": lambda: directory.append_metrics({"step": 2}),
        "metrics.jsonl could": lambda: directory.rewind_metrics(1),
        "memory.json could": lambda: directory.write("memory.json", "{}"),
        "config.toml could": lambda: directory.write("config.toml", ""),
        "checkpoint at step 2 could": lambda: directory.save(2, content(2), keep=2),
    }
    for what, call in calls.items():
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", appending)
            patched.setattr(local_files, "flush", full)
            patched.setattr(run_directory, "flush", full)
            with pytest.raises(OSError) as caught:
                call()
        if code == errno.EIO:
            assert caught.value.errno == code
        else:
            assert isinstance(caught.value, DataError)
            assert what in str(caught.value)
            assert "free space and run again with --resume" in str(caught.value)
    assert directory.metrics(up_to=9) == [{"step": 1}]
    assert linked(tmp_path, "last") == 1


@pytest.mark.parametrize(
    "key", ["stores", "draws", "damaged_indices", "vlm", "average", "best", "base", "files", "step"]
)
def test_a_state_of_another_form_is_refused_with_file_and_key(tmp_path, content, key):
    path = RunDirectory(tmp_path).save(1, content(1), keep=2)
    state = json.loads((path / "state.json").read_text())
    where = state["settings"] if key in state["settings"] else state
    del where[key]
    (path / "state.json").write_text(json.dumps(state))
    name = f"settings.{key}" if where is not state else key
    with pytest.raises(
        DataError, match=rf"step-0000001/state\.json cannot be read \(state\.json: {name} is missing\.\)"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: Input should be 1, not 2"),
        ({"damaged_indices": ["a"]}, r"damaged_indices\.0: Input should be a valid integer, not 'a'"),
        ({"average": {"decay": 0.9, "behind": 0, "kind": "two"}}, r"average\.kind: Extra inputs are not permitted"),
        ({"files": {}}, r"files\.model\.safetensors is missing; files\.optimizer\.safetensors is missing"),
    ],
)
def test_a_value_of_another_form_is_named(tmp_path, content, change, message):
    path = RunDirectory(tmp_path).save(1, content(1), keep=2)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(DataError, match=message):
        read_checkpoint(path)
    (path / "state.json").write_text("[1]")
    with pytest.raises(DataError, match="holds a list; expected a JSON object"):
        RunDirectory(tmp_path).state(1)
