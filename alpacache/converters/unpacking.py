"""Compressed parts of logs, unpacked within bounds: a few bytes may unfold to gigabytes, and libraries let them."""

import bz2
import io
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from alpacache.converters.log_files import MOST_CHUNK_BYTES
from alpacache.errors import SourceError

DAMAGED: tuple[type[Exception], ...] = (ValueError, EOFError, RuntimeError, MemoryError, OSError)
"""Errors that decompressors raise for bytes that are not theirs."""
_MOST_RATIO = 100
_SMALLEST_LIMIT_BYTES = 2**26
"""A file may unfold to so many times its size, and to this many bytes; recordings of real cameras reach about 3."""
_PART_BYTES = 2**20
_ZSTD_HEAD_BYTES = 18


def unpacked(data: bytes, compression: str, size: int | None = None) -> bytes:
    """The content of a chunk or message; `size`: how many bytes it says that it holds, if it says so.

    Raises `ValueError` for one that holds more or less, or more than `MOST_CHUNK_BYTES`, and for a compression other
    than zstd, lz4, bz2 and none; one of `DAMAGED` for other bytes.
    """
    if size is not None and size > MOST_CHUNK_BYTES:
        raise ValueError(f"it says that it holds {size:,} bytes")
    limit = MOST_CHUNK_BYTES if size is None else size
    if compression == "zstd":
        content = bytearray()
        for piece in _zstd_parts(io.BytesIO(data)):
            content += piece
            if len(content) > limit:
                break
        data = bytes(content[: limit + 1])
    elif compression == "lz4":
        from lz4.frame import LZ4FrameDecompressor

        data = LZ4FrameDecompressor().decompress(data, max_length=limit + 1)
    elif compression == "bz2":
        data = bz2.BZ2Decompressor().decompress(data, max_length=limit + 1)
    elif compression not in ("", "none"):
        raise ValueError(f"its compression {compression[:20]!r} is unknown")
    if size is None and len(data) > limit:
        raise ValueError(_beyond(limit))
    if size is not None and len(data) != size:
        raise ValueError(f"it holds {len(data):,} bytes or more, and says {size:,}")
    return data


class TemporaryFolder:
    """A folder that is there as long as this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="alpacache-bag-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def unpacked_files(files: Sequence[Path]) -> tuple[TemporaryFolder, list[Path]]:
    """Files of rosbag2 that are compressed as a whole (`a.db3.zstd`), unpacked into a temporary folder.

    Raises `SourceError` for a file that is none, that unfolds to more than a recording can, or to more than there is
    room for.
    """
    folder = TemporaryFolder()
    found = [folder.path / file.stem for file in files]
    for file, target in zip(files, found, strict=True):
        most = max(_SMALLEST_LIMIT_BYTES, _MOST_RATIO * file.stat().st_size)
        room = shutil.disk_usage(folder.path).free - _SMALLEST_LIMIT_BYTES
        count = 0
        try:
            with file.open("rb") as packed, target.open("wb") as out:
                for piece in _zstd_parts(packed):
                    count += len(piece)
                    if count > most:
                        raise SourceError(f"{file} cannot be read: {_beyond(most)}; it may be damaged.")
                    if count > room:
                        remedy = "set TMPDIR to a disk with more, or unpack it with `zstd -d`"
                        raise SourceError(f"{file} unfolds to more than the {room:,} bytes free for it; {remedy}.")
                    out.write(piece)
        except SourceError:
            raise
        except DAMAGED as error:
            raise SourceError(f"{file} cannot be unpacked ({error}); copy it again.") from error
    return folder, found


def _zstd_parts(source: BinaryIO) -> Iterator[bytes]:
    """The content of a file from its beginning on, piece by piece; raises `ValueError` for other bytes, or too few."""
    import zstandard

    try:
        left = zstandard.frame_content_size(source.read(_ZSTD_HEAD_BYTES))  # -1: it does not say
        source.seek(0)
        with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as stream:
            while piece := stream.read(_PART_BYTES):
                left -= len(piece)
                yield piece
    except zstandard.ZstdError as error:
        raise ValueError(f"it is no zstd ({error})") from error
    if left > 0:
        raise ValueError(f"it lacks {left:,} bytes of what it says that it holds")


def _beyond(limit: int) -> str:
    return f"it unfolds to more than {limit:,} bytes"
