"""The kinds of recordings, and what turns an input into drives."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alpacache.converters import carla, comma2k19, gps, kitti, lerobot, nuscenes, ros, udacity
from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.converters.kind import Kind, Listing
from alpacache.errors import SourceError, UsageError
from alpacache.hub import MODEL_ID

_ALL: tuple[Kind, ...] = (
    ros.MCAP,
    ros.ROSBAG,
    carla.KIND,
    kitti.KIND,
    comma2k19.KIND,
    udacity.KIND,
    gps.KIND,
    lerobot.KIND,
    nuscenes.KIND,
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""Every kind. Modules load what is heavy when an input of theirs is read."""


def kind_named(name: str) -> Kind:
    """Find the kind of this name. Raises `UsageError` for any other."""
    if name not in KINDS:
        raise UsageError(f"{name!r} is no kind of recording; known: {', '.join(KINDS)}.")
    return KINDS[name]


def open_drives(kind: Kind, place: Path, options: Mapping[str, Any]) -> Iterator[LoggedDrive | Dropped]:
    """Drives of an input. `options` are settings that were given; raises `UsageError` for those the kind has not."""
    _check_there(kind, place)
    if unknown := [name for name in options if name not in kind.takes]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        takes = ", ".join(f"--{name.replace('_', '-')}" for name in kind.takes) or "none of its own"
        raise UsageError(f"{named} is not for {kind.name}; its options: {takes}. Leave it out.")
    return _in_bounds(kind.drives(place, **options), place)


def _in_bounds(drives: Iterator[LoggedDrive | Dropped], place: Path) -> Iterator[LoggedDrive | Dropped]:
    """Yield the drives; a number that no time or size can be is a `SourceError`, whichever file it stands in."""
    try:
        yield from drives
    except OverflowError as error:
        raise SourceError(f"{place} holds a number beyond what times can be ({error}); leave that row out.") from error


def check_apart(place: Path, out: Path) -> None:
    """Refuse to write into the input: the next reading of it would find what was written. Raises `UsageError`."""
    if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
        raise UsageError(f"--out {out} lies in the input {place}; choose a folder outside of it.")


def list_input(kind: Kind, place: Path) -> Listing:
    """Listing for `--list`. Raises `UsageError` for a kind that has nothing to choose from."""
    _check_there(kind, place)
    if kind.list_input is None:
        raise UsageError(f"--list is not for {kind.name}, in which there is nothing to choose; leave it out.")
    return kind.list_input(place)


def _check_there(kind: Kind, place: Path) -> None:
    if not place.exists() and not (kind.hub and MODEL_ID.fullmatch(str(place))):
        raise UsageError(f"{place} does not exist; expected {kind.reads}.")
    kind.check_libraries()
