"""Parts of films put into an MP4 with the times of their frames, packet by packet, without decoding.

A part can only begin at a key frame and end where no later frame is needed to show it, so more may be written than was
asked for. Frames are numbered as they are shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError
from alpacache.regular_file import regular_size
from alpacache.sources.film_index import FORMATS
from alpacache.sources.image import check_size
from cache_store.storage.local_files import FULL

RAW_FORMATS = "h264,hevc,ivf,obu"
"""Streams without times, whose frames are in the order in which they are shown."""
COPIED = ("h264", "hevc", "av1", "vp9", "mpeg4")
"""Codecs that an MP4 holds and that are read from it."""
_DECODERS = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx-vp9": "vp9"}
"""Name of a decoder -> its codec, where they differ."""
_MICROSECOND = Fraction(1, 1_000_000)


class FilmFrames(NamedTuple):
    """The frames of a film by its packets, in the order of the file."""

    codec: str
    numbers: NDArray[np.int64]
    """Number of the packet's frame, in the order in which frames are shown; -1 for one that an edit list hides."""
    keys: NDArray[np.bool_]
    times: NDArray[np.int64] | None
    """Times at which frames are shown, in the film's own units; None for a raw stream."""

    @property
    def total(self) -> int:
        return int((self.numbers >= 0).sum())


