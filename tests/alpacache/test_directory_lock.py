"""One process at a time writes to a directory; what a dead one left does not count."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from alpacache import directory_lock
from alpacache.directory_lock import LOCK, DirectoryLock
from alpacache.errors import DataError, UsageError

HOLDER = """
import sys, time
from pathlib import Path
from alpacache.directory_lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1]), remedy=""):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(path, **how):
    return DirectoryLock(path, remedy="Wait.", **how)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def without_locks(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("has_locks", [True, False])
def test_another_process_is_refused_until_the_first_has_ended(tmp_path, holder, monkeypatch, has_locks):
    if not has_locks:
        without_locks(monkeypatch)
    with pytest.raises(UsageError, match=rf"run is being written by process {holder.pid} on .*\. Wait\."):
        lock(tmp_path / "run").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with lock(tmp_path / "run") as held:
        held.check()
    assert list((tmp_path / "run").iterdir()) == []


def test_who_is_taken_over_finds_out_and_leaves_the_others_lock(tmp_path):
    with lock(tmp_path) as first:
        first.check()
        with pytest.raises(UsageError, match="is being written by"):
            lock(tmp_path).__enter__()
        second = lock(tmp_path, take_over=True)
        second.__enter__()
        with pytest.raises(DataError, match="another one has taken over"):
            first.check()
    second.check()
    second.__exit__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("beats", [True, False])
def test_an_owner_on_another_machine_lives_as_long_as_its_lock_changes(tmp_path, monkeypatch, caplog, beats):
    monkeypatch.setattr(directory_lock, "_WATCH_S", 0.2)
    note = {"host": "far", "pid": 7, "started": "1", "place": "far"}
    (tmp_path / LOCK).write_text(json.dumps(note | {"beat": 1}))

    def sleep(seconds):
        if beats:
            (tmp_path / LOCK).write_text(json.dumps(note | {"beat": 2}))

    monkeypatch.setattr(directory_lock.time, "sleep", sleep)
    if beats:
        with pytest.raises(UsageError, match="process 7 on far"):
            lock(tmp_path).__enter__()
    else:
        with lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "was left by process 7 on far" in caplog.text


def test_the_owner_writes_its_lock_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(directory_lock, "_BEAT_S", 0.01)
    with lock(tmp_path) as held:
        while directory_lock._read(held._file).get("beat", 0) < 2:
            pass


def test_a_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    mine = {"host": "here", "pid": os.getpid(), "place": directory_lock._place()}
    (tmp_path / LOCK).write_text(json.dumps(mine | {"started": directory_lock._started(os.getpid())}))
    with pytest.raises(UsageError, match=f"process {os.getpid()} on here"):
        lock(tmp_path).__enter__()
    (tmp_path / LOCK).write_text(json.dumps(mine | {"started": "1"}))
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize(
    "text", ["my own", '{"host": "db", "port": 1}', "[" * 4096, '{"host": "a", "place": ' + " " * 4096]
)
def test_a_users_file_named_lock_is_refused_and_left(tmp_path, text, take_over):
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(UsageError, match=r"lock is not the lock that alpacache writes .* Move it away"):
        lock(tmp_path, take_over=take_over).__enter__()
    assert (tmp_path / LOCK).read_text() == text


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "fifo", "socket"])
def test_what_is_no_file_under_the_locks_name_is_refused_and_left(tmp_path, monkeypatch, kind, take_over):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    if kind in ("link", "dangling"):
        (run / LOCK).symlink_to(target)
        if kind == "link":
            target.write_text("")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"run/{LOCK}")
    else:
        {"directory": os.mkdir, "fifo": os.mkfifo}[kind](run / LOCK)
    with pytest.raises(UsageError, match="is not the lock that alpacache writes"):
        lock(run, take_over=take_over).__enter__()
    assert os.path.lexists(run / LOCK)
    assert target.exists() == (kind == "link")
    assert kind != "link" or target.read_text() == ""


@pytest.mark.parametrize("left", ["", "\0" * 100, '{"host": "a", "pid": 1, "started": "2", "place": "a b"', None])
def test_a_lock_that_a_crash_left_half_written_does_not_count(tmp_path, left):
    nested = '{"host": ' + "[" * 4000 + ', "place": '
    (tmp_path / LOCK).write_text(nested if left is None else left)
    with lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
