"""`folder:DIR`: recordings in plain files, the layout that is easiest to make from any log.

    DIR/dataset.json                        {"name": ..., "cameras": [...], "clips": [...]}, and where pictures were
                                            changed since they were recorded, "changes": ["undistort", "crop"]
    DIR/clips/CLIP/egomotion.parquet        timestamp (us), x y z qx qy qz qw: vehicle to world
    DIR/clips/CLIP/CAMERA.timestamps.parquet  timestamp (us), one row a frame
    DIR/clips/CLIP/CAMERA.mp4  or  CAMERA/000000.jpg, 000001.jpg, ...   (see `camera_files`)
    DIR/clips/CLIP/calibration.json         optional, {CAMERA: {...}}
    DIR/clips/CLIP/route.parquet            optional, timestamp (us), route: text that holds from then on; or a column
                                            route in egomotion.parquet

The folder may come from a stranger: names are single path components, links must stay inside, sizes are bounded before
anything is allocated, and nothing is ever unpickled.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.config import is_unicode
from alpacache.driving.cameras import CAMERAS, sort_cameras
from alpacache.driving.poses import Track, check_track, frame_indices, history_and_future
from alpacache.driving.sample import Sample, SampleRef
from alpacache.errors import BadClipError, SourceError
from alpacache.regular_file import lfs_pointer, read_regular, regular_size
from alpacache.sources.camera_files import find_film, find_pictures, picture_format
from alpacache.sources.image import read_image
from alpacache.sources.recording import (
    POSE_COLUMNS,
    FrameReading,
    OpenFrames,
    PictureReading,
    Reel,
    covered_us,
    read_frames,
    read_lenses,
    reels,
    sample_of,
    text_at,
    track_of,
)
from alpacache.sources.source import SourceKind, as_changes
from alpacache.sources.table import no_texts, read_columns, read_texts
from alpacache.sources.video import FilmReading

MAX_INDEX_BYTES = 64 * 2**20
MAX_CALIBRATION_BYTES = 2**20
MAX_PICTURE_BYTES = 2**28
KEPT_BYTES, KEPT_TABLE_BYTES = 2**25, 2**18
"""Most bytes of all tables that are kept, and of one: all clips' moments are chosen first, then samples are cut."""
_INDEX, _STAMPS = "dataset.json", ".timestamps.parquet"


