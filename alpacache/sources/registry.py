"""The kinds of sources, and `open_source`, which turns what a user writes on the command line into a `Source`."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from alpacache.errors import DataError, UsageError
from alpacache.sources import folder, pai, prepared, synthetic
from alpacache.sources.source import Source, SourceKind

KINDS: dict[str, SourceKind] = {kind.prefix: kind for kind in (folder.KIND, synthetic.KIND, pai.KIND, prepared.KIND)}
"""Every kind of source. Modules load what is heavy when a source of theirs is opened."""


def open_source(spec: str, *, cameras: Sequence[str] | None = None) -> Source:
    """Open the source that `spec` names.

    `cameras` are those a run will load; they bound the times that a clip covers. Raises `UsageError` for a spec of no
    known kind, `SourceError` for a source that cannot be read.
    """
    kind, place = _parse(spec)
    return kind.open(place, cameras)


def check_reach(spec: str) -> None:
    """Raise `SourceError` for a source on the hub while that is out of reach; opens nothing and takes no time."""
    kind, place = _parse(spec)
    kind.check_reach(place)


def is_streamed(spec: str) -> bool:
    """Tell whether the samples of this source come through the network."""
    kind, place = _parse(spec)
    return kind.is_streamed(place)


def check_still_there(spec: str, *, kept: str) -> None:
    """Tell a bad clip from a source that has gone: only the first is the clip's fault.

    Opens one small file, so it may be called for every bad clip. Raises `DataError` if the source has gone; `kept`
    ends its message: what was done so far and what to do next.
    """
    try:
        kind, place = _parse(spec)
        marker = kind.marker(place)
        if marker is not None:
            with marker.open("rb") as file:
                file.read(1)
    except (UsageError, OSError) as error:
        raise DataError(f"{spec} was there when the run began and is not any more ({error}). {kept}") from error


def _parse(spec: str) -> tuple[SourceKind, str]:
    """The kind of a source and what follows its colon, if anything. A prepared directory needs no prefix."""
    prefix, _, place = spec.partition(":")
    kind = KINDS.get(prefix)
    if kind is not None and (place or spec in kind.usage):
        return kind, place
    if prepared.is_saved(Path(spec)):
        return prepared.KIND, spec
    for kind in KINDS.values():
        marker = kind.marker(spec)
        if marker is not None and marker.is_file():
            raise UsageError(f"{spec} is a directory that {kind.usage[-1]} reads; write {kind.prefix}:{spec}.")
    if near := difflib.get_close_matches(prefix, KINDS, n=1) if place else ():
        raise UsageError(f"{spec!r} is no data source. Did you mean {near[0]}:{place}?")
    usage = ", ".join(form for kind in KINDS.values() for form in kind.usage)
    raise UsageError(f"{spec!r} is no data source; expected {usage}, or a directory that `alpacache prepare` wrote.")
