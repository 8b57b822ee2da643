"""A directory of results is there as a whole, or visibly not; a kill mixes no two."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from alpacache.directory_lock import LOCK
from alpacache.durable import appearing, check_out, check_results_out, check_store_place, names_in, naming, take_back
from alpacache.errors import UsageError
from cache_store import StoreFullError
from cache_store.document import seal_bytes

MAIN, REST = ("report", "numbers"), ("table", "pictures")


class Kill(BaseException):
    """What no handler may swallow."""


def write(out, text):
    with appearing(out, replaces=REST, last=MAIN) as directory:
        for name in ("report", "numbers", "table"):
            (directory / name).write_text(text)
        (directory / "pictures").mkdir()
        (directory / "pictures" / text).write_text(text)


def texts(out):
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in out.rglob("*")
        if path.is_file() and names_in(out) and path.relative_to(out).parts[0] in names_in(out)
    }


def expected(text):
    return {"report": text, "numbers": text, "table": text, f"pictures/{text}": text}


def die_at(monkeypatch, call):
    """Die before the call-th change of a name."""
    left = [call]

    def dying(function):
        def wrapped(*given, **named):
            if Path(given[0]).name != LOCK:  # the kernel frees that of a killed process
                left[0] -= 1
                if left[0] <= 0:
                    raise Kill
            return function(*given, **named)

        return wrapped

    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    return left


@pytest.mark.parametrize("inside", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_ones_the_new_ones_or_visibly_none(tmp_path, inside):
    for call in range(1, 40):
        out = tmp_path / str(call) / "out"
        out.parent.mkdir()
        write(out, "old")
        (out / "notes").write_text("mine")
        with pytest.MonkeyPatch.context() as patched:
            if inside:
                patched.setattr("alpacache.durable._work_place", lambda out: out / ".writing")
            left = die_at(patched, call)
            with suppress(Kill):
                write(out, "new")
        found = texts(out)
        assert found.pop("notes") == "mine"
        assert not ({"old", "new"} <= set(found.values()))
        if found not in (expected("old"), expected("new")):
            assert "numbers" not in found
        write(out, "next")
        assert texts(out) == expected("next") | {"notes": "mine"}
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        if left[0] > 0:
            break
    assert 8 < call < 39


def test_a_new_directory_appears_in_one_rename(tmp_path):
    with appearing(tmp_path / "a/out") as directory:
        (directory / "file").write_text("")
        assert not (tmp_path / "a/out").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("parent_refuses", [False, True])
def test_an_empty_directory_that_cannot_be_replaced_is_filled_and_stays_what_it_is(
    tmp_path, monkeypatch, parent_refuses
):
    """A mount point, or a directory in one of another user's."""
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    number = out.stat().st_ino
    rename, mkdir = Path.rename, Path.mkdir

    def refuse_rename(path, target):
        if (out in Path(target).parents and out not in path.parents) or Path(target) == out:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    def refuse_mkdir(path, *given, **named):
        if path.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return mkdir(path, *given, **named)

    monkeypatch.setattr(Path, "rename", refuse_rename)
    if parent_refuses:
        monkeypatch.setattr(Path, "mkdir", refuse_mkdir)
    write(out, "new")
    assert texts(out) == expected("new")
    assert out.stat().st_ino == number
    assert sorted(path.name for path in out.iterdir()) == ["lost+found", "numbers", "pictures", "report", "table"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError), appearing(tmp_path / "out", last=MAIN) as directory:
        shutil.copy(tmp_path / "absent", directory / "report")
    assert texts(tmp_path / "out") == expected("old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_before_anything_was_there_is_told_as_it_is(tmp_path):
    with pytest.raises(OSError, match="No space left"), appearing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_one_process_at_a_time(tmp_path):
    with appearing(tmp_path / "out") as directory:
        (directory / "file").write_text("first")
        with pytest.raises(UsageError, match=r"is being written by .*choose another --out"):
            write(tmp_path / "out", "second")
    assert texts(tmp_path / "out") == {"file": "first"}


def test_files_have_the_modes_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", "new")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out", *(tmp_path / "out").iterdir())}
    assert modes == {**dict.fromkeys(("out", "pictures"), "0o750"), **dict.fromkeys((*MAIN, "table"), "0o640")}


