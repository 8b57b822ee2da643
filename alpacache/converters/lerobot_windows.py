"""Windows of drives, of which each moment is taken once.

Episodes of L2D are windows of 30 s that overlap by nine tenths: nine frames of ten would be copies, and the split by
clip would put copies on both sides. So few windows that hold each moment are taken, of each what the one before has
not, and all of a drive get names that fall on one side of the split.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.lerobot_meta import Episode
from alpacache.driving.sample import Floats, split_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Span of time in which an episode's rows were recorded."""

    episode: Episode
    times_us: NDArray[np.int64]
    stamps_s: Floats
    """`[N]` their nominal times."""
    session: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of an episode that are not in one before."""

    episode: Episode
    first: int
    times_us: NDArray[np.int64]
    stamps_s: Floats
    """`[N]` nominal times of all rows of the episode."""
    drive: str


def each_moment_once(windows: Sequence[Window], name: str, *, recorded: bool) -> list[Rows]:
    """Parts of windows by drive and time, none of which overlaps another of its drive; `name` begins their names.

    Times that are not `recorded` but nominal begin anew in each window, which is then a drive of its own.
    """
    stem = re.sub(r"[^\w.-]+", "_", name)
    drives = _drives_of(windows) if recorded else [[window] for window in windows]
    parts = [part for drive in drives for part in _cover(drive, f"{stem}-{drive[0].episode.index:06d}")]
    return _named_by_side(parts)


def _cover(windows: Sequence[Window], drive: str) -> Iterator[Rows]:
    """Choose few of the windows by time so that each moment that any holds is held once, by the earliest."""
    end_us, left = -(2**62), list(windows)
    while left:
        reaching = [window for window in left if window.times_us[0] <= end_us]
        best = max(reaching, key=lambda window: int(window.times_us[-1])) if reaching else left[0]
        first = int(np.searchsorted(best.times_us, end_us, side="right"))
        yield Rows(
            episode=best.episode,
            first=first,
            times_us=best.times_us[first:],
            stamps_s=best.stamps_s,
            drive=drive,
        )
        end_us = int(best.times_us[-1])
        left = [window for window in left if window.times_us[-1] > end_us]


def _named_by_side(rows: Sequence[Rows]) -> list[Rows]:
    """Name the clips so that all of a drive fall on the side of the split on which its own name does."""
    of_drive, numbers = Counter(part.drive for part in rows), Counter[str]()
    named = []
    for part in rows:
        stem = part.drive if of_drive[part.drive] == 1 else f"{part.drive}-{numbers[part.drive]:03d}"
        numbers[part.drive] += 1
        endings = ["", *(f"-{ending}" for ending in range(1000))]
        name = next(stem + end for end in endings if split_of(stem + end) == split_of(part.drive))
        named.append(replace(part, drive=name))
    return named


def _drives_of(windows: Sequence[Window]) -> list[list[Window]]:
    """Windows of each drive, by time: those of one session, or those that share moments, to the microsecond."""
    if not windows:
        return []
    parent = list(range(len(windows)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    sessions: dict[str, int] = {}
    for number, window in enumerate(windows):
        if window.session is not None:
            parent[root(number)] = root(sessions.setdefault(window.session, number))
    stamps = np.concatenate([window.times_us for window in windows])
    owners = np.repeat(np.arange(len(windows)), [len(window.times_us) for window in windows])
    order = np.argsort(stamps, kind="stable")
    same = np.flatnonzero(np.diff(stamps[order]) == 0)
    pairs = np.unique(np.stack([owners[order[same]], owners[order[same + 1]]], axis=1), axis=0)
    for one, other in pairs.tolist():
        if windows[one].session == windows[other].session:  # two vehicles can have one moment in common
            parent[root(other)] = root(one)
    drives: dict[int, list[Window]] = {}
    for number, window in enumerate(windows):
        drives.setdefault(root(number), []).append(window)
    return [sorted(drive, key=lambda window: int(window.times_us[0])) for drive in drives.values()]
