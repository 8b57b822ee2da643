"""`hf:REPO-OR-PATH` and prepared directories: Hugging Face datasets with one self-contained row a sample.

`prepare` (see `prepared_writer`) reads a source once, so that later runs, or other machines, need neither the
recordings nor the devkit. A dataset may come from a stranger: its data files must lie in it, no column but ours is
looked at, and no code of it is ever run.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from alpacache.driving.cameras import sort_cameras
from alpacache.driving.poses import EgoPoses
from alpacache.driving.sample import FUTURE_STEPS, HISTORY_STEPS, STEP_US, Sample, SampleRef
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.hub import why_unreachable
from alpacache.regular_file import regular_size
from alpacache.sources.folder import is_plain_name
from alpacache.sources.prepared_rows import (
    CHANGES,
    NEEDED,
    POSES,
    ROUTE,
    T0,
    changes_in,
    check_columns,
    from_row,
    sound_poses,
)
from alpacache.sources.prepared_stream import StreamedRows, undecoded
from alpacache.sources.retry import connection_errors, first_line
from alpacache.sources.source import SourceKind

_SAVED = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` writes beside the rows of one split, or of several."""
Decoded = TypeVar("Decoded")


class PreparedSource:
    """Samples that `prepare` wrote. Their moments are fixed; fewer cameras or frames than were prepared may be read."""

    def __init__(self, rows: "_SavedRows | StreamedRows", *, name: str) -> None:
        self.name, self._rows, self.changes = name, rows, rows.changes
        self._row_of = {sample_id: number for number, sample_id in enumerate(rows.ids)}
        self._doubled = {sample_id for sample_id, count in Counter(rows.ids).items() if count > 1}
        self.sample_refs: Sequence[SampleRef] = [_ref(sample_id, name) for sample_id in self._row_of]
        self.clip_ids: Sequence[str] = list(dict.fromkeys(ref.clip_id for ref in self.sample_refs))

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant that a pose of the clip's prepared samples is from."""
        times = [ref.t0_us for ref in self.sample_refs if ref.clip_id == clip_id]
        if not times:
            raise BadClipError("missing_clip", f"{clip_id}: not in {self.name}.")
        return min(times) - (HISTORY_STEPS - 1) * STEP_US, max(times) + FUTURE_STEPS * STEP_US

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Decode one row; raises `BadClipError` if it is absent or damaged, or lacks a camera."""
        names = sort_cameras(cameras)
        return self._read(ref, self._rows.row, lambda row: from_row(ref, row, names, frames))

    def poses(self, ref: SampleRef) -> EgoPoses:
        """History and future without the pictures; raises `BadClipError` as `load` does."""
        return self._read(ref, self._rows.poses, lambda row: sound_poses(ref, row))

    @property
    def gives_routes(self) -> bool:
        """True if the rows have a column of routes."""
        return self._rows.has_routes

    def route_of(self, sample: Sample) -> Any:
        """The route in the sample's row."""
        return sample.route

    def expect(self, refs: Sequence[SampleRef]) -> None:
        """Take note of what will be loaded, any view of it, so that a stream keeps no other rows."""
        if isinstance(self._rows, StreamedRows):
            ids = [replace(ref, view=0).sample_id for ref in refs]
            self._rows.expect([self._row_of[name] for name in ids if name in self._row_of])

    def _read(
        self, ref: SampleRef, get: Callable[[int], dict[str, Any]], decode: Callable[[dict[str, Any]], Decoded]
    ) -> Decoded:
        where = ref.sample_id
        if where not in self._row_of:
            raise BadClipError("missing_clip", f"{where}: not in {self.name}; a prepared dataset has fixed moments.")
        if where in self._doubled:
            raise BadClipError("wrong_shape", f"{where}: several rows of {self.name} have this id; keep one of them.")
        row = get(self._row_of[where])
        try:
            return decode(row)
        except (BadClipError, UsageError):
            raise
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise BadClipError("wrong_shape", f"{where}: the row in {self.name} is damaged ({error}).") from error


def open_prepared(place: str) -> PreparedSource:
    """Open a directory that `prepare` wrote, or stream parquet files with the same columns from a hub repository or a
    directory laid out like one. Raises `SourceError`, saying what to do.
    """
    _check_reach(place)
    import datasets

    directory = Path(place)
    name = f"hf:{directory.resolve().name if directory.is_dir() else place}"
    unreadable = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError)
    _refuse_irregular_files(directory)
    try:
        rows = _SavedRows(directory, name) if is_saved(directory) else StreamedRows(place)
        return PreparedSource(rows, name=name)
    except SourceError:
        raise
    except (*unreadable, datasets.exceptions.DatasetsError, *connection_errors()) as error:
        raise SourceError(f"hf:{place} cannot be read ({first_line(error)}){_remedy(place)}") from error


