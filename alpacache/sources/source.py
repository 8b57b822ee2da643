"""Protocols of a data source, which selection, extraction and checks are written against. Start reading here.

    spec (`folder:DIR`)  --open_source-->  Source  --select-->  SampleRefs  --Source.load-->  Samples

A source is any object with the members of `Source`. It has more to offer where it also fits one of the other protocols
below, which callers ask for with `isinstance`.

Times are int64 microseconds on the clip's own clock. Poses, frames and rotations mean what `alpacache.driving` says.
How to add a source: docs/how-to/add-a-source.md.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.poses import EgoPoses, Track
from alpacache.driving.sample import Sample, SampleRef


class Source(Protocol):
    """A set of clips that samples are cut from. Every method may be called from several threads at once.

    Methods that take a clip or a sample raise `BadClipError` where that one cannot be used: the run quarantines it and
    goes on. `OSError` and `DataError` mean that the source itself failed, and end the run.
    """

    @property
    def name(self) -> str:
        """Name of this source in records; the same data has the same name on every machine."""

    @property
    def clip_ids(self) -> Sequence[str]:
        """All clips, in an order that is the same at every opening."""

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant (us) that both the poses and the cameras of the run cover; `select` places t0 there.

        The cameras are those that `open_source` was given. One that the clip lacks is left to `load` to refuse.
        """

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Read one sample: its pictures as they are (`ref.view` is 0), and its poses in the ego frame at t0.

        `cameras` are full names in any order, `frames` counts images of each camera, 0.1 s apart, the last one the
        newest that is not after t0. All pictures of a sample have one size.
        """


@runtime_checkable
class OnePassSource(Protocol):
    """A source that reads samples of one clip faster together than each alone, for extraction."""

    def one_pass(
        self, refs: Sequence[SampleRef], *, cameras: Sequence[str], frames: int
    ) -> AbstractContextManager[Callable[[SampleRef], Sample]]:
        """A function that loads these samples of one clip, all of view 0 and in the order of their times.

        To be called for each in that order from one thread; any may be left out. It gives and raises what `load` does,
        whatever the other samples are. Frames of one camera with one timestamp are one picture in all of them.
        """


@runtime_checkable
class RecordedSource(Protocol):
    """A source of whole recordings, for `check` and quotas; nothing here is checked before it is returned."""

    def track(self, clip_id: str) -> Track:
        """All poses of a clip, vehicle to world."""

    def frame_times_us(self, clip_id: str, camera: str) -> NDArray[np.int64]:
        """`[N]` the time (us) of each frame of a camera. `BadClipError` (`missing_camera`) if the clip lacks it."""

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        """RGB frames `[len(times_us), 3, H, W]`: for each time (us) the frame at or before it."""


@runtime_checkable
class GlancedSource(Protocol):
    """A recorded source that reads pictures faster if they may be small, for `check`."""

    def glance(self, clip_id: str, camera: str, times_us: NDArray[np.int64], *, about_px: int) -> NDArray[np.uint8]:
        """Frames as `RecordedSource.film` gives them, or smaller ones of at least about so many pixels across."""


@runtime_checkable
class FixedSource(Protocol):
    """A source whose samples are fixed, such as a prepared dataset; `select` looks for no moments of its own."""

    sample_refs: Sequence[SampleRef]
    """All samples, in the order in which they are read fastest."""

    def poses(self, ref: SampleRef) -> EgoPoses:
        """History and future of a sample without its pictures, in the ego frame at t0; quotas judge by them."""

    def expect(self, refs: Sequence[SampleRef]) -> None:
        """Take note of what will be loaded, in about this order and each entry once: a stream keeps no other rows.

        The views of a moment are one entry: they are made of what was loaded once.
        """


@runtime_checkable
class EventSource(Protocol):
    """A source that knows moments worth a sample, for `--t0 events`."""

    def event_times_us(self, clip_id: str) -> Sequence[int]:
        """Times (us) to take as t0, in any order; those too near an end of the recording are left out by `select`."""


@runtime_checkable
class RoutedSource(Protocol):
    """A source that knows navigation texts, for `--route source`."""

    @property
    def gives_routes(self) -> bool:
        """False if no sample of it has a route."""

    def route_of(self, sample: Sample) -> Any:
        """The route of a sample that `load` gave, unchecked; None if it has none.

        Raises `BadClipError` where it cannot be read.
        """


@runtime_checkable
class TimedRoutesSource(RoutedSource, Protocol):
    """A source whose texts hold from a time on, for `check`."""

    def route_times_us(self, clip_id: str) -> NDArray[np.int64]:
        """Times (us) of a clip from which on a text holds, in their order; `BadClipError` where they cannot be read."""


@runtime_checkable
class GroupedSource(Protocol):
    """A source that fetches clips in groups, such as the archives of a hub; a random choice takes group by group."""

    def group_of(self, clip_id: str) -> str:
        """Name of the group."""


@runtime_checkable
class ChangedSource(Protocol):
    """A source that knows whether its pictures were changed since a camera took them."""

    @property
    def changes(self) -> Sequence[str]:
        """Changes made to every picture, in this order, such as `crop`; empty if they are as they were recorded."""


def picture_changes(source: Source) -> tuple[str, ...]:
    """Changes made to a source's pictures; empty where it names none."""
    return tuple(source.changes) if isinstance(source, ChangedSource) else ()


MOST_CHANGES, LONGEST_CHANGE = 8, 80


def as_changes(value: Any) -> tuple[str, ...]:
    """Changes as a stranger's record names them. Raises `ValueError` for what is no list of a few short texts."""
    texts = tuple(value) if isinstance(value, list) else (None,)
    if len(texts) > MOST_CHANGES or not all(
        isinstance(text, str) and text.isprintable() and 0 < len(text) <= LONGEST_CHANGE for text in texts
    ):
        raise ValueError('a list of a few words, such as ["undistort", "crop"]')
    return texts


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceKind:
    """A kind of source, as `open_source` knows it. The module of each kind ends in one."""

    prefix: str
    """Text before the colon of a spec: `folder` in `folder:DIR`."""
    usage: tuple[str, ...]
    """The forms of its specs, for messages: `folder:DIR`."""
    open: Callable[[str, Sequence[str] | None], Source]
    """Opens what follows the colon, for these cameras (None: the source's default). Raises `UsageError` for a text
    that makes no sense, `SourceError` for a source that cannot be read."""
    check_reach: Callable[[str], None] = lambda place: None
    """Raises `SourceError` for a source on the hub while that is out of reach; `open` does, too."""
    is_streamed: Callable[[str], bool] = lambda place: False
    """True if samples come through the network, so that processes should share one reader."""
    marker: Callable[[str], Path | None] = lambda place: None
    """A file that is there as long as the source is. None if it is generated, or if its own reader tells a bad clip
    from a source that has gone."""
