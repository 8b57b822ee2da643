"""Files that others wrote, opened only if they are regular files of a bounded size.

Under a file's name may lie a FIFO, which blocks whoever opens it for ever, or a device that never ends.
"""

import stat
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
"""Beginning of the small text that git leaves in the place of a large file that was not fetched."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def regular_size(file: Path, *, limit_bytes: int | None = None) -> int:
    """Bytes of a regular file, or of the one that a link leads to.

    Raises `OSError` (in words, without the path) if it is anything else or larger than `limit_bytes`;
    `FileNotFoundError` if nothing is there.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}; expected a regular file")
    if limit_bytes is not None and status.st_size > limit_bytes:
        raise OSError(f"it has {status.st_size:,} bytes; at most {limit_bytes:,} are read")
    return status.st_size


def read_regular(file: Path, *, limit_bytes: int) -> bytes:
    """Content of a regular file of at most `limit_bytes`. Raises `OSError` as `regular_size` does."""
    regular_size(file, limit_bytes=limit_bytes)
    with file.open("rb") as opened:
        return opened.read(limit_bytes)


def lfs_pointer(content: bytes | Path | object) -> str:
    """Says that a file, or the bytes of one, is what git-lfs leaves for it, and what to do; empty if it is not.

    Takes anything, since it is asked about what could not be read.
    """
    try:
        if isinstance(content, Path) and regular_size(content):
            with content.open("rb") as opened:
                content = opened.read(len(LFS_POINTER))
    except OSError:
        return ""
    if not isinstance(content, bytes) or not content.startswith(LFS_POINTER):
        return ""
    return "it is a git-lfs pointer in place of the file; run `git lfs pull` in its repository"
