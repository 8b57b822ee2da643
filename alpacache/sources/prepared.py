"""Prepared samples: a Hugging Face `datasets` directory with one self-contained row a sample.

`prepare` reads a source once, so that later runs, or other machines, need neither the recordings nor the devkit.
Pictures are PNG, so a sample read back equals the one written bit for bit, unless they were asked for at the size of a
model's processor. Work goes to `OUT.partial/` in small shards, each complete or absent, and becomes `OUT` in one
rename: an interrupted run goes on where it stopped. A shard counts only once it is on the medium, and one process at
a time works there.

A directory to read may come from a stranger: its data files must lie in it, and no column but ours is looked at.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from alpacache.driving.poses import EgoPoses
from alpacache.driving.sample import (
    FUTURE_STEPS,
    HISTORY_STEPS,
    STEP_US,
    Sample,
    SampleRef,
    sort_cameras,
)
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.sources.pai_cache import connection_errors
from alpacache.sources.prepared_rows import (
    NEEDED,
    POSES,
    check_columns,
    from_row,
    poses_of,
)
from alpacache.sources.prepared_stream import StreamedRows, undecoded

_SPLIT = re.compile(r"\w[\w.-]*")
Decoded = TypeVar("Decoded")


class Rows(Protocol):
    """Rows of a prepared dataset, in memory, on disk or streamed."""

    ids: Sequence[str]

    def row(self, number: int) -> dict[str, Any]:
        """All of a row."""

    def poses(self, number: int) -> dict[str, Any]:
        """Its poses, without its pictures."""


class PreparedSource:
    """Samples that `prepare` wrote. Their moments are fixed; cameras and frames may be fewer than were prepared."""

    def __init__(self, rows: Rows, *, name: str) -> None:
        """Use `open_prepared`."""
        self.name, self._rows = name, rows
        self._row_of = {sample_id: number for number, sample_id in enumerate(rows.ids)}
        self.sample_refs: Sequence[SampleRef] = [SampleRef.parse(sample_id) for sample_id in rows.ids]
        self.clip_ids: Sequence[str] = list(dict.fromkeys(ref.clip_id for ref in self.sample_refs))

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant of the clip's prepared samples."""
        times = [ref.t0_us for ref in self.sample_refs if ref.clip_id == clip_id]
        if not times:
            raise BadClipError("missing_clip", f"{clip_id}: not in {self.name}.")
        return min(times) - (HISTORY_STEPS - 1) * STEP_US, max(times) + FUTURE_STEPS * STEP_US

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Decode one row; raises `BadClipError` for one that is absent, damaged or lacks a camera."""
        names = sort_cameras(cameras)
        return self._read(ref, self._rows.row, lambda row: from_row(ref, row, names, frames))

    def poses(self, ref: SampleRef) -> EgoPoses:
        """History and future without the pictures; raises `BadClipError`."""
        return self._read(ref, self._rows.poses, poses_of)

    def _read(
        self, ref: SampleRef, get: Callable[[int], dict[str, Any]], decode: Callable[[dict[str, Any]], Decoded]
    ) -> Decoded:
        where = ref.sample_id
        if where not in self._row_of:
            raise BadClipError("missing_clip", f"{where}: not in {self.name}; a prepared dataset has fixed moments.")
        row = get(self._row_of[where])
        try:
            return decode(row)
        except (BadClipError, UsageError):
            raise
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise BadClipError("wrong_shape", f"{where}: the row in {self.name} is damaged ({error}).") from error


def open_prepared(place: str) -> PreparedSource:
    """A directory that `prepare` wrote, or parquet files with its columns: a hub repository, or a directory laid out
    like one. The latter two are streamed. No code of a dataset is ever run.

    Raises `SourceError` with what to do.
    """
    import datasets

    directory = Path(place)
    name = f"hf:{directory.resolve().name if directory.is_dir() else place}"
    unreadable = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError)
    failures = (*unreadable, datasets.exceptions.DatasetsError, *connection_errors())
    try:
        if directory.is_dir() and _is_saved(directory):
            return PreparedSource(_SavedRows(directory, name), name=name)
        return PreparedSource(StreamedRows(place), name=name)
    except SourceError:
        raise
    except failures as error:
        raise SourceError(f"hf:{place} cannot be read ({_first_line(error)}){_remedy(place, error)}") from error


def _is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` made it, of one split or of several."""
    return (directory / "state.json").is_file() or (directory / "dataset_dict.json").is_file()


class _SavedRows:
    """Rows of a directory that `prepare` or `save_to_disk` wrote; they stay on disk."""

    def __init__(self, directory: Path, name: str) -> None:
        import datasets

        _refuse_outside_files(directory)
        dataset = datasets.load_from_disk(str(directory))
        if isinstance(dataset, dict):
            dataset = datasets.concatenate_datasets(list(dataset.values()))
        check_columns(dataset.column_names, name)
        self._rows = undecoded(dataset.with_format(None).select_columns(list(NEEDED)), name)
        self._poses = self._rows.select_columns(list(POSES))
        self.ids: Sequence[str] = list(self._rows["sample_id"])

    def row(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self._rows[number]
        return found

    def poses(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self._poses[number]
        return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _remedy(place: str, error: Exception) -> str:
    """What to do, as the rest of a sentence."""
    import huggingface_hub

    if Path(place).is_dir():
        return "; expected a directory that `alpacache prepare` wrote, or parquet files with the same columns."
    fetch = f"hf download {place} --repo-type dataset --local-dir DIR"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"; HF_HUB_OFFLINE is set: unset it, or fetch it where there is a network: {fetch}, then read hf:DIR."
    if place.startswith((".", "/")) or place.count("/") != 1:
        return "; there is no such directory, and a hub repository is named OWNER/NAME."
    return (
        f"; see that the name is right and the hub can be reached. If it is private or gated, accept its terms on its "
        f"page and run: hf auth login. To fetch all of it: {fetch}, then read hf:DIR."
    )


def _refuse_outside_files(directory: Path) -> None:
    """Data files are named in the `state.json` of a dataset or of each split; those we read lie in its directory."""
    index = directory / "dataset_dict.json"
    for split in json.loads(index.read_text())["splits"] if index.is_file() else ():
        if not isinstance(split, str) or not _SPLIT.fullmatch(split):
            raise SourceError(f"{index} names a split {split!r}; expected a plain name such as 'train'.")
    for state in (*directory.glob("state.json"), *directory.glob("*/state.json")):
        for entry in json.loads(state.read_text())["_data_files"]:
            if not (state.parent / entry["filename"]).resolve().is_relative_to(directory.resolve()):
                raise SourceError(f"{state} names a file outside its directory: {entry['filename']!r}.")
