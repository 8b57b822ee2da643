"""What a data source promises: the protocols that `select`, `extract` and `check` are written against."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.poses import EgoPoses, Track
from alpacache.driving.sample import Sample, SampleRef


class Source(Protocol):
    """A set of clips. `load` may be called from several threads; it raises `BadClipError` for a clip it cannot use."""

    @property
    def name(self) -> str:
        """What the provenance record calls it."""

    @property
    def clip_ids(self) -> Sequence[str]:
        """All clips, in a fixed order."""

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant (us) that poses and the wanted cameras both cover."""

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Read one sample; `cameras` are sorted by index, `frames` is images a camera, 0.1 s apart, ending at t0."""


@runtime_checkable
class EventSource(Protocol):
    """A source that knows moments worth a sample, for `t0="events"`."""

    def event_times_us(self, clip_id: str) -> Sequence[int]:
        """Their times, on the clip's clock."""


@runtime_checkable
class FixedSource(Protocol):
    """A source whose samples were chosen before: a prepared dataset."""

    sample_refs: Sequence[SampleRef]


@runtime_checkable
class GroupedSource(Protocol):
    """A source that fetches clips in groups, such as the chunks of a hub: a random choice takes group after group."""

    def group_of(self, clip_id: str) -> str:
        """The group's name."""


@runtime_checkable
class PosedSource(Protocol):
    """A source that gives a sample's poses without its pictures."""

    def poses(self, ref: SampleRef) -> EgoPoses:
        """History and future in the ego frame at t0."""


@runtime_checkable
class RecordedSource(Protocol):
    """A source that has whole recordings, not only samples."""

    def track(self, clip_id: str) -> Track:
        """All poses of a clip, unchecked."""

    def frame_times_us(self, clip_id: str, camera: str) -> NDArray[np.int64]:
        """When each frame of a camera was recorded, unchecked."""

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        """`[len(times_us), 3, H, W]`: the frame at or before each time."""
