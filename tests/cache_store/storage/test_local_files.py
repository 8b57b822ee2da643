"""Files that hold just what was given, around the page cache or through it."""

import errno
import fcntl
import os

import numpy as np
import pytest

from cache_store.storage import local_files

LARGE = [2**20 - 1, 2**20, 2**20 + 1, 2**21 - 3, 2**21, 2**21 + 4097, 2**22 + 5]
"""Bytes, about the limit of ordinary writes and the size of a block."""


@pytest.mark.parametrize("size", LARGE)
def test_large_files_hold_just_what_was_given(tmp_path, size) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    local_files.write_new((tmp_path / "file", [data[:1000], b"", data[1000:], b"end"]))
    assert (tmp_path / "file").read_bytes() == data.tobytes() + b"end"


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there are no writes around the page cache here")
@pytest.mark.parametrize("when", ["at once", "at the first block", "in the middle of a block", "never"])
def test_a_file_system_that_wants_the_page_cache_gets_it(tmp_path, monkeypatch, when) -> None:
    data = np.random.default_rng(0).integers(0, 256, 2**23 + 5, np.uint8)
    set_flags, write = fcntl.fcntl, os.write
    writes: list[bool] = []

    def refuse_flags(descriptor, operation, *args):
        if when == "at once" and operation == fcntl.F_SETFL and args[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return set_flags(descriptor, operation, *args)

    def refuse_write(descriptor, block):
        writes.append(is_direct(descriptor))
        if writes[-1] and when == "at the first block":
            raise OSError(errno.EINVAL, "Invalid argument")
        if len(writes) == 2 and when == "in the middle of a block":  # cut short: the third is not aligned any more
            flags = set_flags(descriptor, fcntl.F_GETFL)
            set_flags(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            count = write(descriptor, block[:100])
            set_flags(descriptor, fcntl.F_SETFL, flags)
            return count
        return write(descriptor, block)

    monkeypatch.setattr(fcntl, "fcntl", refuse_flags)
    monkeypatch.setattr(os, "write", refuse_write)
    local_files.write_new((tmp_path / "file", [data]))
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    if when != "never":
        assert not writes[-1]


def test_a_disk_that_fills_up_within_a_large_file_is_full_not_misaligned(tmp_path, monkeypatch) -> None:
    write = os.write

    def fill_up(descriptor, block):
        if len(block) < 2**20:  # the file's last
            raise OSError(errno.EINVAL if is_direct(descriptor) else errno.ENOSPC, "as the kernel says it")
        return write(descriptor, block)

    monkeypatch.setattr(os, "write", fill_up)
    with pytest.raises(OSError, match="as the kernel says it") as caught:
        local_files.write_new((tmp_path / "file", [bytes(2**20 + 1)]))
    assert caught.value.errno == errno.ENOSPC
