import os
import re
import socket

import pytest

from alpacache.regular_file import read_regular, regular_size


def test_a_regular_file_and_a_link_to_it(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert regular_size(tmp_path / name) == regular_size(tmp_path / name, limit_bytes=5) == 5
        assert read_regular(tmp_path / name, limit_bytes=5) == b"12345"
        with pytest.raises(OSError, match="it has 5 bytes; at most 4 are read"):
            read_regular(tmp_path / name, limit_bytes=4)
    with pytest.raises(FileNotFoundError):
        regular_size(tmp_path / "nothing")


def test_what_is_no_file_is_named_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "folder").mkdir()
    kinds = {"fifo": "a FIFO", "link": "a FIFO", "folder": "a directory", "/dev/zero": "a device", "socket": "a socket"}
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(tmp_path / "socket"))  # its name has at most a hundred characters
        for name, kind in kinds.items():
            with pytest.raises(OSError, match=re.escape(f"it is {kind}; expected a regular file")):
                read_regular(tmp_path / name, limit_bytes=10)
