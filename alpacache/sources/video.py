"""Chosen frames out of a folder of JPEGs or an MP4, as untrusted input.

A frame's size is checked before its pixels are allocated, and only the JPEG decoder is offered to image files, so
neither a decompression bomb nor a file of another kind under a .jpg name gets anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
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
        with av.open(str(file), metadata_errors="replace") as container:  # a dashcam's names are in any encoding
            if not container.streams.video:
                raise BadClipError("undecodable_video", f"{where}: {file.name} holds no video stream.")
            stream = container.streams.video[0]
            check_stream(stream, where=f"{where}: {file.name}")
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            times, keys = sorted(one.pts for one in packets), [one.pts for one in packets if one.is_keyframe]
            _check_count(len(times), count, where=f"{where}: {file.name}")
            found = _decode(container, stream, sorted({times[index] for index in indices}), keys)
    except BadClipError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadClipError(
            "undecodable_video",
            f"{where}: {file.name} cannot be decoded ({error}); it may be truncated. Copy it again.",
        ) from error
    missing = [index for index in indices if times[index] not in found]
    if missing:
        raise BadClipError("undecodable_video", f"{where}: frame {missing[0]} of {file.name} is damaged.")
    return stack([found[times[index]] for index in indices], where=where)


class WantedFrames:
    """A container of PyAV whose `decode` leaves out frames that are neither wanted nor needed to decode others.

    Between a key frame and the frames of a sample lie a dozen or two, half of them such frames where a video has any.
    Of other codecs than H.264 and H.265 every frame is decoded: their decoders leave out wanted ones too.
    """

    def __init__(self, container: Any, stream: Any, is_wanted: Callable[[int], bool]) -> None:
        """`is_wanted` is asked with times of presentation."""
        self._container, self._stream, self._is_wanted = container, stream, is_wanted

    def decode(self, **only_this_stream: int) -> Iterator[Any]:
        """Frames from where the container is, in the order of presentation."""
        codec = self._stream.codec_context
        skips = codec.name in ("h264", "hevc")
        for packet in self._container.demux(self._stream):
            if skips:
                wanted = packet.pts is None or self._is_wanted(packet.pts)
                codec.skip_frame = "DEFAULT" if wanted else "NONREF"
            yield from packet.decode()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)


def stack(frames: Sequence[NDArray[np.uint8]], *, where: str) -> NDArray[np.uint8]:
    """`[H, W, 3]` frames of one size as `[frames, 3, H, W]`, which lie as decoded, colours last."""
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        raise BadClipError(
            "wrong_shape",
            f"{where}: frames of different sizes (height, width): {', '.join(map(str, sizes))}; one size a sample.",
        )
    return np.stack(frames).transpose(0, 3, 1, 2)


def check_stream(stream: Any, *, where: str) -> None:
    """Refuse video that this FFmpeg has no decoder for, and frames nobody's camera makes."""
    codec = stream.codec_context
    if codec is None:
        raise BadClipError(
            "undecodable_video",
            f"{where}: its codec is unknown to FFmpeg; encode it again as H.264, or copy it again if it is damaged.",
        )
    check_size(codec.width, codec.height, where=where)


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


def _decode(
    container: Any, stream: Any, wanted: Sequence[int], key_frames: Sequence[int]
) -> dict[int, NDArray[np.uint8]]:
    """Frames by presentation time; seeks once, as the wanted frames of a sample lie close together.

    To the last key frame that is shown before them: frames shown before a key frame may follow it in the file, and need
    those of the key frame before.
    """
    found: dict[int, NDArray[np.uint8]] = {}
    first = max((time for time in key_frames if time <= wanted[0]), default=wanted[0])
    container.seek(first, backward=True, stream=stream)
    for frame in WantedFrames(container, stream, frozenset(wanted).__contains__).decode():
        if frame.pts in wanted and not frame.is_corrupt:
            check_size(frame.width, frame.height, where="video")
            found[frame.pts] = frame.to_ndarray(format="rgb24")
        if frame.pts is not None and frame.pts >= wanted[-1]:
            break
    return found
