"""What a data source promises: the protocols that `select`, `extract` and `check` are written against."""

from collections.abc import Sequence
from typing import Protocol

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
