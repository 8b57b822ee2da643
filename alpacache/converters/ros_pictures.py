"""Pictures from the messages of robots: files by their first bytes, raw ones by their encoding, packets of video.

The text that a message calls its format by is not believed: drivers write JPEG under any name.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.drive import Arrays, Camera, Dropped, Packets, Pictures, increasing
from alpacache.converters.messages import Message, MessageLog, Position, content_of, fetched, part, stamp_ns
from alpacache.converters.ros_poses import Clocked, Stamps
from alpacache.converters.transforms import microseconds
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.image import check_size

PICTURE_TYPES = ("sensor_msgs/CompressedImage", "sensor_msgs/Image", "foxglove/CompressedImage", "foxglove/RawImage")
VIDEO_TYPES = ("foxglove/CompressedVideo", "ffmpeg_image_transport_msgs/FFMPEGPacket")
Form = Literal["file", "raw", "h264", "hevc", "vp9", "av1"]


class PictureReader:
    """Collects the frames of one topic while a log goes by."""

    def __init__(self, topic: str, kind: str, *, stamps: Stamps = "header") -> None:
        """Raises `UsageError` for a type that holds no pictures."""
        if kind not in (*PICTURE_TYPES, *VIDEO_TYPES):
            known = ", ".join((*PICTURE_TYPES, *VIDEO_TYPES))
            raise UsageError(f"{topic} is of type {kind or 'unknown'}, which holds no pictures; these do: {known}.")
        self._topic, self._kind, self._clock = topic, kind, Clocked(topic, stamps)
        self._forms, self._formats, self._frame = list[Form](), Counter[str](), ""
        self._positions: list[Position] = []
        self._keys: list[bool] = []
        self._bad: list[str] = []

    def take(self, message: Message) -> None:
        """Look at a message of the topic."""
        value = message.read()
        where = f"{self._topic} at {message.log_ns} ns"
        try:
            form, is_key = _form(value, self._kind, where=where)
        except BadClipError as error:
            self._bad.append(str(error))
            return
        if self._clock.time_of(message, stamp_ns(value)) is None:
            return
        self._forms.append(form)
        self._positions.append(message.position)
        self._keys.append(is_key)
        self._formats[str(part(value, "format") or part(value, "encoding") or "")[:60]] += 1
        self._frame = str(part(value, "header", "frame_id") or part(value, "frame_id") or "")[:200]

    def camera(self, log: MessageLog) -> tuple[Camera, dict[str, Any], list[Dropped]]:
        """The camera, what is to be said of it, and what is dropped. Raises `UsageError` if there is none."""
        if self._bad and not self._forms:
            raise UsageError(f"none of {len(self._bad)} pictures can be read; the first: {self._bad[0]}")
        self._clock.check()
        dropped = self._clock.dropped("frames")
        if self._bad:
            dropped.append(Dropped(what="frames", count=len(self._bad), reason=self._bad[0].rstrip(".")))
        form = Counter(self._forms).most_common(1)[0][0]
        kept = np.flatnonzero([other == form for other in self._forms])
        if len(kept) < len(self._forms):
            count = len(self._forms) - len(kept)
            dropped.append(Dropped(what="frames", count=count, reason=f"{self._topic}: not {form} as the others"))
        times = microseconds(self._clock.stamps_ns)[kept]
        if form in ("file", "raw"):
            order = increasing(times)
        else:
            order = self._packets_in_order(times, kept, dropped)
        if len(order) < len(times):
            count = len(times) - len(order)
            dropped.append(Dropped(what="frames", count=count, reason=f"{self._topic}: {_LEFT_OUT[form in _VIDEO]}"))
        facts = {"type": self._kind, **self._clock.facts(), "form": form, "frame_id": self._frame}
        facts["formats_said"] = dict(self._formats.most_common(5))
        positions = [self._positions[kept[at]] for at in order]
        return self._as_camera(log, form, times[order], positions), facts, dropped

    def _packets_in_order(
        self, times: NDArray[np.int64], kept: NDArray[np.int64], dropped: list[Dropped]
    ) -> NDArray[np.int64]:
        """Packets from the first key frame on. Raises `UsageError` where their times step back, as B-frames' do."""
        keys = [at for at, number in enumerate(kept) if self._keys[number]]
        if not keys:
            raise UsageError(f"{self._topic}: no packet begins with a key frame, so nothing can be decoded.")
        order = np.arange(keys[0], len(times))
        if (np.diff(times[order]) <= 0).any():
            raise UsageError(
                f"{self._topic}: times of video packets do not increase; with --stamp log they may, or record the "
                "camera as pictures."
            )
        return order

    def _as_camera(
        self, log: MessageLog, form: Form, times: NDArray[np.int64], positions: Sequence[Position]
    ) -> Camera:
        topic = self._topic

        def files(begin: int, end: int) -> Iterator[bytes]:
            for value in fetched(log, topic, positions[begin:end]):
                yield content_of(value, where=topic)

        def arrays(begin: int, end: int) -> Iterator[NDArray[np.uint8]]:
            return (raw_picture(value, where=topic) for value in fetched(log, topic, positions[begin:end]))

        def packets() -> Iterator[bytes]:
            return (content_of(value, where=topic) for value in fetched(log, topic, positions))

        if form == "file":
            return Pictures(times_us=times, read=files)
        if form == "raw":
            return Arrays(times_us=times, read=arrays)
        return Packets(times_us=times, codec=form, read=packets)


