"""The run directory: a kill or a full disk at any moment leaves checkpoints and links that can be read."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from alpacache.config import to_toml
from alpacache.errors import DataError, UsageError
from alpacache.training import run_directory
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import (
    RunCheckpoint,
    RunDirectory,
    find_checkpoint,
    read_checkpoint,
)
from alpacache.training.run_state import sealed
from cache_store.storage import local_files
from cli.train import _read_file as read_settings


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
            assert find_checkpoint(path) in (directory.checkpoint(1), directory.checkpoint(4))
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
    directory.mark(2, best=2)
    assert (linked(tmp_path, "last"), linked(tmp_path, "best")) == (2, 2)


def test_a_best_that_is_gone_is_named_and_no_other_taken_for_it(tmp_path, content):
    directory = RunDirectory(tmp_path / "run")
    for step in (1, 2):
        directory.save(step, content(step), keep=2)
    assert find_checkpoint(tmp_path / "run") == directory.checkpoint(2)
    (tmp_path / "latest").symlink_to("run")
    assert find_checkpoint(tmp_path / "latest") == tmp_path / "latest/checkpoints/step-0000002"
    directory.mark(2, best=1)
    shutil.rmtree(directory.checkpoint(1))
    with pytest.raises(DataError, match=r"run names step 1 as its best checkpoint, which is not there \(any more\)"):
        find_checkpoint(tmp_path / "run")
    assert find_checkpoint(directory.checkpoint(2)) == directory.checkpoint(2)
    with pytest.raises(UsageError, match="neither a run directory"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("how", ["run.json", "links", "copies", "neither"])
def test_a_run_is_known_by_its_file_or_as_older_ones_by_links_copies_or_its_newest_checkpoint(tmp_path, how, run_state):
    directory = RunDirectory(tmp_path / "run")
    for step in (1, 2, 3):
        state = run_state(best={"step": 2, "value": 0.5, "by": "loss", "since": 1})
        directory.save(step, RunCheckpoint(model={}, optimizer={}, state=state), keep=3, best=min(step, 2))
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=how == "links")
    if how != "run.json":
        (copied / "run.json").unlink()
    if how in ("run.json", "neither"):
        shutil.rmtree(copied / "last")
        shutil.rmtree(copied / "best")
    copy = RunDirectory(copied)
    assert copy.is_run
    assert find_checkpoint(copied) == copy.checkpoint(2)
    copy.save(4, RunCheckpoint(model={}, optimizer={}, state=state), keep=1, best=2)
    assert copy.steps == [2, 4]
    assert {name: (copied / name).readlink().name for name in ("last", "best")} == {
        "last": "step-0000004",
        "best": "step-0000002",
    }


def test_without_symbolic_links_all_works_and_no_link_is_left_that_means_another(tmp_path, content, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.save(1, content(1), keep=1, best=1)

    def refuse(link, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    directory.save(2, content(2), keep=1, best=1)
    directory.save(3, content(3), keep=1, best=3)
    assert find_checkpoint(tmp_path) == directory.checkpoint(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "run.json"]
    assert directory.steps == [3]


def test_a_copy_of_a_checkpoint_under_a_links_name_is_not_deleted_unless_it_is_one_twice(tmp_path, content, caplog):
    directory = RunDirectory(tmp_path)
    directory.save(1, content(1), keep=2)
    (tmp_path / "last").unlink()
    directory.checkpoint(1).rename(tmp_path / "last")
    directory.save(2, content(2), keep=2)
    assert linked(tmp_path, "last") == 1
    assert "last is a directory of its own and stays" in caplog.text
    assert find_checkpoint(tmp_path) == directory.checkpoint(2)


def test_what_a_kill_in_the_last_save_has_left_goes_when_the_run_is_resumed(tmp_path, content):
    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        directory.save(step, content(step), keep=3, best=1)
    (directory.checkpoints / ".dropped-step-0000000").mkdir()
    (directory.checkpoints / ".writing-0000004").mkdir()
    directory.prune(1)
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["step-0000001", "step-0000003"]


def test_files_have_the_modes_that_the_umask_leaves(tmp_path, content):
    before = os.umask(0o027)
    try:
        path = RunDirectory(tmp_path / "run").save(1, content(1), keep=1)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "optimizer.safetensors", "state.json"), "0o640")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: (place / "config.toml").write_text("# mine"), "is no run but holds config.toml; nothing of it"),
        (lambda place: (place / "run.json").write_text('{"mine": 1}'), "is no run but holds run.json"),
        (lambda place: (place / "checkpoints/step-1").mkdir(parents=True), "is no run but holds checkpoints"),
        (lambda place: (place / "zarr.json").write_text('{"attributes":{"cache_store":1}}'), "is a store"),
    ],
)
def test_a_directory_of_other_things_is_not_taken_for_a_run(tmp_path, make, message):
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message):
        RunDirectory(tmp_path).check_usable()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_for_a_run_is_a_directory_on_a_disk_outside_of_stores(tmp_path, content):
    (tmp_path / "file").write_text("")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/zarr.json").write_text('{"attributes":{"cache_store":1}}')
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    for place, message in (("file", "is a file"), ("store/new/run", "store is a store")):
        with pytest.raises(UsageError, match=message):
            RunDirectory(tmp_path / place).check_usable()
    with pytest.raises(UsageError, match="is no path"):
        RunDirectory("s3://bucket/run").check_usable()
    for place in ("disk", "new"):
        RunDirectory(tmp_path / place).check_usable()
    directory = RunDirectory(tmp_path / "run")
    directory.save(3, content(3), keep=1)
    directory.check_usable()
    shutil.rmtree(directory.checkpoints)
    with pytest.raises(DataError, match="has been trained to step 3, but no whole checkpoint"):
        directory.check_usable()


def test_a_flipped_bit_in_run_json_is_found_and_resuming_mends_it(tmp_path, content):
    directory = RunDirectory(tmp_path)
    for step in (1, 2):
        directory.save(step, content(step), keep=2, best=1)
    data = bytearray((tmp_path / "run.json").read_bytes())
    data[data.index(b'"best": ') + 8] ^= 3
    (tmp_path / "run.json").write_bytes(data)
    with pytest.raises(DataError, match=r"run\.json does not match its own checksum.*resume the run"):
        find_checkpoint(tmp_path)
    directory.check_usable()
    directory.mark(2, best=1)
    assert find_checkpoint(tmp_path) == directory.checkpoint(1)


@pytest.mark.parametrize("how", ["copied", "swapped", "copied to the middle"])
def test_a_checkpoint_named_after_another_step_is_refused_before_anything_is_dropped(tmp_path, content, how):
    directory = RunDirectory(tmp_path)
    for step in (2, 4, 6):
        directory.save(step, content(step), keep=3, best=2)
    named, held = {"copied": (8, 2), "swapped": (2, 4), "copied to the middle": (5, 4)}[how]
    if how == "swapped":
        directory.checkpoint(4).rename(tmp_path / "aside")
        directory.checkpoint(2).rename(directory.checkpoint(4))
        (tmp_path / "aside").rename(directory.checkpoint(2))
    else:
        shutil.copytree(directory.checkpoint(held), directory.checkpoint(named))
    before = sorted(tmp_path.rglob("*"))
    message = rf"step-000000{named} is named after step {named} but holds the checkpoint of step {held}; it was renamed"
    with pytest.raises(DataError, match=message):
        directory.check_usable()
    with pytest.raises(DataError, match=message):
        directory.state(named)
    with pytest.raises(DataError, match=message):
        read_checkpoint(directory.checkpoint(named))
    if how == "swapped":
        with pytest.raises(DataError, match=message):
            read_checkpoint(tmp_path / "best")
    assert sorted(tmp_path.rglob("*")) == before
    shutil.copytree(directory.checkpoint(6), tmp_path / "mine")
    assert read_checkpoint(tmp_path / "mine").state["step"] == 6  # a name that tells no step
    if how == "copied":
        shutil.rmtree(directory.checkpoint(8))
        (directory.checkpoint(4) / "state.json").write_text("{")  # damaged, but nobody needs it
        directory.check_usable()


def test_only_exact_names_are_checkpoints_and_no_copy_beside_them_is_counted_or_deleted(tmp_path, content):
    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        directory.save(step, content(step), keep=3)
    copies = [
        "step-2",
        "step-²",
        "step-000002",
        "step-00000002",
        "step-٠٠٠٠٠٠2",
        "step-0000002.bak",
        "step-",
        "step- 2",
    ]
    for name in copies:
        shutil.copytree(directory.checkpoint(2), directory.checkpoints / name)
    assert directory.steps == [1, 2, 3]
    directory.check_usable()
    directory.save(4, content(4), keep=2)
    assert directory.steps == [3, 4]
    assert {path.name for path in directory.checkpoints.iterdir()} == {*copies, "step-0000003", "step-0000004"}
    directory.save(12345678, content(1), keep=1)
    assert directory.steps == [12345678]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_text("{"), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b'"last": 1', b'"last": 2')), "damaged"),
    ],
)
def test_of_a_run_without_checkpoints_is_said_what_else_it_lacks(tmp_path, content, damage, lost):
    directory = RunDirectory(tmp_path)
    directory.begin("")
    directory.check_usable()
    directory.save(1, content(1), keep=1)
    damage(tmp_path / "run.json")
    directory.check_usable()
    shutil.rmtree(directory.checkpoints)
    with pytest.raises(DataError, match=rf"its run\.json is {lost}, and no whole checkpoint is in .*bring them back"):
        directory.check_usable()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "run.json", "memory.json", "wandb-id"])
@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "a directory"), (os.mkfifo, "a FIFO")])
def test_what_is_no_file_under_the_name_of_one_is_refused_at_once(tmp_path, content, name, make, kind):
    directory = RunDirectory(tmp_path)
    directory.begin("")
    directory.save(1, content(1), keep=1)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(
        UsageError, match=rf"{name} cannot be used: it is {kind}; expected a regular file\. Move it away"
    ):
        directory.check_usable()


FOLDERS = ["checkpoints", "tensorboard", "wandb"]
INSIDE = ["checkpoints/step-0000002", "checkpoints/.writing-0000002", "checkpoints/.dropped-step-0000001"]


@pytest.mark.parametrize("name", [*FOLDERS, *INSIDE])
@pytest.mark.parametrize("kind", ["a file", "a link that leads to none"])
def test_what_is_no_directory_under_the_name_of_one_is_refused_at_once(tmp_path, content, name, kind):
    directory = RunDirectory(tmp_path)
    directory.begin("")
    if name in INSIDE:
        directory.save(1, content(1), keep=1)
    place = tmp_path / name
    place.write_text("mine") if kind == "a file" else place.symlink_to("nowhere")
    with pytest.raises(UsageError, match=rf"{name} cannot be used: it is {kind}; expected a directory\. Move it away"):
        directory.check_usable()


@pytest.mark.parametrize("name", ["metrics.jsonl", "wandb-id", ".run.json.new", "checkpoints/.writing-0000002"])
def test_nothing_is_written_or_deleted_through_a_link(tmp_path, content, name):
    directory = RunDirectory(tmp_path / "run")
    directory.begin("")
    directory.save(1, content(1), keep=1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir() if name in INSIDE else elsewhere.write_text("mine")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(elsewhere)
    with pytest.raises(UsageError, match=rf"{name} cannot be used: it is a link.* expected a (regular file|directory)"):
        directory.check_usable()
    if name == ".run.json.new":
        with pytest.raises(OSError, match="symbolic link"):
            directory.mark(1, best=None)
    assert elsewhere.is_dir() or elsewhere.read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path, content, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.begin("")
    directory.save(1, content(1), keep=1)
    directory.append_metrics({"step": 1})
    for place in (tmp_path, directory.checkpoints, directory.metrics.path):
        with monkeypatch.context() as patch:  # root may write anywhere
            patch.setattr(os, "access", lambda path, mode, place=place: path != place)
            with pytest.raises(UsageError, match=f"{place.name} cannot be used: this user may not write to it"):
                directory.check_usable()
    directory.check_usable()


def test_of_a_checkpoint_that_lies_elsewhere_only_the_link_goes(tmp_path, content):
    directory = RunDirectory(tmp_path / "run")
    directory.save(1, content(1), keep=3)
    directory.checkpoint(1).rename(tmp_path / "step-0000001")
    directory.checkpoint(1).symlink_to(tmp_path / "step-0000001")
    directory.check_usable()
    directory.save(2, content(2), keep=1)
    assert directory.steps == [2]
    assert read_checkpoint(tmp_path / "step-0000001").state["step"] == 1


def test_a_file_under_a_links_name_stays_unless_it_is_a_link_that_was_unpacked_as_one(tmp_path, content, caplog):
    directory = RunDirectory(tmp_path)
    directory.save(1, content(1), keep=2, best=1)
    for name, text in (("last", "my notes"), ("best", "checkpoints/step-0000001\n")):
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(text)
    directory.save(2, content(2), keep=2, best=2)
    assert (tmp_path / "last").read_text() == "my notes"
    assert "last is a file of its own and stays" in caplog.text
    assert linked(tmp_path, "best") == 2
    assert find_checkpoint(tmp_path) == directory.checkpoint(2)


def test_a_runs_own_settings_mean_the_run_beside_them(tmp_path, content):
    directory = RunDirectory(tmp_path / "old")
    directory.begin(to_toml(TrainConfig(stores=("s",), model="m", out="old", steps=3)))
    directory.save(1, content(1), keep=1)
    (tmp_path / "old").rename(tmp_path / "new")
    values = read_settings(tmp_path / "new/config.toml", {"resume": True})
    assert (values["out"], values["steps"]) == (str(tmp_path / "new"), 3)
    assert read_settings(tmp_path / "new/config.toml", {})["out"] == "old"
    assert (
        read_settings(tmp_path / "new/config.toml", {"resume": True, "out": "x"})["out"] == "old"
    )  # "x" is put over it
    (tmp_path / "new/config.toml").rename(tmp_path / "new/mine.toml")
    (tmp_path / "link.toml").symlink_to("new/mine.toml")
    directory = RunDirectory(tmp_path / "another")
    directory.begin("")
    (tmp_path / "another/link.toml").symlink_to(tmp_path / "new/mine.toml")
    for name in ("new/mine.toml", "link.toml", "another/link.toml"):
        values = read_settings(tmp_path / name, {"resume": True})
        assert (Path(values["out"]), values["steps"]) == (tmp_path / "new", 3)
    (tmp_path / "new/mine.toml").rename(tmp_path / "new/config.toml")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "new/config.toml", tmp_path / "alone/config.toml")
    with pytest.raises(UsageError, match=r"alone/config\.toml holds the settings of a run that is not there"):
        read_settings(tmp_path / "alone/config.toml", {"resume": True})
    (tmp_path / "alone/config.toml").write_text('out = "mine"\n')
    assert read_settings(tmp_path / "alone/config.toml", {"resume": True}) == {"out": "mine"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_told_with_what_would_help_wherever_it_is_met(tmp_path, monkeypatch, code, content):
    directory = RunDirectory(tmp_path)
    directory.save(1, content(1), keep=2)
    directory.append_metrics({"step": 1})

    def full(*given):
        raise OSError(code, os.strerror(code))

    def appending(path, mode="r", *given, **named):
        return full() if mode == "ab" else good(path, mode, *given, **named)

    good = Path.open

    calls = {
        "metrics could": lambda: directory.append_metrics({"step": 2}),
        "metrics.jsonl could": lambda: directory.rewind_metrics(0),
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
    assert directory.metrics.rows(up_to=9) == [{"step": 1}]
    assert linked(tmp_path, "last") == 1


def write_unsealed(checkpoint, state):
    """As versions did that knew no checksum of the state."""
    del state["document_crc32c"]
    if state["format"] == 2:
        state["format"] = 1
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_every_flipped_bit_of_a_state_is_found(tmp_path, content):
    path = RunDirectory(tmp_path).save(1, content(1), keep=2)
    whole = (path / "state.json").read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        (path / "state.json").write_bytes(data)
        with pytest.raises(DataError, match=r"step-0000001/state\.json cannot be read .*; use an earlier checkpoint"):
            RunDirectory(tmp_path).state(1)
    write_unsealed(path, json.loads(whole))
    assert RunDirectory(tmp_path).state(1)["step"] == 1


@pytest.mark.parametrize(
    "key", ["stores", "draws", "damaged_indices", "vlm", "average", "best", "base", "files", "step"]
)
def test_a_state_of_another_form_is_refused_with_file_and_key(tmp_path, content, key):
    path = RunDirectory(tmp_path).save(1, content(1), keep=2)
    state = json.loads((path / "state.json").read_text())
    where = state["settings"] if key in state["settings"] else state
    del where[key]
    write_unsealed(path, state)
    name = f"settings.{key}" if where is not state else key
    with pytest.raises(DataError, match=rf"step-0000001/state\.json cannot be read \(state\.json: {name} is missing\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format: expected 1 or 2, not 3"),
        ({"damaged_indices": ["a"]}, r"damaged_indices\.0: expected a valid integer, not 'a'"),
        ({"average": {"decay": 0.9, "behind": 0, "kind": "two"}}, r"average\.kind: Extra inputs are not permitted"),
        ({"files": {}}, r"files\.model\.safetensors is missing; files\.optimizer\.safetensors is missing"),
    ],
)
def test_a_value_of_another_form_is_named(tmp_path, content, change, message):
    path = RunDirectory(tmp_path).save(1, content(1), keep=2)
    state = json.loads((path / "state.json").read_text())
    del state["document_crc32c"]
    (path / "state.json").write_bytes(sealed(state | change))
    with pytest.raises(DataError, match=message):
        read_checkpoint(path)
    (path / "state.json").write_text("[1]")
    with pytest.raises(DataError, match="holds a list; expected a JSON object"):
        RunDirectory(tmp_path).state(1)


def test_a_pointer_of_git_lfs_in_place_of_the_weights_is_called_one(tmp_path, content):
    path = RunDirectory(tmp_path).save(1, content(1), keep=1)
    (path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read: it is a git-lfs pointer.*`git lfs pull`"):
        read_checkpoint(path)