class FolderSource:
    """Clips of a folder. Any number of threads may load."""

    def __init__(self, directory: str | Path, *, cameras: Sequence[str] | None = None) -> None:
        """Read `dataset.json`. `cameras` bound the times a clip covers; by default those the dataset lists.

        Raises `SourceError` if the folder as a whole cannot be read.
        """
        self._root = Path(os.path.realpath(directory))
        index = _read_index(self._root / _INDEX)
        self.name = f"folder:{index['name']}"
        self.clip_ids: Sequence[str] = index["clips"]
        self.changes: Sequence[str] = index["changes"]
        self.cameras = sort_cameras(cameras or index["cameras"])
        self._known = frozenset(self.clip_ids)
        self._tables: OrderedDict[tuple[Path, tuple[str, ...], int, int], dict[str, NDArray[Any]]] = OrderedDict()
        self._kept_bytes, self._lock = 0, threading.Lock()

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant that the poses and those of `cameras` that the clip has both cover."""
        clip, track = self._clip(clip_id), self.track(clip_id)
        check_track(track, where=clip_id)
        there = [camera for camera in self.cameras if (clip / f"{camera}{_STAMPS}").exists()]
        return covered_us(track, {camera: self.frame_times_us(clip_id, camera) for camera in there}, where=clip_id)

    def track(self, clip_id: str) -> Track:
        file = self._clip(clip_id) / "egomotion.parquet"
        if not file.exists():
            raise BadClipError("missing_poses", f"{clip_id}: {file} does not exist.")
        return track_of(self._read_columns(file, POSE_COLUMNS, where=clip_id))

    def frame_times_us(self, clip_id: str, camera: str) -> NDArray[np.int64]:
        file = self._clip(clip_id) / f"{camera}{_STAMPS}"
        if not file.exists():
            reason = f"no {camera} ({file.name} does not exist); leave it out with --cameras."
            raise BadClipError("missing_camera", f"{clip_id}: {reason}")
        return self._read_columns(file, ("timestamp",), where=clip_id)["timestamp"]

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._read_camera(clip_id, camera, times_us)

    def glance(self, clip_id: str, camera: str, times_us: NDArray[np.int64], *, about_px: int) -> NDArray[np.uint8]:
        return self._read_camera(clip_id, camera, times_us, about_px=about_px)

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Read one sample; raises `BadClipError` for a recording that cannot be used at this t0."""
        with self.one_pass([ref], cameras=cameras, frames=frames) as load:
            return load(ref)

    @contextmanager
    def one_pass(
        self, refs: Sequence[SampleRef], *, cameras: Sequence[str], frames: int
    ) -> Iterator[Callable[[SampleRef], Sample]]:
        """Read samples of one clip, films in one pass and pictures once each."""
        clip_id, t0s_us = refs[0].clip_id, [ref.t0_us for ref in refs]

        def reel(camera: str) -> Reel:
            read_stamps, open_frames = partial(self.frame_times_us, clip_id, camera), self._opener(clip_id, camera)
            return Reel(t0s_us, frames, read_stamps, open_frames)

        with reels(sort_cameras(cameras), reel) as by_camera:

            def load(ref: SampleRef) -> Sample:
                poses = history_and_future(self.track(clip_id), ref.t0_us, where=clip_id)
                shots = {name: each.shot(ref.t0_us, where=f"{clip_id}: {name}") for name, each in by_camera.items()}
                return sample_of(ref, poses, shots, self._read_calibration(clip_id))

            yield load

    @property
    def gives_routes(self) -> bool:
        """True: whether a clip has routes is known when it is read."""
        return True

    def route_of(self, sample: Sample) -> Any:
        """The text at or before t0 in the clip's column `route`: null rows say nothing new, empty ones end a route."""
        clip_id = sample.ref.clip_id
        where, stamps, texts = self._routes(clip_id)
        return text_at(stamps, texts, sample.ref.t0_us, where=where)

    def route_times_us(self, clip_id: str) -> NDArray[np.int64]:
        """Times of the rows that say something."""
        _, stamps, texts = self._routes(clip_id)
        rows_us: NDArray[np.int64] = stamps[np.array(texts.is_valid().to_pylist(), dtype=bool)]
        return rows_us

    def _routes(self, clip_id: str) -> tuple[str, NDArray[np.int64], Any]:
        """Times and texts of a clip's routes, as `read_texts` gives them; both empty without any."""
        clip, found = self._clip(clip_id), {}
        for name in ("route.parquet", "egomotion.parquet"):
            if (file := clip / name).exists():
                where = f"{clip_id}: {name}"
                texts = read_texts(_inside(file, self._root, where=clip_id), "route", where=where)
                if texts is None and name == "route.parquet":
                    raise BadClipError("wrong_shape", f"{where} lacks the column route; expected timestamp, route.")
                if texts is not None and len(texts[0]):
                    found[where] = texts
        if len(found) > 1:
            reason = "routes are in route.parquet and in egomotion.parquet; keep one of them."
            raise BadClipError("wrong_shape", f"{clip_id}: {reason}")
        for where, texts in found.items():
            return where, *texts
        return clip_id, *no_texts()

    def _clip(self, clip_id: str) -> Path:
        if clip_id not in self._known:
            raise BadClipError("missing_clip", f"{clip_id}: not in {self._root / _INDEX}.")
        return _inside(self._root / "clips" / clip_id, self._root, where=clip_id)

    def _read_camera(
        self, clip_id: str, camera: str, times_us: NDArray[np.int64], *, about_px: int | None = None
    ) -> NDArray[np.uint8]:
        self._clip(clip_id)
        stamps = self.frame_times_us(clip_id, camera)
        where = f"{clip_id}: {camera}"
        chosen = frame_indices(stamps, times_us, where=where)
        return read_frames(self._opener(clip_id, camera, about_px=about_px), stamps, chosen, where=where)

    def _opener(self, clip_id: str, camera: str, *, about_px: int | None = None) -> OpenFrames:
        """A function that opens the camera's film or pictures."""

        def open_frames(stamps: NDArray[np.int64], wanted: Sequence[Sequence[int]]) -> FrameReading:
            clip, where = self._clip(clip_id), f"{clip_id}: {camera}"
            folder = _inside(clip / camera, self._root, where=where)
            film = find_film(clip, camera, where=where)
            if film is not None:
                _regular(film, self._root, where=where)
                return FilmReading(film, wanted, stamps, name=film.name, where=where, about_px=about_px)
            names = find_pictures(folder, len(stamps), where=where)
            read = partial(self._read_pictures, folder, names, where=where, about_px=about_px)
            return PictureReading(wanted, read, where=where)

        return open_frames

    def _read_pictures(
        self, folder: Path, names: Mapping[int, str], frames: Sequence[int], *, where: str, about_px: int | None
    ) -> list[NDArray[np.uint8]]:
        files = [
            _regular(folder / names[frame], self._root, where=where, limit_bytes=MAX_PICTURE_BYTES) for frame in frames
        ]
        return [
            read_image(file, picture_format(file.name), where=f"{where}: {file.name}", about_px=about_px)
            for file in files
        ]

    def _read_columns(self, file: Path, names: Sequence[str], *, where: str) -> dict[str, NDArray[Any]]:
        """The columns, read-only; small tables are kept until others take their place, or the file changes."""
        _inside(file, self._root, where=where)
        status = file.stat()
        key = (file, tuple(names), status.st_mtime_ns, status.st_size)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        columns = read_columns(file, names, where=f"{where}: {file.name}")
        for column in columns.values():
            column.flags.writeable = False
        if _size_bytes(columns) <= KEPT_TABLE_BYTES:
            with self._lock:
                self._kept_bytes += _size_bytes(columns) - _size_bytes(self._tables.pop(key, {}))
                self._tables[key] = columns
                while self._kept_bytes > KEPT_BYTES:
                    self._kept_bytes -= _size_bytes(self._tables.popitem(last=False)[1])
        return columns

    def _read_calibration(self, clip_id: str) -> dict[str, Any] | None:
        file = self._clip(clip_id) / "calibration.json"
        if not file.exists():
            return None
        text = _regular(file, self._root, where=clip_id, limit_bytes=MAX_CALIBRATION_BYTES).read_bytes()
        return read_lenses(text, where=f"{clip_id}: {file.name}")


