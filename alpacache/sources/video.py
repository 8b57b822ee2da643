"""Reads chosen frames of a film that may come from a stranger.

Frames of a film are numbered as they are shown, which is what any player counts: what an edit list hides is none of
them, and neither a constant rate nor a start at zero is assumed. Reading begins at the last key frame before the wanted
ones; if the decoder reports anything there, at the film's start, in case the key frame was none. What it still reports
is damage, be it in a wanted frame or in one that it is predicted from.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError
from alpacache.regular_file import lfs_pointer
from alpacache.sources.image import check_size, stack

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
"""FFmpeg's containers that say when each frame is shown. None of them can name another file, as a playlist does."""
CONTAINERS = {
    rb"#EXTM3U|ffconcat|<\?xml": "a playlist",
    rb"RIFF....AVI ": "AVI",
    rb"(?:....)?G.{187}(?:....)?G": "MPEG-TS",
    rb"\x00\x00\x01\xba": "MPEG-PS",
    rb"\x00?\x00\x00\x01": "a raw stream without container",
    rb"FLV": "FLV",
    rb"OggS": "Ogg",
    rb"\x30\x26\xb2\x75": "ASF",
    rb"\x06\x0e\x2b\x34": "MXF",
    rb"GIF8": "GIF",
}
"""Beginning of a file (a pattern) -> a container that is not read."""
LOST_STEPS = 0.75
"""Frame intervals by which the clock of a film may move against its timestamps, between the means of neighbours."""
NEIGHBOURS = 5
"""Frames on either side whose means are compared; there are fewer at the ends of a film."""
SAME_SPEED = 0.03
"""Share from which on a film that differs in speed from its timestamps has a speed of its own, as slow motion has."""
EDGE_JITTERS = 4.0
"""Move that is still jitter at the ends of a film, as a multiple of the median disagreement of a step."""
_CONCEALING = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")
"""Decoders that do not mark concealed damage if they decode a frame in several threads."""
_SKIPPING = ("h264", "hevc")
"""Decoders that can leave out frames which no other is predicted from; the rest would leave out wanted ones too."""


def read_film(
    film: Path | BinaryIO,
    indices: Sequence[int],
    stamps_us: NDArray[np.int64],
    *,
    name: str,
    where: str,
    about_px: int | None = None,
) -> NDArray[np.uint8]:
    """The frames with these numbers, in the order of presentation, upright as the film's display matrix says.

    `stamps_us` are the times (us) of all frames by their own table, `name` is what messages call the film. Frames of
    which `about_px` pixels across are enough come at half, a third or another whole part of their size.
    `[len(indices), 3, H, W]` RGB. Raises `BadClipError`: `undecodable_video`, `wrong_shape`.
    """
    where = f"{where}: {name}"
    with _opened(film, where=where) as container:
        stream = _stream(container, where=where)
        shown = _frames_of(container, stream, where=where)
        _check_times(shown, stream.time_base, stamps_us, where=where)
        wanted = [shown.times[index] for index in indices]
        frames = _decode(container, stream, shown, wanted, where=where, about_px=about_px)
    if frames is None:
        with _opened(film, where=where) as container:
            stream = _stream(container, where=where)
            frames = _decode(container, stream, shown, wanted, where=where, about_px=about_px, from_start=True)
    if frames is None:
        reason = f"frame {min(indices)} or one that it is predicted from is damaged"
        raise BadClipError("undecodable_video", f"{where}: {reason}. Copy the film again, or leave this part out.")
    return stack([frames[time] for time in wanted], where=where)


