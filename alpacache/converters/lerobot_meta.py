"""The index of a LeRobot data set, of version 2.1 and of 3.0: which rows and which part of which film an episode is.

    v2.1  data/chunk-000/episode_000000.parquet, videos/chunk-000/KEY/episode_000000.mp4, meta/episodes.jsonl
    v3.0  data/chunk-000/file-000.parquet and videos/KEY/chunk-000/file-000.mp4 of many episodes each,
          meta/episodes/chunk-000/file-000.parquet

Paths are made from templates in `meta/info.json`, which a stranger wrote: only whole numbers and names are put in, and
what comes out must lie within the data set.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from alpacache import strict_json
from alpacache.converters.film_clock import shown_us
from alpacache.converters.hub_files import INFO, HubFiles
from alpacache.converters.log_files import UnusableError, folder_of, inside, read_text
from alpacache.errors import BadClipError, UsageError
from alpacache.hub import MODEL_ID
from alpacache.sources.table import check_table

READS = "a folder of a LeRobot data set of version 2.1 or 3.0, with meta/info.json, or its id on the hub"
_FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")
VIDEO_TOLERANCE_S = 2e-3
"""Most that a frame may be away from its place in the film; LeRobot itself takes 1e-4 s, but rows have float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """Rows of an episode and their films."""

    index: int
    data: Path
    films: Mapping[str, Path]
    """Key of a camera -> its film."""
    film_begins_s: Mapping[str, float]
    """Key of a camera -> where in its film the episode begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set's index."""

    root: Path
    hub: HubFiles | None
    """Source of the files of `root` that are not there yet."""
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    episodes: Sequence[Episode]

    @property
    def name(self) -> str:
        """Name of the folder, or of the data set on the hub."""
        return self.root.name if self.hub is None else self.hub.repo.rpartition("/")[2]

    @property
    def cameras(self) -> list[str]:
        """Keys of all cameras."""
        return [key for key, feature in self.features.items() if feature.get("dtype") in ("video", "image")]

    def has(self, file: Path) -> bool:
        """Tell whether a file is there, or can be."""
        return self.hub is not None or file.is_file()

    def file(self, file: Path) -> Path:
        """A file of the data set, fetched if need be. Raises `UnusableError` for one that is not there."""
        if not file.is_file() and self.hub is not None:
            self.hub.fetch(file)
        if not file.is_file():
            raise UnusableError(f"{file} is not there")
        return file

    def axes(self, column: str) -> list[str]:
        """Names of the parts of a column, as far as the data set gives them."""
        names = self.features[column].get("names")
        names = names.get("axes") if isinstance(names, dict) else names
        return [str(name) for name in names] if isinstance(names, list) else []


def read_data_set(place: Path) -> DataSet:
    """Read `meta/` of a folder, or of a data set on the hub. Raises `UsageError` for what is no such data set."""
    hub = None
    if not place.exists() and MODEL_ID.fullmatch(str(place)):
        hub = HubFiles.of(str(place))
    root = folder_of(place, reads=READS) if hub is None else hub.root
    info_file = root / INFO
    try:
        info = strict_json.loads(read_text(info_file, limit_bytes=2**24))
    except BadClipError as error:  # says which file
        raise UsageError(f"{error}; expected {READS}.") from error
    except ValueError as error:
        raise UsageError(f"{info_file} is no JSON object ({error}); expected {READS}.") from error
    try:
        version = str(info["codebase_version"]).removeprefix("v")
        features = {str(key): dict(value) for key, value in info["features"].items()}
        fps, data_path, video_path = float(info["fps"]), str(info["data_path"]), str(info.get("video_path") or "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{info_file} lacks codebase_version, features, fps or data_path ({error}).") from error
    if not 0 < fps <= 1000:
        raise UsageError(f"{info_file}: fps is {fps}; expected frames a second.")
    keys = [key for key, feature in features.items() if feature.get("dtype") == "video"]
    read = {"2": _episodes_of_2, "3": _episodes_of_3}.get(version.partition(".")[0])
    if read is None:
        raise UsageError(f"{info_file}: codebase_version is {version}; 2.1 and 3.0 are read.")
    try:
        episodes = read(root, info, data_path, video_path, keys, links=hub is not None)
    except BadClipError as error:
        raise UsageError(f"{error}.") from error
    if not episodes:
        raise UsageError(f"{root / 'meta'} names no episode.")
    return DataSet(root=root, hub=hub, fps=fps, features=features, episodes=episodes)