def _check_reach(place: str) -> None:
    if not _must_be_a_path(place) and not Path(place).is_dir() and (why := why_unreachable()):
        raise SourceError(f"hf:{place} cannot be read{_remedy(place, unreachable=why)}")


def is_saved(directory: Path) -> bool:
    """Tell whether `save_to_disk` wrote this directory."""
    return any((directory / name).is_file() for name in _SAVED)


def _marker(place: str) -> Path | None:
    """None for what is streamed: its rows say themselves that they cannot be reached."""
    directory = Path(place)
    if not is_saved(directory) and (directory.is_dir() or not _must_be_a_path(place)):
        return None
    return next((directory / name for name in _SAVED if (directory / name).is_file()), directory / _SAVED[0])


def _must_be_a_path(place: str) -> bool:
    """Tell whether it cannot be the name of a hub repository, OWNER/NAME."""
    return place.startswith((".", "/")) or place.count("/") != 1


def _ref(sample_id: Any, name: str) -> SampleRef:
    try:
        return SampleRef.parse(str(sample_id))
    except UsageError as error:
        raise SourceError(f"{name}: {error}") from error


class _SavedRows:
    """Rows of a directory that `prepare` or `save_to_disk` wrote; they stay on disk, and are read in any order."""

    def __init__(self, directory: Path, name: str) -> None:
        import datasets

        _refuse_outside_files(directory)
        dataset = datasets.load_from_disk(str(directory))
        if isinstance(dataset, dict):
            dataset = datasets.concatenate_datasets(list(dataset.values()))
        check_columns(dataset.column_names, name)
        self.has_routes = ROUTE in dataset.column_names
        plain = dataset.with_format(None)
        self.changes: Sequence[str] = changes_in(plain[CHANGES] if CHANGES in dataset.column_names else (), name)
        columns = [*NEEDED, *(name for name in (ROUTE, T0) if name in dataset.column_names)]
        rows = undecoded(plain.select_columns(columns), name)
        self.ids: Sequence[str] = list(rows["sample_id"])

        self.row: Callable[[int], dict[str, Any]] = rows.__getitem__
        self.poses: Callable[[int], dict[str, Any]] = rows.select_columns(list(POSES)).__getitem__


def _remedy(place: str, *, unreachable: str = "") -> str:
    """The end of an error message: what to do; `unreachable` says why the hub is, if it is."""
    import huggingface_hub

    if Path(place).is_dir():
        return "; expected a directory that `alpacache prepare` wrote, or parquet files with the same columns."
    fetch = f"hf download {place} --repo-type dataset --local-dir DIR"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"; HF_HUB_OFFLINE is set: unset it, or fetch it where there is a network: {fetch}, then read hf:DIR."
    if unreachable:
        return (
            f": the hub cannot be reached ({unreachable}). Try again online, or fetch it where there is a network, "
            f"after hf auth login if it is private or gated: {fetch}, then read hf:DIR."
        )
    if _must_be_a_path(place):
        return "; there is no such directory, and a hub repository is named OWNER/NAME."
    return (
        f"; see that the name is right and the hub can be reached. If it is private or gated, accept its terms on its "
        f"page and run: hf auth login. To fetch all of it: {fetch}, then read hf:DIR."
    )


def _refuse_irregular_files(directory: Path) -> None:
    """Raise `SourceError` for a FIFO or a device anywhere in a directory, whoever would open it."""
    for folder, _, names in os.walk(directory):
        for file in (Path(folder, name) for name in names):
            try:
                regular_size(file)
            except FileNotFoundError:  # a link to nothing blocks nobody
                continue
            except OSError as error:
                raise SourceError(f"{file} cannot be read: {error}.") from error


def _refuse_outside_files(directory: Path) -> None:
    """Raise `SourceError` if a `state.json`, of the dataset or of a split, names a data file outside its directory."""
    index = directory / "dataset_dict.json"
    for split in json.loads(index.read_text())["splits"] if index.is_file() else ():
        if not is_plain_name(split) or ":" in split:  # two of them chain file systems
            raise SourceError(f"{index} names a split {split!r}; expected a plain name such as 'train'.")
    for state in (*directory.glob("state.json"), *directory.glob("*/state.json")):
        for entry in json.loads(state.read_text())["_data_files"]:
            if not (state.parent / entry["filename"]).resolve().is_relative_to(directory.resolve()):
                raise SourceError(f"{state} names a file outside its directory: {entry['filename']!r}.")


KIND = SourceKind(
    prefix="hf",
    usage=("hf:REPO-OR-PATH",),
    open=lambda place, cameras: open_prepared(place),
    check_reach=_check_reach,
    is_streamed=lambda place: not Path(place).exists(),
    marker=_marker,
)
