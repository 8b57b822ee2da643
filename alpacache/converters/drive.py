"""Drives, which each kind of converter makes of a log: values in the folder layout's own units and axes.

Times are int64 microseconds on one clock for all of a drive. Positions are metres in a frame that is level, z up, and
right-handed; quaternions have their scalar last and lead from the point's own axes (x forward, y left, z up) to that
frame. Pictures are read again and again, in pieces and only when they are written, so a drive of hours costs no memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.config import Mount, Triple
from alpacache.driving.poses import Track

Point: TypeAlias = Literal["rear axle", "actor", "imu", "camera", "antenna"]
"""Point of the vehicle that a pose places. The model's frame is the middle of the rear axle on the ground."""
ZERO: Triple = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Something that is in the log and not in the folder."""

    what: str
    """Name of what is counted, such as `poses`, `front_wide frames`, `drives`."""
    count: int
    reason: str
    """Why, in words that follow "because" or name what was found, with the first place where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Frames that are JPEG or PNG files in the log; they are written byte for byte."""

    times_us: NDArray[np.int64]
    """`[N]`, increasing."""
    read: Callable[[int, int], Iterator[bytes]]
    """Files of the frames from one number up to, and without, another; called once for each clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """Frames without a file format, RGB uint8 `[H, W, 3]`, of one size; they are encoded as JPEG."""

    times_us: NDArray[np.int64]
    read: Callable[[int, int], Iterator[NDArray[np.uint8]]]
    """Frames from one number up to, and without, another, as `Pictures.read` gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """Frames of a video file or raw stream; its packets are written as they are, in a container with their times."""

    path: Path
    times_us: NDArray[np.int64]
    """`[N]` times of the frames `first` to `first + N - 1`, in the order in which they are shown."""
    first: int = 0
    """Number of the film's frame that `times_us` begins with: films may hold several drives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packets:
    """Frames of a video whose encoded packets lie in the log one by one, none predicted from a later one."""

    times_us: NDArray[np.int64]
    codec: Literal["h264", "hevc", "vp9", "av1"]
    read: Callable[[], Iterator[bytes]]
    """All packets in order, of H.264 and HEVC in Annex B form. The first is a key frame."""


Camera: TypeAlias = Pictures | Arrays | Film | Packets


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedDrive:
    """One recording, from which one or more clips are cut."""

    name: str
    """Name of the clip. Made a plain file name by the writer; no two drives of an input have the same."""
    cameras: Mapping[str, Camera]
    """Cameras by their full names, as in `alpacache.driving.cameras`. Without any, the poses are written alone."""
    track: Track
    point: Point
    """Point that the poses place."""
    origin_offset_m: Triple = ZERO
    """Preset of the kind: where the middle of the rear axle is on the ground, seen from `point`, in the vehicle's axes
    (forward, left, up). The command's `--origin-offset` takes its place."""
    mount_deg: Mount = ZERO
    """How the axes of `point` are turned as seen from the vehicle: yaw (left), pitch (nose down), roll (right side
    down), about z, then the new y, then the new x. `estimate`: yaw and pitch are found on straights."""
    routes: Sequence[tuple[int, str]] = ()
    """Times (us), increasing, and the navigation text that holds from then on; an empty text ends a route."""
    calibration: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Camera -> its lens, as it is written to `calibration.json`."""
    dropped: Sequence[Dropped] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the record says of where the values come from: topics or columns, frames, axes, units, clock, projection."""
    told: Sequence[str] = ()
    """Keys of the facts that the report tells too, such as how well the poses are known."""


def increasing(times_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices that put rows in the order of time; of rows of one time the first alone."""
    order = np.argsort(times_us, kind="stable")
    is_new = np.diff(times_us[order], prepend=np.int64(-1) - np.abs(times_us).max(initial=0)) > 0
    return order[is_new]