def test_a_place_for_results_is_a_directory_on_a_disk_outside_of_stores(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/zarr.json").write_text('{"attributes":{"cache_store":{}}}')
    for out, message in (
        ("file", "is a file"),
        ("file/new", "cannot be made: .*file is a file"),
        ("store", "is a store"),
        ("store/new", "is a store"),
    ):
        with pytest.raises(UsageError, match=message):
            check_out(tmp_path / out)
    for address in ("s3://bucket/out", "https://user:word@host/out", "gs://user:word@host/out", "git+ssh://u:word@h/x"):
        with pytest.raises(UsageError, match="is no path") as refused:
            check_out(Path(address))
        assert "word" not in str(refused.value)
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "ring").symlink_to("ring")
    for link in ("gone", "gone/run", "ring"):
        with pytest.raises(
            UsageError, match=f"{link.split('/')[0]} is a symbolic link to (nowhere|ring), which is not there"
        ):
            check_out(tmp_path / link)
    for name in ("x" * 300, "x" * 250):  # the second has room for itself, but not for the name that it is written under
        with pytest.raises(UsageError, match="name is too long"):
            check_out(tmp_path / name)
    with pytest.raises(UsageError, match="root of all files"):
        check_out(Path("/"))
    with pytest.raises(UsageError, match="one slash"):
        check_store_place("s3:/bucket/store")
    check_store_place("s3://bucket/store")
    check_out(tmp_path / "new")
    take_back(tmp_path / "new")


def test_what_systems_leave_in_a_directory_does_not_count(tmp_path):
    for name in ("lost+found", ".nfs0000a1", ".Trash-1000", ".DS_Store", "System Volume Information", "lock"):
        (tmp_path / name).mkdir()
    assert names_in(tmp_path) == []
    for name in (".Trash-mine", "DS_Store", ".nfs", "x.lost+found"):
        (tmp_path / name).mkdir()
    assert names_in(tmp_path) == [".Trash-mine", ".nfs", "DS_Store", "x.lost+found"]


def test_an_empty_directory_keeps_its_mode_and_whoever_works_in_it(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o2770)
    monkeypatch.chdir(out)
    write(Path(), "new")
    assert {path.name for path in Path().iterdir()} == {*MAIN, *REST}
    assert out.stat().st_mode & 0o7777 == 0o2770


def test_a_store_begins_outside_of_stores_and_runs(tmp_path):
    for folder, file in (("store", "zarr.json"), ("store/old", "zarr.json"), ("run", "run.json")):
        (tmp_path / folder).mkdir()
        content = b'{"last": 2}' if file == "run.json" else b'{"attributes":{"cache_store":{}}}'
        (tmp_path / folder / file).write_bytes(seal_bytes(content))
    for store, kind in (("store/sub", "store"), ("run/sub/one", "run")):
        with pytest.raises(UsageError, match=rf"--store .*{store}: .* is a {kind}; choose a directory outside of it"):
            check_store_place(str(tmp_path / store))
    for store in ("store", "store/old", "new"):  # those that are there go on
        check_store_place(str(tmp_path / store))
    check_store_place("s3://bucket/store")