_VIDEO = ("h264", "hevc", "vp9", "av1")
_LEFT_OUT = {False: "a frame of the same time is there already", True: "before the first key frame"}


def _form(value: Any, kind: str, *, where: str) -> tuple[Form, bool]:
    """Form of a message's picture, and whether it can be decoded without others. Raises `BadClipError`."""
    if kind in ("sensor_msgs/Image", "foxglove/RawImage"):
        data = content_of(value, where=where)
        if picture_start(data) and len(data) != _raw_size(value):  # a driver that puts files into raw pictures
            return "file", True
        raw_picture(value, where=where, look=True)
        return "raw", True
    data = content_of(value, where=where)
    if picture_start(data):
        return "file", True
    if picture_start(data[12:]):  # compressedDepth has 12 bytes before a PNG
        raise BadClipError("undecodable_video", f"{where}: a depth picture; name the colour camera's topic.")
    said = str(part(value, "format") or part(value, "encoding") or "").lower()
    codec = next((codec for name, codec in _CODECS.items() if name in said), None)
    if codec is None and data[:3] in (b"\0\0\1", b"\0\0\0"):
        codec = "h264"
    if codec is None:
        begins = data[:4].hex() or "nothing"
        raise BadClipError("undecodable_video", f"{where}: format {said[:40]!r} beginning with {begins} is not read.")
    return codec, is_key_packet(data, codec)


_CODECS: dict[str, Literal["h264", "hevc", "vp9", "av1"]] = {
    "h264": "h264",
    "avc": "h264",
    "x264": "h264",
    "h265": "hevc",
    "hevc": "hevc",
    "x265": "hevc",
    "vp9": "vp9",
    "av1": "av1",
}


