"""Where samples come from: a folder, PhysicalAI-AV, a prepared dataset, generated drives.

`open_source` turns what a user writes on the command line into a `Source`; each kind is one module, loaded on demand.
"""

from collections.abc import Sequence
from pathlib import Path

from alpacache.driving.sample import FRONT_CAMERA
from alpacache.errors import DataError, UsageError
from alpacache.sources.source import Source

KINDS = "folder:DIR, synthetic:N, pai, pai:DIR, hf:REPO-OR-PATH, or a directory that `alpacache prepare` wrote"


def open_source(spec: str, *, cameras: Sequence[str] | None = None) -> Source:
    """Open the source that `spec` names.

    `cameras` are those a run will load; they bound the times that a clip covers. Raises `UsageError` for a spec of no
    known kind, `SourceError` for a source that cannot be read.
    """
    kind, _, place = spec.partition(":")
    if kind == "folder" and place:
        from alpacache.sources.folder import FolderSource

        return FolderSource(place, cameras=cameras)
    if kind == "synthetic":
        from alpacache.sources.synthetic import SyntheticSource

        return SyntheticSource(_count(spec, place), cameras=cameras or (FRONT_CAMERA,))
    if kind == "pai" and (place or spec == "pai"):
        from alpacache.sources.pai import open_hub, open_tree

        return open_tree(place, cameras=cameras) if place else open_hub(cameras=cameras)
    if kind == "hf" and place:
        from alpacache.sources.prepared import open_prepared

        return open_prepared(place)
    return _open_directory(spec)


def is_streamed(spec: str) -> bool:
    """Whether its samples come through the network."""
    kind, _, place = spec.partition(":")
    return spec == "pai" or (kind == "hf" and not Path(place).exists())


def check_still_there(spec: str, *, cameras: Sequence[str], kept: str) -> None:
    """Tell a bad clip from a source that has gone: only the first is the clip's fault.

    Raises `DataError` in the second case; `kept` says there what was done so far and what to do next.
    """
    if is_streamed(spec):
        return  # its reader tells the two apart
    try:
        open_source(spec, cameras=cameras)
    except (UsageError, OSError) as error:
        raise DataError(f"{spec} was there when the run began and is not any more ({error}) {kept}") from error


def _open_directory(spec: str) -> Source:
    directory = Path(spec)
    if (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file():
        from alpacache.sources.prepared import open_prepared

        return open_prepared(spec)
    if (directory / "dataset.json").is_file():
        raise UsageError(f"{spec} looks like a folder of recordings; write folder:{spec}.")
    if (directory / "features.csv").is_file():
        raise UsageError(f"{spec} looks like a PhysicalAI-AV tree; write pai:{spec}.")
    raise UsageError(f"{spec!r} is no data source; expected {KINDS}.")


def _count(spec: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{spec!r}: expected synthetic:N with a number of clips, as in synthetic:200.")
    return int(text)
