"""Makes samples of a recording's parts; shared by the sources of whole recordings."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.driving.poses import EgoPoses, Track, check_timestamps, frame_indices
from alpacache.driving.sample import FRAME_STEP_US, Sample, SampleRef
from alpacache.errors import BadClipError
from alpacache.regular_file import lfs_pointer
from alpacache.sources.image import stack

POSE_COLUMNS = ("timestamp", "x", "y", "z", "qx", "qy", "qz", "qw")
"""Columns of a table of poses: us, metres, and a quaternion with its scalar last, vehicle to world."""

Shot = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""One camera's frames of a sample: RGB `[frames, 3, H, W]`, and when each was recorded (us)."""


class FrameReading(Protocol):
    """Frames of one camera of one clip, for samples that are read one after another; to be closed."""

    def read(self, number: int) -> NDArray[np.uint8]:
        """The frames of one sample `[frames, 3, H, W]`. Samples are read in order; any may be left out.

        Raises `BadClipError` for what is wrong with this sample's own frames.
        """

    def close(self) -> None: ...


OpenFrames = Callable[[NDArray[np.int64], Sequence[Sequence[int]]], FrameReading]
"""Opens the frames of a camera: takes when each was recorded (us), and for each sample which ones it wants."""


class PictureReading:
    """A `FrameReading` of pictures that are independent of each other; one that a later sample wants is kept."""

    def __init__(
        self,
        wanted: Sequence[Sequence[int]],
        read: Callable[[Sequence[int]], Iterable[NDArray[np.uint8]]],
        *,
        where: str,
    ) -> None:
        """`wanted`: the numbers of each sample's frames; `read` gives pictures `[H, W, 3]` by their numbers."""
        self._wanted, self._read, self._where = wanted, read, where
        self._last_use = {frame: number for number, frames in enumerate(wanted) for frame in frames}
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def read(self, number: int) -> NDArray[np.uint8]:
        wanted = self._wanted[number]
        missing = [frame for frame in dict.fromkeys(wanted) if frame not in self._kept]
        pictures = self._kept | (dict(zip(missing, self._read(missing), strict=True)) if missing else {})
        self._kept = {frame: each for frame, each in pictures.items() if self._last_use[frame] > number}
        return stack([pictures[frame] for frame in wanted], where=self._where)

    def close(self) -> None:
        self._kept = {}


NEAR = 16
"""Frames between two wanted ones up to which a film is read on; beyond, the next one is sought."""


def read_frames(
    open_frames: OpenFrames, stamps: NDArray[np.int64], chosen: NDArray[np.int64], *, where: str
) -> NDArray[np.uint8]:
    """Frames `[N, 3, H, W]` by their numbers, in any order; what they are read from is opened once."""
    numbers, places = np.unique(chosen, return_inverse=True)
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) > NEAR) + 1)
    with closing(open_frames(stamps, [group.tolist() for group in groups])) as reading:
        pictures = [picture for at in range(len(groups)) for picture in reading.read(at).transpose(0, 2, 3, 1)]
    return stack([pictures[place] for place in places.tolist()], where=where)


class Reel:
    """What one camera of a clip has for samples that are read one after another, in the order of their times."""

    def __init__(
        self, t0s_us: Sequence[int], frames: int, read_stamps: Callable[[], NDArray[np.int64]], open_frames: OpenFrames
    ) -> None:
        """Take samples at these t0, of so many frames each; nothing is read before the first shot is asked for."""
        self._t0s_us, self._frames = t0s_us, frames
        self._read_stamps, self._open_frames = read_stamps, open_frames
        self._stamps: NDArray[np.int64] | None = None
        self._reading: FrameReading | None = None

    def shot(self, t0_us: int, *, where: str) -> Shot:
        """The frames of the sample at this t0. Raises `BadClipError` for this sample alone."""
        stamps = self._read_stamps() if self._reading is None or self._stamps is None else self._stamps
        chosen = self._chosen(stamps, t0_us, where=where)
        if self._reading is None:
            self._stamps, self._reading = stamps, self._open_frames(stamps, list(self._all(stamps, where=where)))
        return self._reading.read(self._t0s_us.index(t0_us)), stamps[chosen]

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()

    def _chosen(self, stamps: NDArray[np.int64], t0_us: int, *, where: str) -> NDArray[np.int64]:
        return frame_indices(stamps, wanted_frame_times_us(t0_us, self._frames), where=where)

    def _all(self, stamps: NDArray[np.int64], *, where: str) -> Iterator[list[int]]:
        """Numbers of the frames that each sample wants; none for one that the film does not cover."""
        for t0_us in self._t0s_us:
            try:
                yield self._chosen(stamps, t0_us, where=where).tolist()
            except BadClipError:
                yield []


