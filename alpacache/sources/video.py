"""Reads chosen frames out of JPEG files or an MP4 that may come from a stranger.

A frame's size is checked before its pixels are allocated, and a picture goes to the decoder of its own format alone:
neither a decompression bomb nor a file of another kind under a .jpg name gets anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError

MAX_PIXELS = 50_000_000
"""Pixels of one frame; 8K video has 33 million."""


def read_image(file: Path | BinaryIO, kind: Literal["JPEG", "PNG"], *, where: str) -> NDArray[np.uint8]:
    """`[H, W, 3]` RGB. Raises `BadClipError`: `undecodable_video`, `wrong_shape`."""
    from PIL import Image

    try:
        with Image.open(file, formats=(kind,)) as image:
            check_size(*image.size, where=where)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadClipError("undecodable_video", f"{where}: no readable {kind} image ({error}).") from error


def read_mp4(file: Path, indices: Sequence[int], *, count: int, where: str) -> NDArray[np.uint8]:
    """The frames with these numbers, in the order of presentation, of a video that must hold `count` frames.

    `[len(indices), 3, H, W]` RGB. Raises `BadClipError`: `undecodable_video`, `wrong_shape`.
    """
    import av

    # A dashcam's names are in any encoding. From 19 on PyAV has no such argument.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        with av.open(str(file), **lenient) as container:
            if not container.streams.video:
                raise BadClipError("undecodable_video", f"{where}: {file.name} holds no video stream.")
            stream = container.streams.video[0]
            check_stream(stream, where=f"{where}: {file.name}")
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            times, keys = sorted(one.pts for one in packets), [one.pts for one in packets if one.is_keyframe]
            if len(times) != count:
                kind = "undecodable_video" if len(times) < count else "wrong_shape"
                remedy = "; the video is truncated. Copy it again" if len(times) < count else ""
                text = f"{where}: {file.name} holds {len(times)} frames, its timestamps name {count}{remedy}."
                raise BadClipError(kind, text)
            frames = _decode(container, stream, sorted({times[index] for index in indices}), keys)
    except BadClipError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        text = f"{where}: {file.name} cannot be decoded ({error}); it may be truncated. Copy it again."
        raise BadClipError("undecodable_video", text) from error
    missing = [index for index in indices if times[index] not in frames]
    if missing:
        raise BadClipError("undecodable_video", f"{where}: frame {missing[0]} of {file.name} is damaged.")
    return stack([frames[times[index]] for index in indices], where=where)


class WantedFrames:
    """A container of PyAV whose `decode` skips frames that are neither wanted nor needed to decode others.

    One or two dozen frames lie between a key frame and those of a sample; half of them can be skipped in a video with
    B-frames. Only H.264 and H.265 are skipped through: other decoders would leave out wanted frames too.
    """

    def __init__(self, container: Any, stream: Any, is_wanted: Callable[[int], bool]) -> None:
        """`is_wanted` takes a frame's presentation time."""
        self._container, self._stream, self._is_wanted = container, stream, is_wanted

    def decode(self, **only_this_stream: int) -> Iterator[Any]:
        """Frames from the container's position on, in the order of presentation."""
        codec = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            if codec.name in ("h264", "hevc"):
                wanted = packet.pts is None or self._is_wanted(packet.pts)
                codec.skip_frame = "DEFAULT" if wanted else "NONREF"
            yield from packet.decode()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)


def stack(frames: Sequence[NDArray[np.uint8]], *, where: str) -> NDArray[np.uint8]:
    """`[H, W, 3]` frames of one size as `[frames, 3, H, W]`, a view of an array with its colours last.

    Raises `BadClipError` (`wrong_shape`) for different sizes.
    """
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        shown = ", ".join(map(str, sizes))
        raise BadClipError("wrong_shape", f"{where}: frames of different sizes (height, width): {shown}; expected one.")
    return np.stack(frames).transpose(0, 3, 1, 2)


def check_stream(stream: Any, *, where: str) -> None:
    """Refuse video that this FFmpeg has no decoder for, and frames larger than any camera's."""
    codec = stream.codec_context
    if codec is None:
        reason = "its codec is unknown to FFmpeg; encode it again as H.264, or copy it again if it is damaged."
        raise BadClipError("undecodable_video", f"{where}: {reason}")
    check_size(codec.width, codec.height, where=where)


def check_size(width: int, height: int, *, where: str) -> None:
    """Refuse frames larger than any camera's."""
    if width * height > MAX_PIXELS:
        raise BadClipError("wrong_shape", f"{where}: frames of {width} x {height} pixels; at most {MAX_PIXELS:,}.")


def _decode(container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """Frames by presentation time; seeks once, as the wanted frames of a sample lie close together.

    Seeks to the last key frame shown before them: frames that are shown before a key frame may follow it in the file,
    and are decoded from the key frame before it.
    """
    frames: dict[int, NDArray[np.uint8]] = {}
    first = max((time for time in keys if time <= wanted[0]), default=wanted[0])
    container.seek(first, backward=True, stream=stream)
    for frame in WantedFrames(container, stream, frozenset(wanted).__contains__).decode():
        if frame.pts in wanted and not frame.is_corrupt:
            check_size(frame.width, frame.height, where="video")
            frames[frame.pts] = frame.to_ndarray(format="rgb24")
        if frame.pts is not None and frame.pts >= wanted[-1]:
            break
    return frames
