"""Rows are there as a whole or not at all; what is lost or changed is told when a run goes on."""

import errno
import io
import json

import pytest

from alpacache.training.metrics_file import MetricsFile


@pytest.fixture
def file(tmp_path):
    """Six steps of a run."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        file.append({"step": step, "loss": step / 8})
    return file


def steps(file):
    return [json.loads(line)["step"] for line in file.path.read_text().splitlines()]


def seal_of(file, step):
    first = MetricsFile(file.path.with_name("first"))
    for row in file.rows(up_to=step):
        first.append(row)
    return first.seal


@pytest.mark.parametrize("sealed", [True, False])
def test_rows_after_the_checkpoint_and_half_a_line_go_and_later_ones_follow(file, sealed, caplog):
    seal = seal_of(file, 4)
    with file.path.open("a") as torn:
        torn.write('{"step": 7, "lo')
    file.rewind(4, seal if sealed else None)
    assert steps(file) == [1, 2, 3, 4]
    assert file.seal == seal
    file.append({"step": 5})
    assert steps(file) == [1, 2, 3, 4, 5]
    assert caplog.text == ""


def test_lost_rows_are_named_and_nothing_follows_half_a_line(file, caplog):
    seal, lines = seal_of(file, 6), file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(lines[0] + lines[2][:-9] + b"\n" + lines[3] + lines[4][:12])
    file.rewind(6, seal)
    assert steps(file) == [1, 4]
    assert "metrics.jsonl was cut or changed: it lacks the rows of steps 2 to 3, 5 to 6." in caplog.text
    file.path.unlink()
    MetricsFile(file.path).rewind(2, seal)
    assert "lacks the rows of steps 1 to 2." in caplog.text


def test_a_flipped_bit_in_a_number_is_told(file, caplog):
    seal = seal_of(file, 6)
    file.path.write_bytes(file.path.read_bytes().replace(b"0.25", b"0.35"))
    file.rewind(6, seal)
    assert steps(file) == [1, 2, 3, 4, 5, 6]
    assert "is not as it was at step 6 (its checksum differs)" in caplog.text


def test_a_run_that_begins_has_no_rows(file):
    file.rewind(0)
    assert file.path.read_bytes() == b""
    assert file.seal == {"bytes": 0, "crc32c": "00000000"}


def test_a_disk_that_takes_half_a_row_keeps_none_of_it(file, monkeypatch):
    before, taken = file.path.read_bytes(), []

    class Nearly(io.FileIO):
        def write(self, data):
            if taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken.append(super().write(data[:10]))
            return 10

    with monkeypatch.context() as patched:
        patched.setattr(type(file.path), "open", lambda path, mode, buffering: Nearly(path, "a"))
        with pytest.raises(OSError, match="No space left"):
            file.append({"step": 7})
    assert taken == [10]
    assert file.path.read_bytes() == before


def test_whoever_shows_rows_is_told_that_they_are_not_those_of_the_checkpoint(file, caplog):
    seal = seal_of(file, 4)
    assert [row["step"] for row in file.rows(up_to=4, seal=seal)] == [1, 2, 3, 4]
    assert caplog.text == ""
    file.path.write_bytes(file.path.read_bytes().replace(b"0.25", b"0.35"))
    assert file.rows(up_to=4, seal=seal)[1]["loss"] == 0.35
    assert "metrics.jsonl is not as it was at step 4 (its checksum differs)" in caplog.text


def test_a_line_that_nests_deeply_is_a_damaged_one(file):
    with file.path.open("a") as opened:
        opened.write(100_000 * "[" + "\n")
    assert [row["step"] for row in file.rows(up_to=6)] == [1, 2, 3, 4, 5, 6]
