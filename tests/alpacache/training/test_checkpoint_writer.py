"""Checkpoints are written beside training: what is on disk is the moment of the call, and no error is lost."""

import errno
import logging
import threading

import pytest
import torch
from safetensors.torch import load_file

from alpacache.errors import DataError
from alpacache.training import checkpoint_writer
from alpacache.training.checkpoint_writer import CheckpointWriter
from alpacache.training.run_directory import MODEL, RunCheckpoint, RunDirectory


class Gated(RunDirectory):
    """Writes when it is allowed to."""

    def __init__(self, path):
        super().__init__(path)
        self.gate, self.begun = threading.Event(), threading.Event()

    def save(self, step, content, **options):
        self.begun.set()
        assert self.gate.wait(30)
        return super().save(step, content, **options)


def content(weight):
    state = {"settings": {}, "best": None}
    return RunCheckpoint(model={"w": weight}, optimizer={"m.w": weight * 2}, average={"w": weight}, state=state)


def test_what_changes_after_the_call_is_not_written(tmp_path):
    directory, weight = Gated(tmp_path), torch.ones(3)
    with CheckpointWriter(directory) as writer:
        writer.save(1, content(weight), keep=2, best=1)
        assert directory.begun.wait(30)
        weight += 5
        assert directory.steps == []
        directory.gate.set()
        writer.wait()
        assert directory.steps == [1]
    assert load_file(tmp_path / "best" / MODEL)["w"].tolist() == [1, 1, 1]
    assert load_file(tmp_path / "last" / "average.safetensors")["w"].tolist() == [1, 1, 1]


def test_leaving_waits_for_the_last_write_and_the_next_for_the_one_before(tmp_path):
    directory = Gated(tmp_path)
    directory.gate.set()
    with CheckpointWriter(directory) as writer:
        for step in range(1, 6):
            writer.save(step, content(torch.full((2,), float(step))), keep=2, best=2)
    assert directory.steps == [2, 4, 5]
    assert load_file(tmp_path / "last" / MODEL)["w"].tolist() == [5, 5]
    assert load_file(tmp_path / "best" / MODEL)["w"].tolist() == [2, 2]


def full(*given):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_the_thread_is_raised_where_the_next_write_fails_too_and_at_the_end(tmp_path, monkeypatch, caplog):
    writer = CheckpointWriter(RunDirectory(tmp_path))
    writer.save(1, content(torch.ones(2)), keep=2)
    writer.wait()
    monkeypatch.setattr("alpacache.training.run_directory.save_file", full)
    writer.save(2, content(torch.ones(2)), keep=2)
    with pytest.raises(DataError, match=r"step 3 could not be written .* needs 24 bytes"):
        writer.save(3, content(torch.ones(2)), keep=2)
    assert "step 2 could not be written" in caplog.text
    writer.save(4, content(torch.ones(2)), keep=2)
    with pytest.raises(DataError, match="step 4"), writer:
        pass
    assert RunDirectory(tmp_path).steps == [1]


def test_after_a_failed_write_the_next_state_is_written_and_the_failure_told(tmp_path, monkeypatch, caplog):
    directory = RunDirectory(tmp_path)
    with CheckpointWriter(directory) as writer, monkeypatch.context() as patched:
        patched.setattr("alpacache.training.run_directory.save_file", full)
        writer.save(200, content(torch.ones(2)), keep=2, best=200)
        writer._pool.submit(int).result()  # the disk is freed once that has failed
        patched.undo()
        writer.save(390, content(torch.ones(2)), keep=2, best=200)
        assert directory.steps == [390]  # at once, not when it is waited for
        writer.save(400, content(torch.ones(2)), keep=2, best=200)
    assert directory.steps == [390, 400]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    told = record.getMessage()
    assert f"step 200 could not be written to {tmp_path / 'checkpoints'} ([Errno 28] No space left on device)" in told
    assert "step 390 is written in its place" in told


@pytest.mark.parametrize("room", [0, OSError("no such file")])
def test_without_room_for_a_copy_it_is_written_at_once(tmp_path, monkeypatch, room):
    def available():
        if isinstance(room, OSError):
            raise room
        return room

    monkeypatch.setattr(checkpoint_writer, "available_bytes", available)
    monkeypatch.setattr(RunCheckpoint, "on_host", lambda content: pytest.fail("copied"))
    with CheckpointWriter(RunDirectory(tmp_path)) as writer:
        writer.save(1, content(torch.ones(2)), keep=2)
        assert RunDirectory(tmp_path).steps == [1]
