"""A sample: one recording at one t0, with one camera set and one view, in the ego frame at t0.

Everything downstream (the VLM, the store, training, evaluation) sees recordings only through these records.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import UsageError
from cache_store.format.names import MAX_ID_BYTES

Floats: TypeAlias = NDArray[np.float64]
LabelRule: TypeAlias = Literal["guarded", "unguarded"]
"""How labels are made of a path. `guarded`: curvature is clamped, and 0 where the car all but stands, as in the public
code since August 2026; `unguarded`: as solved, as in the public code before."""

HISTORY_STEPS = 16
"""Poses of the ego history; the last one is at t0."""
FUTURE_STEPS = 64
"""Poses of the ego future, the first one a step after t0, and waypoints of an action."""
STEP_US = 100_000
"""Time between two poses: 10 Hz."""
FRAME_STEP_US = 100_000
"""Time between two frames of a camera."""
DT_S = STEP_US / 1e6
FUTURE_S = FUTURE_STEPS * DT_S
"""6.4 s: how far a path reaches."""
DEFAULT_T0_US = 5_100_000
"""t0 of the public loader, on the clip's clock."""

_ID = re.compile(r"(?P<clip>[^\0\n\ud800-\udfff]+)@(?P<t0>[0-9]+)#(?P<view>[0-9]+)")
"""Clip ids that a store can hold: its text fields take no NUL, its ids are valid Unicode."""
_T0_LIMIT_US, _VIEW_LIMIT = 2**62, 2**31
"""Well below int64, which must also hold the instants around t0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRef:
    """Names a sample before any byte of it is read."""

    clip_id: str
    t0_us: int
    view: int = 0
    """0 is the image as it is; higher numbers are seeded augmentations."""

    @property
    def sample_id(self) -> str:
        return f"{self.clip_id}@{self.t0_us}#{self.view}"

    @classmethod
    def parse(cls, sample_id: str) -> "SampleRef":
        """Parse a sample id that a store can hold (`cache_store.format.names`). Raises `UsageError` for other text."""
        match, shown = _ID.fullmatch(sample_id), repr(sample_id[:120]) + "..." * (len(sample_id) > 120)
        if match is None:
            raise UsageError(f"{shown} is not a sample id; expected CLIP@T0_US#VIEW in one line: 'clip-7@5100000#0'.")
        if (size := len(sample_id.encode())) > MAX_ID_BYTES:
            raise UsageError(f"sample id {shown} takes {size} bytes; the limit is {MAX_ID_BYTES}. Rename its clip.")
        ref = cls(clip_id=match["clip"], t0_us=int(match["t0"]), view=int(match["view"]))
        if ref.t0_us >= _T0_LIMIT_US or ref.view >= _VIEW_LIMIT:
            raise UsageError(f"sample id {shown}: expected a t0 below 2**62 (in microseconds) and a view below 2**31.")
        return ref


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample, ready for the VLM. Poses are metres in the ego frame at t0 (x forward, y left), float32."""

    ref: SampleRef
    cameras: tuple[str, ...]
    """Camera names, sorted by camera index."""
    frames: NDArray[np.uint8]
    """`[cameras, frames, 3, H, W]` RGB, the last at or before t0; may be a view of an array with its colours last."""
    frame_timestamps_us: NDArray[np.int64]
    """`[cameras, frames]` when each frame was recorded (us)."""
    history_xyz: NDArray[np.float32]
    """`[16, 3]`, 10 Hz, the last one at t0."""
    history_rot: NDArray[np.float32]
    """`[16, 3, 3]` vehicle-to-ego-frame rotations."""
    future_xyz: NDArray[np.float32]
    """`[64, 3]`, 10 Hz, t0 + 0.1 s to t0 + 6.4 s."""
    future_rot: NDArray[np.float32]
    """`[64, 3, 3]`."""
    blank: tuple[str, ...] = ()
    """The `cameras` that recorded nothing: black pictures keep their places."""
    calibration: dict[str, Any] | None = None
    """For each camera what the source knows of its projection; JSON-serialisable."""
    jitter: dict[str, float] | None = None
    """Augmentation of the pictures of a view above 0 (`views.Jitter`)."""
    route: str | None = None
    """Navigation text for the prompt. As a source gives it, it is unchecked; see `route.check_route`."""


def split_of(clip_id: str) -> Literal["train", "val"]:
    """Split by md5 of the clip id, 90 % train and 10 % val, so that all t0s of a clip fall on one side."""
    return "train" if int(hashlib.md5(clip_id.encode(), usedforsecurity=False).hexdigest(), 16) % 100 < 90 else "val"
