"""Opens a film that may come from a stranger, and finds its frames.

Frames are found by the film's packets, without decoding one, and held against the timestamps of their own table: a film
that has lost a frame would show all later ones at another one's time.
"""

import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError
from alpacache.regular_file import lfs_pointer
from alpacache.sources.image import check_size

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


class _Units(NamedTuple):
    """How a codec tells the units of its stream apart."""

    shift: int
    mask: int
    """Of a unit's first byte: its kind, once shifted."""
    idr: tuple[int, ...]
    """Kinds of an IDR picture."""
    first_other: int
    """Kinds from this on are no parts of a picture."""
    length_at: int
    """Place in the codec's head of the byte that says how many bytes a unit's length takes."""


_UNITS = {
    "h264": _Units(shift=0, mask=0x1F, idr=(5,), first_other=6, length_at=4),
    "hevc": _Units(shift=1, mask=0x3F, idr=(19, 20), first_other=32, length_at=21),
}


class FilmIndex(NamedTuple):
    """Frames of a film by its packets, in the film's own units of time."""

    times: list[int]
    """Times at which frames are shown, increasing."""
    keys: list[int]
    """Times of all frames that are marked as key frames."""
    hidden: frozenset[int]
    """Times of frames that an edit list hides; they are decoded, since others may be predicted from them."""
    order: dict[int, int]
    """Time of a frame -> its place in the file, which is the order of decoding."""
    closed: frozenset[int] = frozenset()
    """Times of key frames that nothing shown later is predicted across, whatever was decoded before them."""

    def together(self, samples: Iterable[Sequence[int]], *, from_start: bool) -> Iterator[Sequence[int]]:
        """The first of these samples, given by their frames' times, and those behind it that go in one pass with it.

        They begin at the same frame, or at a closed key frame that the pass comes by on its way to those before.
        """
        start = reach = None
        for times in samples:
            own = self.start(times, from_start=from_start)
            if reach is not None and own != start and not (own in self.closed and own <= reach):
                return
            start, reach = own, max(times if reach is None else (*times, reach))
            yield times

    def start(self, wanted: Collection[int], *, from_start: bool) -> int:
        """Time of the frame that decoding begins at for these: the last key frame shown before them, or the film's
        first frame.

        Frames that are shown before a key frame may follow it in the file, and are decoded from the key frame before.
        """
        if from_start:
            return min((self.times[0], *self.hidden))
        first = min(wanted)
        return max((time for time in self.keys if time <= first), default=first)

    def last(self, wanted: Collection[int]) -> int:
        """Time of that one of these frames which is decoded last."""
        return max(wanted, key=self.order.__getitem__)

    def reach(self, wanted: Collection[int]) -> int:
        """Time of the latest frame that is decoded before all of these are."""
        needed = self.order[self.last(wanted)]
        return max(time for time, place in self.order.items() if place <= needed)


def open_film(film: Path | bytes) -> Any:
    """The film's container, with a place of its own in the file or in its bytes, which are not copied.

    Raises what PyAV does: see `refused`.
    """
    import av

    # A dashcam's names are in any encoding. From 19 on PyAV has no such argument.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    opened = str(film) if isinstance(film, Path) else io.BytesIO(film)
    return av.open(opened, options={"format_whitelist": FORMATS}, **lenient)


@contextmanager
def refused(film: Path | bytes, *, where: str) -> Iterator[None]:
    """Context in which what PyAV raises over this film is a `BadClipError`."""
    import av

    try:
        yield
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


def _other_container(film: Path | bytes) -> str | None:
    """The container that the film is in, if it is a known one that is not read."""
    if isinstance(film, Path):
        with film.open("rb") as file:
            head = file.read(512)
    else:
        head = film[:512]
    return next((name for mark, name in CONTAINERS.items() if re.match(mark, head, re.DOTALL)), None)


def video_stream(container: Any, *, where: str) -> Any:
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
    if codec.name == "hevc":
        codec.options = {"err_detect": "explode"}  # it marks no frames
    return streams[0]


def index_film(container: Any, stream: Any, stamps_us: NDArray[np.int64], *, where: str) -> FilmIndex:
    """Frames of a film. Raises `BadClipError` for a film that has not those of its timestamps (us)."""
    times, keys, hidden, closed = [], [], set(), set()
    order: dict[int, int] = {}
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # the end
        if packet.pts is None:
            raise BadClipError("undecodable_video", f"{where} does not say when its frames are shown; encode it again.")
        order[packet.pts] = len(order)
        if packet.is_keyframe:
            keys.append(packet.pts)
            if _forgets(packet, stream.codec_context):
                closed.add(packet.pts)
        if packet.is_discard:
            hidden.add(packet.pts)
        else:
            times.append(packet.pts)
    index = FilmIndex(sorted(times), keys, frozenset(hidden), order, frozenset(closed))
    _check_times(index, stream.time_base, stamps_us, where=where)
    return index


def _forgets(packet: Any, codec: Any) -> bool:
    """Tell whether a packet holds an IDR picture of H.264 or H.265, before which a decoder forgets all others."""
    units, head = _UNITS.get(codec.name), codec.extradata or b""
    if units is None or len(head) <= units.length_at or head[0] != 1:
        return False  # another codec, or units without their lengths
    data, size, at = memoryview(packet), (head[units.length_at] & 3) + 1, 0
    while at + size < len(data):
        kind = data[at + size] >> units.shift & units.mask
        if kind in units.idr:
            return True
        if kind < units.first_other:
            return False
        at += size + int.from_bytes(data[at : at + size], "big")
    return False


def _check_times(shown: FilmIndex, time_base: Any, stamps_us: NDArray[np.int64], *, where: str) -> None:
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
