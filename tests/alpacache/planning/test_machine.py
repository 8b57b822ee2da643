"""Measuring leaves nothing behind and says when it cannot."""

import pytest

from alpacache.planning import machine
from alpacache.planning.machine import disk_speed, existing_folder


def test_rates_of_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROBE_BYTES", 2**22)
    found = disk_speed(tmp_path / "no" / "store" / "yet")
    assert found.probe_bytes == 2**22
    assert found.write_bytes_s > 0
    assert found.read_bytes_s > 0
    assert list(tmp_path.iterdir()) == []


def test_little_room_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10**6)
    with pytest.raises(OSError, match="No space left"):
        disk_speed(tmp_path)


def test_what_cannot_be_written_is_an_error():
    with pytest.raises(OSError):
        disk_speed("/proc")


def test_the_nearest_folder_that_is_there(tmp_path):
    (tmp_path / "file").touch()
    assert existing_folder(tmp_path / "file" / "store") == tmp_path