def picture_start(data: bytes) -> bool:
    """Tell whether bytes begin as a JPEG or PNG file does."""
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def is_key_packet(data: bytes, codec: str) -> bool:
    """Tell whether a packet holds a key frame, with the headers that a decoder begins with."""
    if codec == "vp9":
        return bool(data) and data[0] >> 6 == 2 and not data[0] & 0x0C  # frame_type 0, no show_existing_frame
    if codec == "av1":
        at = 0
        while at < len(data):
            kind, has_extension, has_size = data[at] >> 3 & 15, data[at] & 4, data[at] & 2
            if kind == 1:  # a sequence header comes with each key frame
                return True
            at += 2 if has_extension else 1
            size = shift = 0
            while has_size and at < len(data):
                size |= (data[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if data[at - 1] < 128:
                    break
            at += size if has_size else len(data)
        return False
    at = data.find(b"\0\0\1")
    kinds = set()
    while 0 <= at < len(data) - 3:
        kinds.add(data[at + 3] & 31 if codec == "h264" else data[at + 3] >> 1 & 63)
        at = data.find(b"\0\0\1", at + 3)
    frames, headers = ({5}, {7}) if codec == "h264" else (set(range(16, 22)), {33})
    return bool(kinds & frames) and bool(kinds & headers)


_CHANNELS = {
    "rgb": (3, [0, 1, 2]),
    "bgr": (3, [2, 1, 0]),
    "rgba": (4, [0, 1, 2]),
    "bgra": (4, [2, 1, 0]),
    "mono": (1, [0, 0, 0]),
}
"""Colours of an encoding -> values a pixel, and which of them are red, green and blue."""
_BAYER = {"bayer_rggb": (0, 0), "bayer_bggr": (1, 1), "bayer_grbg": (0, 1), "bayer_gbrg": (1, 0)}
"""Colours of an encoding -> row and column of the first red pixel."""
_YUV = {"yuv422": (1, 0, 2), "uyvy": (1, 0, 2), "yuv422_yuy2": (0, 1, 3), "yuyv": (0, 1, 3)}
"""Encoding -> place of the first brightness, of the blue and of the red difference in the four bytes of two pixels."""
_NUMBERED = {"uc1": "mono", "uc3": "bgr", "uc4": "bgra"}
"""OpenCV's names, whose order of colours is blue, green, red."""


def _raw_size(value: Any) -> int:
    step, height = part(value, "step"), part(value, "height")
    return int(step) * int(height) if isinstance(step, int) and isinstance(height, int) else -1


def raw_picture(value: Any, *, where: str, look: bool = False) -> NDArray[np.uint8]:
    """RGB `[H, W, 3]` of a raw picture; with `look` it is only held against its sizes. Raises `BadClipError`."""
    encoding = str(part(value, "encoding") or "").lower()
    width, height, step = (part(value, name) for name in ("width", "height", "step"))
    if not all(isinstance(size, int) and size > 0 for size in (width, height, step)):
        raise BadClipError("wrong_shape", f"{where}: a picture of {width} x {height}, rows of {step} bytes.")
    check_size(width, height, where=where)
    colours, bits = _colours_and_bits(encoding)
    if colours not in (*_CHANNELS, *_BAYER, *_YUV):
        known = ", ".join((*(f"{name}8, {name}16" for name in (*_CHANNELS, *_BAYER)), *_YUV))
        raise BadClipError("undecodable_video", f"{where}: encoding {encoding[:40]!r} is not read; these are: {known}.")
    values = (width + 1) // 2 * 4 if colours in _YUV else width * _CHANNELS.get(colours, (1, []))[0]
    data = content_of(value, where=where)
    if len(data) != step * height or step < values * bits // 8:
        reason = f"{len(data):,} bytes for {height} rows of {step}, {width} pixels wide as {encoding}"
        raise BadClipError("wrong_shape", f"{where}: {reason}.")
    if look:
        return np.zeros((0, 0, 3), np.uint8)
    rows = np.frombuffer(data, np.uint8).reshape(height, step)[:, : values * bits // 8]
    if bits == 16:  # what a JPEG keeps of them
        rows = rows[:, 0 if part(value, "is_bigendian") else 1 :: 2]
    if colours in _CHANNELS:
        return np.ascontiguousarray(rows.reshape(height, width, -1)[:, :, _CHANNELS[colours][1]])
    if colours in _YUV:
        return np.ascontiguousarray(_from_yuv(rows, *_YUV[colours])[:, :width])
    return _from_bayer(rows, *_BAYER[colours])


def _colours_and_bits(encoding: str) -> tuple[str, int]:
    """`bgr8` as `bgr` and 8, `16uc1` as `mono` and 16; names of YUV say no number."""
    if encoding in _YUV:
        return encoding, 8
    for bits in (8, 16):
        if encoding.endswith(str(bits)):
            return encoding.removesuffix(str(bits)), bits
        if encoding.startswith(f"{bits}uc"):
            return _NUMBERED.get(encoding.removeprefix(str(bits)), encoding), bits
    return encoding, 8


def _from_yuv(rows: NDArray[np.uint8], first: int, blue: int, red: int) -> NDArray[np.uint8]:
    """Two pixels in four bytes, as BT.601 of video range has them."""
    quads = rows.reshape(rows.shape[0], -1, 4).astype(np.float32)
    bright = 1.164 * (quads[:, :, [first, first + 2]].reshape(rows.shape[0], -1) - 16)
    u, v = (np.repeat(quads[:, :, place], 2, axis=1) - 128 for place in (blue, red))
    colours = np.stack([bright + 1.596 * v, bright - 0.813 * v - 0.392 * u, bright + 2.017 * u], axis=2)
    whole: NDArray[np.uint8] = np.clip(np.rint(colours), 0, 255).astype(np.uint8)
    return whole


def _from_bayer(rows: NDArray[np.uint8], red_row: int, red_column: int) -> NDArray[np.uint8]:
    """Colours that a pixel lacks are the means of its neighbours that have them."""
    height, width = rows.shape
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    is_red_row, is_red_column = y % 2 == red_row, x % 2 == red_column
    has = [is_red_row & is_red_column, is_red_row ^ is_red_column, ~is_red_row & ~is_red_column]
    picture = np.empty((height, width, 3), np.uint8)
    for colour, mask in enumerate(has):
        shown = np.pad(np.where(mask, rows, 0).astype(np.uint16), 1)
        count = np.pad(np.broadcast_to(mask, rows.shape).astype(np.uint16), 1)
        sums, counts = (
            sum(array[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3))
            for array in (shown, count)
        )
        picture[:, :, colour] = np.where(mask, rows, (sums + counts // 2) // np.maximum(counts, 1))
    return picture