def ffmpeg_versions() -> dict[str, str]:
    """Versions of FFmpeg's parts that decode films and convert their colours."""
    import av

    return {name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libavformat", "libswscale")}


class _Shown(NamedTuple):
    """Frames of a film by its packets, in the film's own units of time."""

    times: list[int]
    """When each frame is shown, increasing."""
    keys: list[int]
    """Times of all frames that are marked as key frames."""
    hidden: frozenset[int]
    """Times of frames that an edit list hides; they are decoded, since others may be predicted from them."""
    order: dict[int, int]
    """Time of a frame -> its place in the file, which is the order of decoding."""


@contextmanager
def _opened(film: Path | BinaryIO, *, where: str) -> Iterator[Any]:
    """The film's container; what FFmpeg raises is a `BadClipError`."""
    import av

    # A dashcam's names are in any encoding. From 19 on PyAV has no such argument.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    if not isinstance(film, Path):
        film.seek(0)
    try:
        opened = str(film) if isinstance(film, Path) else film
        with av.open(opened, options={"format_whitelist": FORMATS}, **lenient) as container:
            yield container
    except BadClipError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if pointer := lfs_pointer(film):
            raise BadClipError("undecodable_video", f"{where} cannot be decoded: {pointer}.") from error
        if other := _other_container(film):
            remedy = "Write it anew, such as: ffmpeg -i FILM -fps_mode passthrough -crf 12 NEW.mp4"
            text = f"{where} is {other}; MP4, MOV and Matroska are read. {remedy}"
            raise BadClipError("undecodable_video", text) from error
        text = f"{where} cannot be decoded ({error}); it may be truncated. Copy it again."
        raise BadClipError("undecodable_video", text) from error


def _other_container(film: Path | BinaryIO) -> str | None:
    """The container that the film is in, if it is a known one that is not read."""
    if isinstance(film, Path):
        with film.open("rb") as file:
            head = file.read(512)
    else:
        film.seek(0)
        head = film.read(512)
    return next((name for mark, name in CONTAINERS.items() if re.match(mark, head, re.DOTALL)), None)


def _stream(container: Any, *, where: str) -> Any:
    """The film's only video stream, set to report damage."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]
    if len(streams) != 1:
        kind, number = (
            ("wrong_shape", f"{len(streams)} video streams; keep one")
            if streams
            else ("undecodable_video", "no video stream")
        )
        raise BadClipError(kind, f"{where} holds {number}.")
    codec = streams[0].codec_context
    if codec is None:
        reason = "its codec is unknown to FFmpeg; encode it again as H.264, or copy it again if it is damaged."
        raise BadClipError("undecodable_video", f"{where}: {reason}")
    check_size(codec.width, codec.height, where=where)
    if codec.name in _CONCEALING:
        codec.thread_count = 1
    return streams[0]


def _frames_of(container: Any, stream: Any, *, where: str) -> _Shown:
    times, keys, hidden = [], [], set()
    order: dict[int, int] = {}
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # the end
        if packet.pts is None:
            raise BadClipError("undecodable_video", f"{where} does not say when its frames are shown; encode it again.")
        order[packet.pts] = len(order)
        if packet.is_keyframe:
            keys.append(packet.pts)
        if packet.is_discard:
            hidden.add(packet.pts)
        else:
            times.append(packet.pts)
    return _Shown(sorted(times), keys, frozenset(hidden), order)


def _check_times(shown: _Shown, time_base: Any, stamps_us: NDArray[np.int64], *, where: str) -> None:
    """Refuse a film that has not the frames of its timestamps.

    A film of constant rate says nothing about its clock, since many are written so, whatever the camera did. Any other
    must agree with the timestamps up to its speed: frames that one of the two has lost show as a longer interval.
    """
    count, stamped = len(shown.times), len(stamps_us)
    if count != stamped:
        hidden = f" (its edit list hides {len(shown.hidden)} more)" if shown.hidden else ""
        kind, remedy = ("wrong_shape", "write the times of the frames that it holds")
        if count < stamped:
            kind, remedy = "undecodable_video", f"copy it again in case it is truncated, or {remedy}"
        raise BadClipError(kind, f"{where} holds {count} frames{hidden}, its timestamps name {stamped}; {remedy}.")
    if count < 3:
        return
    steps = np.diff(np.array(shown.times))
    if (steps <= 0).any():
        frame = int(np.argmin(steps))
        raise BadClipError("wrong_shape", f"{where} shows frames {frame} and {frame + 1} at one time; encode it again.")
    if np.ptp(steps) <= max(2, 0.05 * np.median(steps)):
        return
    table_steps = np.diff(stamps_us)
    film_us = np.array(shown.times) * (float(time_base) * 1e6)
    lag = max(1, (count - 1) // 10)  # several frames, so that jitter hardly matters
    speed = float(np.median((film_us[lag:] - film_us[:-lag]) / (stamps_us[lag:] - stamps_us[:-lag])))
    if abs(speed - 1) < SAME_SPEED:
        speed = 1.0
    gaps = (np.diff(film_us) / speed - table_steps) / np.median(table_steps)
    apart = np.concatenate([[0.0], np.cumsum(gaps)])
    # A clock that jitters comes back; one that has lost a frame does not.
    frames = np.arange(1, count)
    first, end = np.maximum(frames - NEIGHBOURS, 0), np.minimum(frames + NEIGHBOURS, count)
    sums = np.concatenate([[0.0], np.cumsum(apart)])
    shift = (sums[end] - sums[frames]) / (end - frames) - (sums[frames] - sums[first]) / (frames - first)
    # Means of the few frames at either end jitter more.
    limit = np.full(count - 1, LOST_STEPS)
    limit[end - first < 2 * NEIGHBOURS] = max(LOST_STEPS, EDGE_JITTERS * float(np.median(np.abs(gaps))))
    moved = np.abs(shift) / limit
    if moved.max() > 1:
        worst = int(np.argmax(moved))
        nearby = slice(first[worst], end[worst] - 1)
        frame = nearby.start + int(np.argmax(np.abs(gaps[nearby])))
        film_s, table_s = steps[frame] * float(time_base), table_steps[frame] / 1e6
        raise BadClipError(
            "wrong_shape",
            f"{where}: from frame {frame} to {frame + 1} it takes {film_s:.3f} s in the film, {table_s:.3f} s in its "
            "timestamps; they are not of one recording, or one of them lost frames.",
        )


def _decode(
    container: Any,
    stream: Any,
    shown: _Shown,
    wanted: Collection[int],
    *,
    where: str,
    about_px: int | None,
    from_start: bool = False,
) -> dict[int, NDArray[np.uint8]] | None:
    """Wanted frames by time; None if the decoder marks one of them, or one that was decoded before it, as damaged.

    Begins at the last key frame shown before them: frames that are shown before a key frame may follow it in the file,
    and are decoded from the key frame before it.
    """
    import av

    codec, first = stream.codec_context, min(wanted)
    start = max((time for time in shown.keys if time <= first), default=first)
    if from_start:
        start = min((shown.times[0], *shown.hidden))
    if codec.name == "hevc":
        codec.options = {"err_detect": "explode"}  # it marks no frames
    begun = start in shown.hidden  # a hidden key frame is decoded, but not seen here
    needed = max(shown.order[time] for time in wanted)
    frames: dict[int, NDArray[np.uint8]] = {}
    try:
        if not from_start:
            container.seek(start, backward=True, stream=stream)
        for frame in needed_frames(container, stream, frozenset(wanted)):
            if frame.pts is None or frame.pts < start or shown.order.get(frame.pts, 0) > needed:
                continue
            begun = begun or bool(frame.key_frame and frame.pict_type == av.video.frame.PictureType.I)
            if frame.is_corrupt or not begun:
                return None
            if frame.pts in wanted:
                check_size(frame.width, frame.height, where=where)
                frames[frame.pts] = _upright(_rgb(frame, about_px), frame, where=where)
    except av.error.FFmpegError:
        return None
    return frames if len(frames) == len(set(wanted)) else None


def needed_frames(container: Any, stream: Any, wanted: frozenset[int]) -> Iterator[Any]:
    """Frames from the container's position on, in the order of presentation, without some that nobody needs.

    One or two dozen frames lie between a key frame and those of a sample; half of them can be skipped in a video with
    B-frames. Ends with the frames that were decoded before the last wanted one and are shown after it.
    """
    codec, last = stream.codec_context, max(wanted, default=math.inf)
    for packet in container.demux(stream):
        if codec.name in _SKIPPING:
            codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
        frames = packet.decode()
        yield from frames
        if any(frame.pts is not None and frame.pts >= last for frame in frames):
            if packet.size:  # else this was the end
                yield from codec.decode(None)
            return


def _rgb(frame: Any, about_px: int | None) -> NDArray[np.uint8]:
    """`[H, W, 3]`, at the whole part of its size that is least but still `about_px` across."""
    part = 1 if about_px is None else max(1, frame.width // about_px)
    if part > 1:
        width, height = frame.width // part, max(1, frame.height // part)
        frame = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    picture: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return picture


def _upright(picture: NDArray[np.uint8], frame: Any, *, where: str) -> NDArray[np.uint8]:
    """`picture` turned and mirrored by the display matrix of its frame, if it has one."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    (a, b), (c, d) = (np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2] / 2**16).round(3).tolist()
    # A pixel at (x, y) is shown at (a x + c y, b x + d y), from whichever corner makes that positive.
    if (abs(a), abs(d), b, c) == (1, 1, 0, 0):
        return picture[:: int(d), :: int(a)]
    if (a, d, abs(b), abs(c)) == (0, 0, 1, 1):
        return picture.transpose(1, 0, 2)[:: int(b), :: int(c)]
    reason = f"is to be shown turned by {frame.rotation} degrees or scaled; encode it as it is to be seen."
    raise BadClipError("wrong_shape", f"{where} {reason}")