@lru_cache(maxsize=2)
def tasks_of(root: Path) -> Mapping[int, str]:
    """Text of each `task_index`. Raises `UsageError` for a data set whose index does not say them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines, table = root / "meta" / "tasks.jsonl", root / "meta" / "tasks.parquet"
    try:
        if table.is_file():  # version 3: the text is the index of a table of pandas, under whatever name
            check_table(table, where=str(table))
            rows = pq.read_table(table)
            texts = next(name for name in rows.column_names if pa.types.is_string(rows.schema.field(name).type))
            return dict(zip(rows["task_index"].to_pylist(), rows[texts].to_pylist(), strict=True))
        read = [strict_json.loads(line) for line in read_text(lines).splitlines() if line.strip()]
        return {int(row["task_index"]): str(row["task"]) for row in read}
    except BadClipError as error:
        raise UsageError(f"{error}; texts of tasks are there.") from error
    except (ValueError, KeyError, TypeError, StopIteration, pa.ArrowException) as error:
        raise UsageError(f"{table if table.is_file() else lines} does not hold the texts of tasks.") from error


def frames_of(film: Path, begin_s: float, stamps_s: Any) -> int:
    """Number of the film's frame that an episode's rows begin with. Raises `UnusableError` if they are not in a row."""
    shown_s = _shown_s(film, film.stat().st_mtime_ns)
    wanted = begin_s + np.asarray(stamps_s, dtype=np.float64)
    step_s = float(np.median(np.diff(shown_s)))
    first = int(np.argmin(np.abs(shown_s - wanted[0])))
    found = shown_s[first : first + len(wanted)]
    off_s = np.abs(found - wanted[: len(found)]).max(initial=0.0)
    if len(found) < len(wanted) or off_s > max(VIDEO_TOLERANCE_S, 0.1 * step_s):
        missing = f"{len(found)} of {len(wanted)} frames from {wanted[0]:.3f} s on"
        reason = f"{film.name} holds {missing}, up to {off_s:.4f} s away from the rows' times"
        raise UnusableError(f"{reason}; copy it again in case it is cut off", kind="undecodable_video")
    return first


@lru_cache(maxsize=16)
def _shown_s(film: Path, _changed: int) -> Any:
    return shown_us(film) / 1e6


def _episodes_of_2(
    root: Path, info: Mapping[str, Any], data_path: str, video_path: str, keys: Sequence[str], *, links: bool
) -> list[Episode]:
    chunks, episodes = int(info.get("chunks_size") or 1000), []
    file = root / "meta" / "episodes.jsonl"
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            index = int(strict_json.loads(line)["episode_index"])
        except (ValueError, KeyError, TypeError) as error:
            raise UnusableError(f"{file}, line {number} names no episode_index ({error})") from error
        names = {"episode_index": index, "episode_chunk": index // max(1, chunks)}
        films = {key: inside(root, _path(video_path, names | {"video_key": key}), links=links) for key in keys}
        data = inside(root, _path(data_path, names), links=links)
        episodes.append(Episode(index=index, data=data, films=films, film_begins_s=dict.fromkeys(keys, 0.0)))
    return sorted(episodes, key=lambda episode: episode.index)


def _episodes_of_3(
    root: Path, info: Mapping[str, Any], data_path: str, video_path: str, keys: Sequence[str], *, links: bool
) -> list[Episode]:
    import pyarrow.parquet as pq

    del info
    episodes = []
    for file in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
        check_table(file, where=str(file))
        parts = ("chunk_index", "file_index", "from_timestamp")
        videos = [f"videos/{key}/{part}" for key in keys for part in parts]
        names = ["episode_index", "data/chunk_index", "data/file_index", *videos]
        absent = [name for name in names if name not in pq.ParquetFile(file).schema_arrow.names]
        if absent:
            raise UnusableError(f"{file} lacks {absent[0]}")
        for row in pq.read_table(file, columns=names).to_pylist():
            data = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            films = {}
            for key in keys:
                film = {part: row[f"videos/{key}/{part}"] for part in parts[:2]}
                films[key] = inside(root, _path(video_path, film | {"video_key": key}), links=links)
            begins = {key: float(row[f"videos/{key}/from_timestamp"]) for key in keys}
            where = inside(root, _path(data_path, data), links=links)
            episodes.append(Episode(index=int(row["episode_index"]), data=where, films=films, film_begins_s=begins))
    return sorted(episodes, key=lambda episode: episode.index)


def _path(template: str, values: Mapping[str, Any]) -> str:
    """The template with its fields filled in; no attribute, index or conversion is looked up."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise UnusableError(f"the path {template[:80]!r} has an unknown field {found[1]}")
        filled = values[found[1]]
        return f"{int(filled):0{int(found[2])}d}" if found[2] else str(filled)

    path = _FIELD.sub(value, template)
    if "{" in path or "}" in path:
        raise UnusableError(f"the path {template[:80]!r} cannot be filled in")
    return path