def film_frames(film: Path) -> FilmFrames:
    """Find the frames of a film. Raises `BadClipError` for one that cannot be read."""
    status = film.stat()
    return _film_frames(film, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _film_frames(film: Path, *_: int) -> FilmFrames:
    pts: list[int | None] = []
    keys, hidden = [], []
    with opened(film) as (container, stream):
        codec = _DECODERS.get(stream.codec_context.name, stream.codec_context.name)
        raw = container.format.name in RAW_FORMATS.split(",")
        for packet in container.demux(stream):
            if packet.size:
                pts.append(packet.pts)
                keys.append(bool(packet.is_keyframe))
                hidden.append(bool(packet.is_discard))
        reordered = bool(stream.codec_context.has_b_frames)
    if not pts:
        raise BadClipError("undecodable_video", f"{film.name} holds no frames; copy it again.")
    if raw:
        if reordered:
            reason = "is a raw stream with frames out of the order in which they are shown (B-frames), without times"
            raise BadClipError("undecodable_video", f"{film.name} {reason}; write it as MP4 with its times.")
        return FilmFrames(codec, np.arange(len(pts)), np.array(keys), None)
    if any(time is None for time in pts):
        raise BadClipError("undecodable_video", f"{film.name} does not say when its frames are shown; encode it again.")
    times, unseen = np.array(pts, np.int64), np.array(hidden)
    numbers = np.full(len(times), -1, np.int64)
    shown = np.flatnonzero(~unseen)
    numbers[shown[np.argsort(times[shown], kind="stable")]] = np.arange(len(shown))
    return FilmFrames(codec, numbers, np.array(keys), times)


def whole_range(film: FilmFrames, begin: int, end: int) -> tuple[int, int] | None:
    """Frames that are to be copied so that those from `begin` up to `end` can be shown; None if that cannot be said."""
    if film.codec not in COPIED or not 0 <= begin < end <= film.total:
        return None
    place = np.empty(film.total, np.int64)
    place[film.numbers[film.numbers >= 0]] = np.flatnonzero(film.numbers >= 0)
    starts = [at for at in np.flatnonzero(film.keys) if 0 <= film.numbers[at] <= begin]
    if not starts:
        return None
    first = int(starts[-1])
    number = int(film.numbers[first])
    # Behind the last packet of the part, no frame of it may follow, and none that is shown before its end be left out.
    last = int(place[begin:end].max())
    while True:
        shown = film.numbers[first : last + 1]
        shown = shown[shown >= number]  # those shown before the key frame are predicted from what is not copied
        if (film.numbers[first : last + 1] < 0).any():
            return None
        top = int(shown.max()) + 1
        if top - number == len(shown):
            return number, top
        last = max(last + 1, int(place[number:top].max()))


def copy_frames(film: Path, begin: int, end: int, times_us: NDArray[np.int64], target: Path) -> None:
    """Write the packets of the frames of a `whole_range` as an MP4 that shows them at `times_us`, one a frame."""
    import av

    frames = film_frames(film)
    offsets = (times_us - times_us[0]).tolist()
    wanted = (frames.numbers >= begin) & (frames.numbers < end)
    order = frames.numbers[wanted] - begin  # of decoding
    delay = int((np.arange(len(order)) - order).max(initial=0))
    step = max(1, int(np.median(np.diff(times_us)))) if len(times_us) > 1 else 1
    decode_at = [(number - delay) * step for number in range(delay)] + offsets[: len(offsets) - delay]
    first = int(np.flatnonzero(wanted)[0])
    options = {"video_track_timescale": "1000000"}
    with opened(film) as (source, stream), av.open(str(target), "w", format="mp4", options=options) as movie:
        copy = movie.add_stream_from_template(stream, opaque=True)  # what has no encoder is copied too
        copy.time_base = _MICROSECOND
        number = first
        if frames.times is None:
            number = 0
        else:
            source.seek(int(frames.times[first]), backward=True, stream=stream)
            number = -1
        done = 0
        for packet in source.demux(stream):
            if not packet.size:
                continue
            if number < 0:
                number = int(np.flatnonzero(frames.times == packet.pts)[0])
            if wanted[number]:
                frame = int(frames.numbers[number]) - begin
                lasts = offsets[frame + 1] - offsets[frame] if frame + 1 < len(offsets) else step
                packet.stream, packet.time_base = copy, _MICROSECOND
                packet.pts, packet.dts, packet.duration = offsets[frame], decode_at[done], lasts
                movie.mux(packet)
                done += 1
                if done == len(offsets):
                    break
            number += 1
    if done < len(offsets):
        reason = f"{done} of {len(offsets)} frames could be copied"
        raise BadClipError("undecodable_video", f"{film.name}: {reason}; copy the film again in case it is damaged.")


def decoded(film: Path, begin: int, end: int) -> Iterator[NDArray[np.uint8]]:
    """Frames of a film as RGB `[H, W, 3]`, for those that cannot be copied."""
    frames = film_frames(film)
    count = -1
    with opened(film) as (container, stream):
        if frames.times is not None:
            starts = [at for at in np.flatnonzero(frames.keys) if frames.numbers[at] <= begin]
            if starts:
                container.seek(int(frames.times[starts[-1]]), backward=True, stream=stream)
            by_time = dict(zip(frames.times.tolist(), frames.numbers.tolist(), strict=True))
        for frame in container.decode(stream):
            count += 1
            number = count if frames.times is None else by_time.get(frame.pts, -1)
            if begin <= number < end:
                check_size(frame.width, frame.height, where=film.name)
                yield frame.to_ndarray(format="rgb24")
            if number + 1 >= end:
                return


def write_raw(packets: Iterator[bytes], codec: str, target: Path) -> int:
    """Write packets of one stream as a raw file that `film_frames` reads; returns their number.

    H.264 and HEVC are put behind each other; VP9 and AV1 need to know where each ends and get IVF's frame headers.
    """
    count = 0
    with target.open("wb") as file:
        fourcc = {"vp9": b"VP90", "av1": b"AV01"}.get(codec)
        if fourcc is not None:
            zero = b"\0" * 4
            file.write(b"DKIF" + (0).to_bytes(2, "little") + (32).to_bytes(2, "little") + fourcc + zero)
            file.write((30).to_bytes(4, "little") + (1).to_bytes(4, "little") + zero * 2)
        for packet in packets:
            if fourcc is not None:
                file.write(len(packet).to_bytes(4, "little") + count.to_bytes(8, "little"))
            file.write(packet)
            count += 1
    return count


def suffix_of(codec: str) -> str:
    """Ending of a file of `write_raw`."""
    return {"vp9": ".ivf", "av1": ".ivf"}.get(codec, f".{codec}")


@contextmanager
def opened(film: Path, *, formats: str = f"{FORMATS},{RAW_FORMATS}") -> Iterator[tuple[Any, Any]]:
    """Open a film for its container and its only video stream; what FFmpeg raises is a `BadClipError`."""
    import av

    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        regular_size(film)
        with av.open(str(film), options={"format_whitelist": formats}, **lenient) as container:
            if len(container.streams.video) != 1:
                reason = f"{film.name} holds {len(container.streams.video)} video streams; keep one."
                raise BadClipError("undecodable_video", reason)
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadClipError("undecodable_video", f"{film.name} is of a codec unknown to FFmpeg; encode it anew.")
            yield container, stream
    except BadClipError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in FULL:  # of the disk that is written to, while the film is read
            raise
        reason = f"{film.name} cannot be read as a film ({error}); copy it again, or write it as MP4."
        raise BadClipError("undecodable_video", reason) from error
