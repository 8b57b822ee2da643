"""`folder:DIR`: recordings in plain files, the layout that is easiest to make from any log.

    DIR/dataset.json                        {"name": ..., "cameras": [...], "clips": [...]}
    DIR/clips/CLIP/egomotion.parquet        timestamp (us), x y z qx qy qz qw: vehicle to world
    DIR/clips/CLIP/CAMERA.timestamps.parquet  timestamp (us), one row a frame
    DIR/clips/CLIP/CAMERA.mp4  or  CAMERA/000000.jpg, 000001.jpg, ...
    DIR/clips/CLIP/calibration.json         optional, {CAMERA: {...}}

The folder may come from a stranger: names are single path components, links must stay inside, sizes are bounded before
anything is allocated, and nothing is ever unpickled.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.cameras import CAMERAS, sort_cameras
from alpacache.driving.poses import Track, check_track, frame_indices, history_and_future
from alpacache.driving.sample import Sample, SampleRef
from alpacache.errors import BadClipError, SourceError
from alpacache.sources.recording import POSE_COLUMNS, Shot, covered_us, sample_of, track_of, wanted_frame_times_us
from alpacache.sources.source import SourceKind
from alpacache.sources.video import read_image, read_mp4, stack

MAX_JSON_BYTES = 64 * 2**20
MAX_TABLE_BYTES = 2**30
MAX_TABLE_ROWS = 20_000_000
_INDEX, _STAMPS = "dataset.json", ".timestamps.parquet"


class FolderSource:
    """Clips of a folder. Nothing changes after opening, so any number of threads may load."""

    def __init__(self, directory: str | Path, *, cameras: Sequence[str] | None = None) -> None:
        """Read `dataset.json`. `cameras` bound the times a clip covers; by default those the dataset lists.

        Raises `SourceError` if the folder as a whole cannot be read.
        """
        self._root = Path(directory).resolve()
        index = _read_index(self._root / _INDEX)
        self.name = f"folder:{index['name']}"
        self.clip_ids: Sequence[str] = index["clips"]
        self.cameras = sort_cameras(cameras or index["cameras"])
        self._known = frozenset(self.clip_ids)

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant that the poses and those of `cameras` that the clip has both cover."""
        clip, track = self._clip(clip_id), self.track(clip_id)
        check_track(track, where=clip_id)
        there = [camera for camera in self.cameras if (clip / f"{camera}{_STAMPS}").exists()]
        return covered_us(track, {camera: self.frame_times_us(clip_id, camera) for camera in there}, where=clip_id)

    def track(self, clip_id: str) -> Track:
        file = self._clip(clip_id) / "egomotion.parquet"
        if not file.is_file():
            raise BadClipError("missing_poses", f"{clip_id}: {file} does not exist.")
        return track_of(_read_columns(file, self._root, POSE_COLUMNS, where=clip_id))

    def frame_times_us(self, clip_id: str, camera: str) -> NDArray[np.int64]:
        file = self._clip(clip_id) / f"{camera}{_STAMPS}"
        if not file.is_file():
            reason = f"no {camera} ({file.name} does not exist); leave it out with --cameras."
            raise BadClipError("missing_camera", f"{clip_id}: {reason}")
        return _read_columns(file, self._root, ("timestamp",), where=clip_id)["timestamp"]

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._read_camera(clip_id, camera, times_us)[0]

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Read one sample; raises `BadClipError` for a recording that cannot be used at this t0."""
        names, clip_id = sort_cameras(cameras), ref.clip_id
        poses = history_and_future(self.track(clip_id), ref.t0_us, where=clip_id)
        times_us = wanted_frame_times_us(ref.t0_us, frames)
        shots = {name: self._read_camera(clip_id, name, times_us) for name in names}
        return sample_of(ref, poses, shots, self._read_calibration(clip_id))

    def _clip(self, clip_id: str) -> Path:
        if clip_id not in self._known:
            raise BadClipError("missing_clip", f"{clip_id}: not in {self._root / _INDEX}.")
        return _inside(self._root / "clips" / clip_id, self._root, where=clip_id)

    def _read_camera(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> Shot:
        clip, where = self._clip(clip_id), f"{clip_id}: {camera}"
        stamps = self.frame_times_us(clip_id, camera)
        chosen = frame_indices(stamps, times_us, where=where)
        movie, pictures = clip / f"{camera}.mp4", clip / camera
        if movie.exists():
            _inside(movie, self._root, where=where)
            images = read_mp4(movie, chosen.tolist(), count=len(stamps), where=where)
        else:
            if not _inside(pictures, self._root, where=where).is_dir():
                raise BadClipError("missing_camera", f"{where}: neither {movie.name} nor a folder {camera}/ exists.")
            count = sum(1 for entry in pictures.iterdir() if entry.suffix == ".jpg")
            if count != len(stamps):
                raise BadClipError("wrong_shape", f"{where}: {count} images, but {len(stamps)} timestamps.")
            files = [_inside(pictures / f"{index:06d}.jpg", self._root, where=where) for index in chosen]
            images = stack([read_image(file, "JPEG", where=f"{where}: {file.name}") for file in files], where=where)
        return images, stamps[chosen]

    def _read_calibration(self, clip_id: str) -> dict[str, Any] | None:
        file = self._clip(clip_id) / "calibration.json"
        if not file.is_file():
            return None
        try:
            lenses = _load_json(_inside(file, self._root, where=clip_id))
        except (ValueError, RecursionError) as error:
            raise BadClipError("wrong_shape", f"{clip_id}: calibration.json is not readable JSON ({error}).") from error
        if not isinstance(lenses, dict):
            raise BadClipError("wrong_shape", f"{clip_id}: calibration.json must hold an object, one entry a camera.")
        return lenses


def is_plain_name(name: Any) -> bool:
    """Whether a name from a stranger is one path component and nothing else."""
    plain = isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable() and name not in (".", "..")
    return plain and not any(mark in name for mark in "/\\:")


def _read_index(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SourceError(f"{file} does not exist; folder:DIR needs a dataset.json with name, cameras and clips.")
    try:
        index = _load_json(file)
        name, cameras, clips = index["name"], index["cameras"], index["clips"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{file} is not a dataset index with name, cameras and clips ({error}).") from error
    if not all(isinstance(entries, list) and entries for entries in (cameras, clips)):
        raise SourceError(f"{file}: cameras and clips must be lists with at least one name each.")
    if unknown := [camera for camera in cameras if camera not in CAMERAS]:
        raise SourceError(f"{file}: unknown camera {unknown[0]!r}; known: {', '.join(CAMERAS)}.")
    if odd := [clip for clip in clips if not is_plain_name(clip)]:
        raise SourceError(f"{file}: {odd[0]!r} cannot be a clip's name; it must be one path component.")
    if len(set(clips)) != len(clips):
        raise SourceError(f"{file}: clips are listed twice.")
    return {"name": str(name), "cameras": cameras, "clips": clips}


def _inside(path: Path, root: Path, *, where: str) -> Path:
    """`path` unchanged, once it is known that links do not lead out of `root`."""
    if not path.resolve().is_relative_to(root):
        raise BadClipError("unsafe_path", f"{where}: {path.name} links out of {root}; copy the data in instead.")
    return path


def _load_json(file: Path) -> Any:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, more than {MAX_JSON_BYTES:,}")
    return json.loads(file.read_bytes())


def _read_columns(file: Path, root: Path, names: Sequence[str], *, where: str) -> dict[str, NDArray[Any]]:
    """Numeric columns of a parquet file; `timestamp` as int64, whole microseconds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _inside(file, root, where=where)
    try:
        if file.stat().st_size > MAX_TABLE_BYTES or (rows := pq.read_metadata(file).num_rows) > MAX_TABLE_ROWS:
            raise BadClipError("wrong_shape", f"{where}: {file.name} is too large for one recording.")
        absent = [name for name in names if name not in pq.read_schema(file).names]
        if absent or not rows:
            reason = f"lacks the columns {', '.join(absent)}" if absent else "has no rows"
            raise BadClipError("wrong_shape", f"{where}: {file.name} {reason}; expected {', '.join(names)}.")
        table = pq.read_table(file, columns=list(names))
        return {name: _numeric(table.column(name), name, where=f"{where}: {file.name}") for name in names}
    except (pa.ArrowException, OSError) as error:
        raise BadClipError("wrong_shape", f"{where}: {file.name} is not a readable parquet file ({error}).") from error


def _numeric(column: Any, name: str, *, where: str) -> NDArray[Any]:
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or (name != "timestamp" and pa.types.is_floating(kind))):
        raise BadClipError("wrong_shape", f"{where}: column {name} is {kind}; expected numbers (timestamp: int64, us).")
    if column.null_count and name == "timestamp":
        raise BadClipError("not_finite", f"{where}: {column.null_count} rows have no timestamp.")
    array: NDArray[Any] = column.to_numpy()
    return array.astype(np.int64) if name == "timestamp" else array


KIND = SourceKind(
    prefix="folder",
    usage=("folder:DIR",),
    open=lambda place, cameras: FolderSource(place, cameras=cameras),
    marker=lambda place: Path(place) / _INDEX,
)
