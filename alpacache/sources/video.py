"""Reads chosen frames of a film that may come from a stranger.

Frames of a film are numbered as they are shown, which is what any player counts: what an edit list hides is none of
them, and neither a constant rate nor a start at zero is assumed. Reading begins at the last key frame before the wanted
ones; if the decoder reports anything there, at the film's start, in case the key frame was none. What it still reports
is damage, be it in a wanted frame or in one that it is predicted from.

Samples that are read one after another share a pass of the decoder where each alone would begin at the same frame, or
at a key frame of H.264 or H.265 before which the decoder forgets all others, and which the pass comes by anyway. A pass
that meets damage decides nothing, as it may be in a frame that only another sample wants: the sample at hand is then
read alone. So what a sample gets does not depend on those that are read with it, unless the decoder misses damage.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError
from alpacache.sources.film_index import FilmIndex, index_film, open_film, refused, video_stream
from alpacache.sources.image import check_size, stack

_SKIPPING = ("h264", "hevc")
"""Decoders that can leave out frames which no other is predicted from; the rest would leave out wanted ones too."""


class FilmReading:
    """Frames of one film for samples that are read one after another; each picture is decoded once.

    To be closed. Decoded pictures are kept as long as a later sample wants them: some within the span of one sample.
    """

    def __init__(
        self,
        film: Path | bytes,
        wanted: Sequence[Sequence[int]],
        stamps_us: NDArray[np.int64],
        *,
        name: str,
        where: str,
        about_px: int | None = None,
    ) -> None:
        """
        Args:
            film: a file, or all bytes of one.
            wanted: the numbers of each sample's frames, samples in the order of their times; none for one that will not
                be read.
            stamps_us: the times (us) of all frames by their own table.
            name: what messages call the film.
            about_px: pixels across that are enough; frames then come at half, a third or another whole part of their
                size.

        The film is opened when it is first read.
        """
        self._film, self._wanted, self._stamps_us = film, wanted, stamps_us
        self._where, self._about_px = f"{where}: {name}", about_px
        self._last_use = {frame: number for number, frames in enumerate(wanted) for frame in frames}
        self._index: FilmIndex | None = None
        self._opened: dict[bool, tuple[Any, Any]] = {}
        """Container and video stream: for passes from key frames, and (True) for the one from the film's start."""
        self._passes: dict[bool, _Pass] = {}
        self._shares_whole = True
        self._colours: Any = None
        """FFmpeg's scaler; to set one up for each picture takes as long as the picture."""

    def read(self, number: int) -> NDArray[np.uint8]:
        """The frames of one sample, `[frames, 3, H, W]` RGB, upright as the film's display matrix says.

        Samples are read in order; any may be left out. Raises `BadClipError` (`undecodable_video`, `wrong_shape`) for
        what this sample would meet alone.
        """
        with refused(self._film, where=self._where):
            if self._index is None:
                self._index = self._indexed()
            frames = self._frames(number, self._index, from_start=False)
            if frames is None:
                frames = self._frames(number, self._index, from_start=True)
        if frames is None:
            reason = f"frame {min(self._wanted[number])} or one that it is predicted from is damaged"
            text = f"{self._where}: {reason}. Copy the film again, or leave this part out."
            raise BadClipError("undecodable_video", text)
        return stack(frames, where=self._where)

    def close(self) -> None:
        """Close the film."""
        for from_start in tuple(self._opened):
            self._drop(from_start)

    def _indexed(self) -> FilmIndex:
        """The film's frames; the film stays open unless it is refused."""
        with ExitStack() as opened:
            container = opened.enter_context(open_film(self._film))
            stream = video_stream(container, where=self._where)
            index = index_film(container, stream, self._stamps_us, where=self._where)
            opened.pop_all()
        self._opened[False] = container, stream
        return index

    def _open(self, *, from_start: bool) -> tuple[Any, Any]:
        if from_start not in self._opened:
            container = open_film(self._film)
            self._opened[from_start] = container, video_stream(container, where=self._where)
        return self._opened[from_start]

    def _drop(self, from_start: bool) -> None:
        self._passes.pop(from_start, None)
        self._opened.pop(from_start)[0].close()

    def _frames(self, number: int, index: FilmIndex, *, from_start: bool) -> list[NDArray[np.uint8]] | None:
        """Frames of a sample from a pass that others share, or if that meets damage, from its own; None for damage."""
        wanted = [index.times[frame] for frame in self._wanted[number]]
        if self._shares_whole or not from_start:
            begun = self._passes.get(from_start)
            if begun is None or wanted not in begun.samples:
                samples = ([index.times[frame] for frame in frames] for frames in self._wanted[number:] if len(frames))
                shared = list(index.together(samples, from_start=from_start))
                begun = _Pass(*self._open(from_start=from_start), index, shared, seek=not from_start)
                self._passes[from_start] = begun
            later = {index.times[frame] for frame, last in self._last_use.items() if last > number}
            frames = begun.take(wanted, later=later, picture=self._picture)
            if frames is not None:
                return frames
            self._drop(from_start)
            if len(begun.samples) == 1:
                return None
            self._shares_whole = self._shares_whole and not from_start  # it is long, and would meet the same again
        try:
            alone = _Pass(*self._open(from_start=from_start), index, [wanted], seek=not from_start)
            return alone.take(wanted, later=(), picture=self._picture)
        finally:
            self._drop(from_start)

    def _picture(self, frame: Any) -> NDArray[np.uint8]:
        """`[H, W, 3]`, upright, at the whole part of its size that is least but still `about_px` across."""
        from av.video.reformatter import VideoReformatter

        check_size(frame.width, frame.height, where=self._where)
        self._colours = self._colours or VideoReformatter()
        part = 1 if self._about_px is None else max(1, frame.width // self._about_px)
        small: dict[str, Any] = {}
        if part > 1:
            small = {"width": frame.width // part, "height": max(1, frame.height // part), "interpolation": "AREA"}
        # Samples are read side by side: threads for each picture would cost more than they save.
        rgb = self._colours.reformat(frame, format="rgb24", threads=1, **small).to_ndarray()
        return _upright(rgb, frame, where=self._where)


class _Pass:
    """A decoder on its way through a film, for all samples that go together (`FilmIndex.together`)."""

    def __init__(
        self, container: Any, stream: Any, index: FilmIndex, samples: Sequence[Sequence[int]], *, seek: bool
    ) -> None:
        """`samples` are the times of each one's frames, in order; without `seek` it begins where the container is."""
        self.samples = samples
        self._starts = sorted({index.start(times, from_start=not seek) for times in samples})
        """Times of the frames that its samples alone would begin at."""
        self._index, self._seek = index, seek
        self._wanted = frozenset(time for times in samples for time in times)
        self._kept: dict[int, Any] = {}
        """Time -> a wanted frame, as decoded or, once a sample had it, as its picture."""
        self._frames = self._decode(container, stream)
        self._shown = -1 << 63
        """Time of the latest frame that was decoded."""

    def take(
        self, wanted: Sequence[int], *, later: Collection[int], picture: Callable[[Any], NDArray[np.uint8]]
    ) -> list[NDArray[np.uint8]] | None:
        """Pictures of one sample; None if the decoder marks one of its frames, or any decoded before, as damaged.

        `picture` makes one of a frame. Those whose times are among `later` are kept.
        """
        import av

        first, reach = min(wanted), self._index.reach(wanted)
        whole = self._index.last(wanted) == self._index.last(self._wanted)  # then the decoder is asked for all it has
        try:
            while whole or self._shown < reach or not all(time in self._kept for time in wanted):
                frame = next(self._frames, None)
                if frame is None:
                    break
                self._shown = max(self._shown, frame.pts)
                if frame.pts in self._wanted and frame.pts >= first:
                    self._kept[frame.pts] = frame
            if not all(time in self._kept for time in wanted):
                return None
            for time in wanted:
                if not isinstance(frame := self._kept[time], np.ndarray):
                    self._kept[time] = picture(frame)
        except (av.error.FFmpegError, _DamageError):
            return None
        pictures = [self._kept[time] for time in wanted]
        self._kept = {time: frame for time, frame in self._kept.items() if time in later}
        return pictures

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        """Frames from the start on, without some that no sample needs."""
        import av

        first, coming = self._starts[0], self._starts.copy()
        if self._seek:
            container.seek(first, backward=True, stream=stream)
        for frame in needed_frames(container, stream, self._wanted, self._index.last(self._wanted)):
            if frame.pts is None or frame.pts < first:
                continue
            while coming and frame.pts >= coming[0]:
                hidden = coming.pop(0) in self._index.hidden  # a hidden key frame is decoded, but not seen here
                if not hidden and not (frame.key_frame and frame.pict_type == av.video.frame.PictureType.I):
                    raise _DamageError
            if frame.is_corrupt:
                raise _DamageError
            yield frame


class _DamageError(Exception):
    """The decoder has marked a frame as damaged."""


def ffmpeg_versions() -> dict[str, str]:
    """Versions of FFmpeg's parts that decode films and convert their colours."""
    import av

    return {name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libavformat", "libswscale")}


def needed_frames(container: Any, stream: Any, wanted: frozenset[int], last: int | None = None) -> Iterator[Any]:
    """Frames from the container's position on, in the order of presentation, without some that nobody needs.

    One or two dozen frames lie between a key frame and those of a sample; half of them can be skipped in a video with
    B-frames. No packet behind that of the frame `last` (a time) goes to the decoder: if it is damaged, the frames
    before it are none the worse.
    """
    codec = stream.codec_context
    for packet in container.demux(stream):
        if codec.name in _SKIPPING:
            codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
        yield from packet.decode()
        if packet.size and packet.pts == last and not packet.is_discard:
            yield from codec.decode(None)
            return


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
