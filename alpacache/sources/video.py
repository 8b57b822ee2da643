"""Chosen frames out of a folder of JPEGs or an MP4, as untrusted input.

A frame's size is checked before its pixels are allocated, and only the JPEG decoder is offered to image files, so
neither a decompression bomb nor a file of another kind under a .jpg name gets anywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError

MAX_PIXELS = 50_000_000
"""Pixels of one frame; 8K video has 33 million."""


def read_jpegs(files: Sequence[Path], *, where: str) -> NDArray[np.uint8]:
    """`[len(files), 3, H, W]` RGB. Raises `BadClipError`: `undecodable_video`, `wrong_shape`."""
    return stack([_read_jpeg(file, where=f"{where}: {file.name}") for file in files], where=where)


def read_mp4(file: Path, indices: Sequence[int], *, count: int, where: str) -> NDArray[np.uint8]:
    """The frames number `indices`, counted in the order of presentation, of a video that must hold `count` frames.

    `[len(indices), 3, H, W]` RGB. Raises `BadClipError`: `undecodable_video`, `wrong_shape`.
    """
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise BadClipError("undecodable_video", f"{where}: {file.name} holds no video stream.")
            stream = container.streams.video[0]
            check_size(stream.codec_context.width, stream.codec_context.height, where=where)
            times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
            _check_count(len(times), count, where=f"{where}: {file.name}")
            found = _decode(container, stream, sorted({times[index] for index in indices}))
    except (av.error.FFmpegError, OSError) as error:
        raise BadClipError(
            "undecodable_video",
            f"{where}: {file.name} cannot be decoded ({error}); it may be truncated. Copy it again.",
        ) from error
    missing = [index for index in indices if times[index] not in found]
    if missing:
        raise BadClipError("undecodable_video", f"{where}: frame {missing[0]} of {file.name} is damaged.")
    return stack([found[times[index]] for index in indices], where=where)


def stack(frames: Sequence[NDArray[np.uint8]], *, where: str) -> NDArray[np.uint8]:
    """`[H, W, 3]` frames of one size as `[frames, 3, H, W]`, which lie as decoded, colours last."""
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        raise BadClipError(
            "wrong_shape",
            f"{where}: frames of different sizes (height, width): {', '.join(map(str, sizes))}; one size a sample.",
        )
    return np.stack(frames).transpose(0, 3, 1, 2)


def check_size(width: int, height: int, *, where: str) -> None:
    """Refuse frames nobody's camera makes."""
    if width * height > MAX_PIXELS:
        raise BadClipError(
            "wrong_shape", f"{where}: frames of {width} x {height} pixels; more than {MAX_PIXELS:,} is refused."
        )


def _check_count(found: int, expected: int, *, where: str) -> None:
    if found < expected:
        raise BadClipError(
            "undecodable_video",
            f"{where} holds {found} frames, its timestamps name {expected}; the video is truncated. Copy it again.",
        )
    if found > expected:
        raise BadClipError("wrong_shape", f"{where} holds {found} frames, its timestamps name {expected}.")


def _read_jpeg(file: Path, *, where: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(file, formats=("JPEG",)) as image:
            check_size(*image.size, where=where)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadClipError("undecodable_video", f"{where}: no readable JPEG image ({error}).") from error


def _decode(container: Any, stream: Any, wanted: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """Frames by presentation time; seeks once, as the wanted frames of a sample lie close together."""
    found: dict[int, NDArray[np.uint8]] = {}
    container.seek(wanted[0], backward=True, stream=stream)
    for frame in container.decode(stream):
        if frame.pts in wanted and not frame.is_corrupt:
            check_size(frame.width, frame.height, where="video")
            found[frame.pts] = frame.to_ndarray(format="rgb24")
        if frame.pts is not None and frame.pts >= wanted[-1]:
            break
    return found
