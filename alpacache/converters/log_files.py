"""Files that a log consists of or names: regular ones, of bounded size, and never outside the log's own folder."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.drive import Dropped, Pictures
from alpacache.errors import BadClipError, UsageError
from alpacache.regular_file import lfs_pointer, read_regular
from alpacache.sources.folder import MAX_PICTURE_BYTES

MAX_TEXT_BYTES = 2**28
MOST_CHUNK_BYTES = 2**30
"""Largest record of a log, and largest chunk once it is decompressed, that is read."""


_LONGEST_NAME = 255
"""Longest name of a file (bytes) that disks take."""
MOST_SECONDS = 9e12
"""Largest time that is read: microseconds beyond it would leave 64 bits."""


class UnusableError(BadClipError):
    """A drive cannot be used; the message says why, and is the reason in the report."""

    def __init__(self, message: str, *, kind: str = "wrong_shape") -> None:
        super().__init__(kind, message)


def read_text(file: Path, *, limit_bytes: int = MAX_TEXT_BYTES, is_mixed: bool = False) -> str:
    """A log's text; `is_mixed`: with other bytes between its lines. Raises `UnusableError` for what is no file, too
    large or no UTF-8.
    """
    try:
        content = read_regular(file, limit_bytes=limit_bytes)
    except OSError as error:
        problem = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise UnusableError(f"{file} cannot be read: {problem}") from error
    if pointer := lfs_pointer(content):
        raise UnusableError(f"{file} cannot be read: {pointer}")
    try:
        return content.decode("utf-8-sig", errors="replace" if is_mixed else "strict")
    except UnicodeDecodeError as error:
        raise UnusableError(f"{file} is no UTF-8 text (byte {error.start})") from error


def is_file(file: Path) -> bool:
    """Tell whether a file is there; of a name that no disk takes, where pathlib raises an error, it is not."""
    return os.path.isfile(file)  # noqa: PTH113


def as_microseconds(seconds: NDArray[np.float64], *, where: str) -> NDArray[np.int64]:
    """Times in seconds as whole microseconds. Raises `UnusableError` for one that is not finite, or leaves 64 bits."""
    if not (sound := np.abs(seconds) < MOST_SECONDS).all():
        first = int(np.argmin(sound))
        raise UnusableError(f"{where}: time {first} is {seconds[first]:g}, which no clock says", kind="not_finite")
    return np.rint(seconds * 1e6).astype(np.int64)


def inside(root: Path, name: str, *, links: bool = False) -> Path:
    """The file that a log names, relative to `root`. Raises `UnusableError` if that leads out of it.

    `links`: those in `root` may lead elsewhere, as in the hub's cache.
    """
    parts = PurePosixPath(name)
    file = root / parts
    too_long = any(len(part.encode()) > _LONGEST_NAME for part in parts.parts)
    if not name or not name.isprintable() or too_long or parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise UnusableError(f"the log names the file {name[:80]!r}, which is not within {root}")
    if not links and not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        raise UnusableError(f"{file} links out of {root}; copy the data in instead")
    return file


def pictures_of(files: Sequence[Path], times_us: NDArray[np.int64]) -> Pictures:
    """Frames that lie in files of their own, JPEG or PNG."""

    def read(begin: int, end: int) -> Iterator[bytes]:
        for file in files[begin:end]:
            try:
                yield read_regular(file, limit_bytes=MAX_PICTURE_BYTES)
            except OSError as error:
                raise UnusableError(f"{file} cannot be read: {error}") from error

    return Pictures(times_us=times_us, read=read)


def poses_alone(what: str) -> Dropped:
    """Says that a log has no pictures; `what`: which are not there."""
    return Dropped(what="cameras", count=1, reason=f"{what}: the clip holds poses alone, no samples")


def folder_of(place: Path, *, reads: str) -> Path:
    """`place`, made absolute. Raises `UsageError` unless it is a folder."""
    if not place.is_dir():
        raise UsageError(f"{place} is no folder; expected {reads}.")
    return place.resolve()


def increasing_part(times_us: NDArray[np.int64]) -> NDArray[np.intp]:
    """Indices of a longest part of times that increases strictly: what steps back, or leaps ahead, is left out."""
    ends: list[int] = []
    at_end: list[int] = []
    before = [-1] * len(times_us)
    for place, value in enumerate(times_us.tolist()):
        length = bisect_left(ends, value)
        before[place] = at_end[length - 1] if length else -1
        ends[length : length + 1] = [value]
        at_end[length : length + 1] = [place]
    chain, place = [], at_end[-1] if at_end else -1
    while place >= 0:
        chain.append(place)
        place = before[place]
    return np.array(chain[::-1], dtype=np.intp)