def note(work, moves):
    work.mkdir(exist_ok=True)
    (work / "moving.json").write_bytes(seal_bytes(json.dumps({"moves": moves}).encode()))


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("name", ["../victim", "ABSOLUTE", "notes", "..", "", 7])
def test_a_note_removes_no_other_names_than_the_commands_own(tmp_path, beside, name):
    """Whoever wrote it, and whether or not its checksum is right."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    write(out, "old")
    (out / "notes").write_text("mine")
    victim.mkdir()
    work = tmp_path / ".out.writing" if beside else out / ".writing"
    note(work, [str(victim) if name == "ABSOLUTE" else name])
    before = texts(out)
    for attempt in (lambda: take_back(out, (*MAIN, *REST)), lambda: write_there(work, out)):
        with pytest.raises(UsageError, match=r"moving\.json is damaged, or not of this command .* move .* away"):
            attempt()
    assert victim.is_dir()
    assert texts(out) == before


def write_there(work, out):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("alpacache.durable._work_place", lambda out: work)
        with appearing(out, replaces=REST, last=MAIN, names=(*MAIN, *REST)):
            pass


@pytest.mark.parametrize("text", ["", '["report"]', '{"moves": ["report"]}', "[" * 100_000])
def test_a_note_that_carries_no_checksum_ends_the_command_and_removes_nothing(tmp_path, text):
    write(tmp_path / "out", "old")
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing/moving.json").write_text(text)
    with pytest.raises(UsageError, match=r"Nothing was removed; move .*\.out\.writing away and run the same command"):
        take_back(tmp_path / "out")
    assert texts(tmp_path / "out") == expected("old")


def test_a_note_of_ours_is_taken_back(tmp_path):
    write(tmp_path / "out", "old")
    note(tmp_path / ".out.writing", ["report", "pictures"])
    take_back(tmp_path / "out", (*MAIN, *REST))
    assert texts(tmp_path / "out") == {"numbers": "old", "table": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("linked", [False, True])
def test_what_another_program_put_beside_stays(tmp_path, linked):
    theirs = tmp_path / ("elsewhere" if linked else ".out.writing")
    (theirs / "content").mkdir(parents=True)
    (theirs / "content/file").write_text("theirs")
    if linked:
        (tmp_path / ".out.writing").symlink_to(theirs)
    for attempt in (lambda: take_back(tmp_path / "out"), lambda: write(tmp_path / "out", "new")):
        with pytest.raises(UsageError, match="Nothing was removed"):
            attempt()
    assert (theirs / "content/file").read_text() == "theirs"
    assert not (tmp_path / "out").exists()


def check_numbers(out):
    check_results_out(out, what="table", names=("table", "numbers"), main="numbers", keys={"mean"})


def test_results_take_the_place_of_results_of_their_kind_alone(tmp_path):
    (tmp_path / "table").write_text("mine")
    with pytest.raises(UsageError, match="holds table, but no whole table; nothing is written over"):
        check_numbers(tmp_path)
    (tmp_path / "numbers").write_text('{"mean": 1}')
    check_numbers(tmp_path)
    (tmp_path / "numbers").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="holds table, numbers, but no whole table"):
        check_numbers(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be made: .*numbers is a file"):
        check_numbers(tmp_path / "numbers/out")


def test_results_are_kept_out_of_runs_and_models(tmp_path):
    run, old_run, model = tmp_path / "run", tmp_path / "old", tmp_path / "model"
    for folder in (run, old_run / "checkpoints/step-0000002", model):
        folder.mkdir(parents=True)
    (run / "run.json").write_bytes(seal_bytes(b'{"last": 2}'))
    (old_run / "checkpoints/step-0000002/state.json").write_text("{}")
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("")
    for out, kind in ((run, "run"), (old_run, "run"), (model, "model")):
        with pytest.raises(UsageError, match=f"is a {kind}; choose another directory"):
            check_numbers(out)
    for out in (run, old_run):
        check_out(out)  # a training resumes its own
        with pytest.raises(UsageError, match=r"--out .*sub/one: .* is a run; choose a directory outside of it"):
            check_out(out / "sub/one")


def test_a_full_disk_is_told_with_the_directory_that_was_written_to(tmp_path):
    with pytest.raises(OSError, match="No space left on device") as full, appearing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "out"))
    told = StoreFullError("the disk is full; make room", 5)
    with pytest.raises(StoreFullError) as full, naming(tmp_path):
        raise told
    assert full.value is told
    with pytest.raises(OSError, match="other") as other, naming(tmp_path):
        raise OSError(errno.EIO, "other")
    assert other.value.filename is None