@contextmanager
def reels(cameras: Sequence[str], make: Callable[[str], Reel]) -> Iterator[dict[str, Reel]]:
    """A reel for each camera, closed at the end."""
    with ExitStack() as opened:
        yield {camera: opened.enter_context(closing(make(camera))) for camera in cameras}


def track_of(columns: Mapping[str, NDArray[Any]]) -> Track:
    """The track in a table with `POSE_COLUMNS`, unchecked."""
    values = np.stack([np.asarray(columns[name], np.float64) for name in POSE_COLUMNS[1:]], axis=1)
    stamps = np.asarray(columns["timestamp"]).astype(np.int64)
    return Track(timestamps_us=stamps, xyz=values[:, :3], quaternion_xyzw=values[:, 3:])


def covered_us(track: Track, frame_times_us: Mapping[str, NDArray[np.int64]], *, where: str) -> tuple[int, int]:
    """First and last instant (us) that the poses and every camera cover. Raises `BadClipError` (`time_order`)."""
    for camera, stamps in frame_times_us.items():
        check_timestamps(stamps, what=f"{where}: {camera}: frame timestamps")
    clocks = (track.timestamps_us, *frame_times_us.values())
    return max(int(stamps[0]) for stamps in clocks), min(int(stamps[-1]) for stamps in clocks)


def wanted_frame_times_us(t0_us: int, frames: int) -> NDArray[np.int64]:
    """`[frames]` instants that the frames of each camera are to show, 0.1 s apart, the last one t0."""
    return t0_us - FRAME_STEP_US * np.arange(frames - 1, -1, -1, dtype=np.int64)


def read_lenses(text: bytes | str, *, where: str) -> dict[str, Any]:
    """The calibration in a JSON text: an object for each camera. Raises `BadClipError`, which begins with `where`."""
    try:
        lenses = strict_json.loads(text)
    except ValueError as error:
        reason = lfs_pointer(text) or str(error)
        raise BadClipError("wrong_shape", f"{where} is not readable JSON ({reason}).") from error
    if not isinstance(lenses, dict) or not all(isinstance(lens, dict) for lens in lenses.values()):
        raise BadClipError("wrong_shape", f"{where} must hold an object, and in it one for each camera.")
    return lenses


def text_at(stamps: NDArray[np.int64], texts: Any, time_us: int, *, where: str) -> str | None:
    """The text that holds at a time: the last one that is not null in rows up to it; None before the first.

    `texts` is an Arrow column beside the timestamps (us). Raises `BadClipError`: `time_order` for unsorted ones,
    `bad_route` for bytes that are no UTF-8.
    """
    if len(stamps) > 1:
        check_timestamps(stamps, what=f"{where}: timestamps")
    so_far = texts.slice(0, int(np.searchsorted(stamps, time_us, side="right"))).drop_null()
    try:
        text: str | None = so_far[len(so_far) - 1].as_py() if len(so_far) else None
    except UnicodeDecodeError as error:
        raise BadClipError("bad_route", f"{where}: a text is no UTF-8; write it again.") from error
    return text


def sample_of(
    ref: SampleRef,
    poses: EgoPoses,
    shots: Mapping[str, Shot],
    calibration: Mapping[str, Any] | None,
    *,
    together: NDArray[np.uint8] | None = None,
) -> Sample:
    """A sample of these cameras, given in index order; the frames of a single one are not copied.

    `together`: the frames of all, `[cameras, frames, 3, H, W]`, where they lie so already.

    Raises `BadClipError` (`wrong_shape`) for cameras of different sizes.
    """
    images = [frames for frames, _ in shots.values()]
    if len({frames.shape for frames in images}) > 1:
        sizes = ", ".join(f"{camera} {frames.shape[-2:]}" for camera, (frames, _) in shots.items())
        raise BadClipError("wrong_shape", f"{ref.clip_id}: cameras of different sizes (height, width): {sizes}.")
    if together is None:
        together = np.stack(images) if len(images) > 1 else images[0][None]
    return Sample(
        ref=ref,
        cameras=tuple(shots),
        frames=together,
        frame_timestamps_us=np.stack([stamps for _, stamps in shots.values()]),
        calibration={camera: lens for camera, lens in (calibration or {}).items() if camera in shots} or None,
        **poses._asdict(),
    )