def _size_bytes(columns: Mapping[str, NDArray[Any]]) -> int:
    return sum(column.nbytes for column in columns.values())


def is_plain_name(name: Any) -> bool:
    """Tell whether a name from a stranger is one path component and nothing else."""
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= 255 and name not in (".", "..")
    return plain and not any(mark in name for mark in "/\\")


def _read_index(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise SourceError(f"{file} does not exist; folder:DIR needs a dataset.json with name, cameras and clips.")
    try:
        data = read_regular(file, limit_bytes=MAX_INDEX_BYTES)
        index = strict_json.loads(data)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error}.") from error
    except ValueError as error:
        reason = lfs_pointer(data) or f"it is not valid JSON ({error})"
        raise SourceError(f"{file} is not a dataset index with name, cameras and clips: {reason}.") from error
    if not isinstance(index, dict):
        raise SourceError(f"{file} is not a dataset index; expected a JSON object with name, cameras and clips.")
    if absent := [key for key in ("name", "cameras", "clips") if key not in index]:
        raise SourceError(f"{file} lacks {' and '.join(absent)}; expected name, cameras and clips.")
    name, cameras, clips = index["name"], index["cameras"], index["clips"]
    if not (isinstance(name, str) and is_unicode(name)):
        shown = json.dumps(name)[:80]  # a lone surrogate is written as it may stand in the file
        raise SourceError(f"{file}: name is {shown}; expected text in valid Unicode.")
    if not all(isinstance(entries, list) and entries for entries in (cameras, clips)):
        raise SourceError(f"{file}: cameras and clips must be lists with at least one name each.")
    if unknown := [camera for camera in cameras if not isinstance(camera, str) or camera not in CAMERAS]:
        raise SourceError(f"{file}: unknown camera {json.dumps(unknown[0])[:80]}; known: {', '.join(CAMERAS)}.")
    if odd := [clip for clip in clips if not is_plain_name(clip)]:
        rule = "it must be one path component: printable text of up to 255 bytes without slashes, and not . or .."
        raise SourceError(f"{file}: {str(odd[0])[:80]!r} cannot be a clip's name; {rule}.")
    if len(set(clips)) != len(clips):
        raise SourceError(f"{file}: clips are listed twice.")
    try:
        changes = as_changes(index.get("changes", []))
    except ValueError as error:
        raise SourceError(f"{file}: changes is {json.dumps(index['changes'])[:80]}; expected {error}.") from error
    return {"name": name, "cameras": cameras, "clips": clips, "changes": changes}


def _inside(path: Path, root: Path, *, where: str) -> Path:
    """`path` unchanged, once it is known that links do not lead out of `root`."""
    if not Path(os.path.realpath(path)).is_relative_to(root):  # Path.resolve raises where links run in a circle
        raise BadClipError("unsafe_path", f"{where}: {path.name} links out of {root}; copy the data in instead.")
    return path


def _regular(path: Path, root: Path, *, where: str, limit_bytes: int | None = None) -> Path:
    """`path` unchanged, once it is known to be a regular file inside `root` of at most so many bytes."""
    _inside(path, root, where=where)
    try:
        regular_size(path, limit_bytes=limit_bytes)
    except FileNotFoundError as error:
        raise BadClipError("undecodable_video", f"{where}: {path.name} does not exist.") from error
    except OSError as error:
        raise BadClipError("unsafe_path", f"{where}: {path.name} cannot be read: {error}.") from error
    return path


KIND = SourceKind(
    prefix="folder",
    usage=("folder:DIR",),
    open=lambda place, cameras: FolderSource(place, cameras=cameras),
    marker=lambda place: Path(place) / _INDEX,
)
