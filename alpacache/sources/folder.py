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

from alpacache.driving.poses import (
    Track,
    check_timestamps,
    check_track,
    frame_indices,
    history_and_future,
)
from alpacache.driving.sample import (
    CAMERAS,
    FRAME_STEP_US,
    Sample,
    SampleRef,
    sort_cameras,
)
from alpacache.errors import BadClipError, SourceError
from alpacache.sources.video import read_jpegs, read_mp4

MAX_JSON_BYTES = 64 * 2**20
MAX_TABLE_BYTES = 2**30
MAX_TABLE_ROWS = 20_000_000
_POSE_COLUMNS = ("timestamp", "x", "y", "z", "qx", "qy", "qz", "qw")


class FolderSource:
    """Clips of a folder; stateless after opening, so any number of threads may load."""

    def __init__(self, directory: str | Path, *, cameras: Sequence[str] | None = None) -> None:
        """Read `dataset.json`. `cameras` bound the times a clip covers; by default those the dataset lists.

        Raises `SourceError` where the folder as a whole cannot be read.
        """
        self._root = Path(directory).resolve()
        index = _read_index(self._root / "dataset.json")
        self.name = f"folder:{index['name']}"
        self.clip_ids: Sequence[str] = index["clips"]
        self.cameras = sort_cameras(cameras or index["cameras"])
        self._known = frozenset(self.clip_ids)

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant that the poses and those of `cameras` that the clip has both cover."""
        clip = self._clip(clip_id)
        track = _read_track(clip / "egomotion.parquet", self._root, where=clip_id)
        check_track(track, where=clip_id)
        spans = [track.span_us]
        for camera in self.cameras:
            if (clip / f"{camera}.timestamps.parquet").exists():
                stamps = _read_timestamps(clip, camera, self._root, where=clip_id)
                check_timestamps(stamps, what=f"{clip_id}: {camera}: frame timestamps")
                spans.append((int(stamps[0]), int(stamps[-1])))
        return max(first for first, _ in spans), min(last for _, last in spans)

    def track(self, clip_id: str) -> Track:
        """All poses of a clip, as they stand in its file."""
        return _read_track(self._clip(clip_id) / "egomotion.parquet", self._root, where=clip_id)

    def frame_times_us(self, clip_id: str, camera: str) -> NDArray[np.int64]:
        """When each frame of a camera was recorded, as it stands in its file."""
        return _read_timestamps(self._clip(clip_id), camera, self._root, where=clip_id)

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        """`[len(times_us), 3, H, W]`: the frame at or before each time."""
        return self._read_camera(self._clip(clip_id), camera, times_us)[0]

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Read one sample; raises `BadClipError` for a recording that cannot be used at this t0."""
        clip, names = self._clip(ref.clip_id), sort_cameras(cameras)
        track = _read_track(clip / "egomotion.parquet", self._root, where=ref.clip_id)
        poses = history_and_future(track, ref.t0_us, where=ref.clip_id)
        wanted = ref.t0_us - FRAME_STEP_US * np.arange(frames - 1, -1, -1, dtype=np.int64)
        shots = [self._read_camera(clip, name, wanted) for name in names]
        return Sample(
            ref=ref,
            cameras=names,
            frames=join_cameras([images for images, _ in shots], names, where=ref.clip_id),
            frame_timestamps_us=np.stack([stamps for _, stamps in shots]),
            calibration=_read_calibration(clip / "calibration.json", self._root, names, where=ref.clip_id),
            **poses._asdict(),
        )

    def _clip(self, clip_id: str) -> Path:
        if clip_id not in self._known:
            raise BadClipError("missing_clip", f"{clip_id}: not in {self._root / 'dataset.json'}.")
        return _inside(self._root / "clips" / clip_id, self._root, where=clip_id)

    def _read_camera(
        self, clip: Path, camera: str, wanted: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        where = f"{clip.name}: {camera}"
        stamps = _read_timestamps(clip, camera, self._root, where=clip.name)
        chosen = frame_indices(stamps, wanted, where=where)
        movie, folder = clip / f"{camera}.mp4", clip / camera
        if movie.exists():
            file = _inside(movie, self._root, where=where)
            images = read_mp4(file, chosen.tolist(), count=len(stamps), where=where)
        else:
            _check_image_count(_inside(folder, self._root, where=where), len(stamps), where=where)
            files = [_inside(folder / f"{index:06d}.jpg", self._root, where=where) for index in chosen]
            images = read_jpegs(files, where=where)
        return images, stamps[chosen]


def join_cameras(images: Sequence[NDArray[np.uint8]], cameras: Sequence[str], *, where: str) -> NDArray[np.uint8]:
    """Per camera `[frames, 3, H, W]` as `[cameras, frames, 3, H, W]`; sizes must agree (`wrong_shape`).

    One camera's are not copied.
    """
    if len({array.shape for array in images}) > 1:
        sizes = ", ".join(f"{camera} {array.shape[-2:]}" for camera, array in zip(cameras, images, strict=True))
        raise BadClipError("wrong_shape", f"{where}: cameras of different sizes (height, width): {sizes}.")
    return np.stack(images) if len(images) > 1 else images[0][None]


def _read_index(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SourceError(f"{file} does not exist; folder:DIR needs a dataset.json with name, cameras and clips.")
    try:
        index = _load_json(file)
        name, cameras, clips = index["name"], index["cameras"], index["clips"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{file} is not a dataset index with name, cameras and clips ({error}).") from error
    if not all(isinstance(entries, list) and entries for entries in (cameras, clips)):
        raise SourceError(f"{file}: cameras and clips must be lists with at least one name each.")
    for camera in cameras:
        if camera not in CAMERAS:
            raise SourceError(f"{file}: unknown camera {camera!r}; known: {', '.join(CAMERAS)}.")
    for clip in clips:
        if not _is_plain_name(clip):
            raise SourceError(f"{file}: {clip!r} cannot be a clip's name; it must be one path component.")
    if len(set(clips)) != len(clips):
        raise SourceError(f"{file}: clips are listed twice.")
    return {"name": str(name), "cameras": cameras, "clips": clips}


def _is_plain_name(name: Any) -> bool:
    plain = isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable() and name not in (".", "..")
    return plain and not any(mark in name for mark in "/\\:")


def _inside(path: Path, root: Path, *, where: str) -> Path:
    """`path` unchanged, once it is known that links do not lead out of `root`."""
    if not path.resolve().is_relative_to(root):
        raise BadClipError("unsafe_path", f"{where}: {path.name} links out of {root}; copy the data in instead.")
    return path


def _load_json(file: Path) -> Any:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, more than {MAX_JSON_BYTES:,}")
    try:
        return json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deeply") from error


def _read_track(file: Path, root: Path, *, where: str) -> Track:
    if not file.is_file():
        raise BadClipError("missing_poses", f"{where}: {file} does not exist.")
    columns = _read_columns(file, root, _POSE_COLUMNS, where=where)
    values = np.stack([columns[name].astype(np.float64) for name in _POSE_COLUMNS[1:]], axis=1)
    return Track(timestamps_us=columns["timestamp"], xyz=values[:, :3], quaternion_xyzw=values[:, 3:])


def _read_timestamps(clip: Path, camera: str, root: Path, *, where: str) -> NDArray[np.int64]:
    file = clip / f"{camera}.timestamps.parquet"
    if not file.is_file():
        raise BadClipError(
            "missing_camera", f"{where}: no {camera} ({file.name} does not exist); leave it out with --cameras."
        )
    return _read_columns(file, root, ("timestamp",), where=where)["timestamp"]


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
    if not (
        pa.types.is_integer(kind) if name == "timestamp" else pa.types.is_floating(kind) or pa.types.is_integer(kind)
    ):
        raise BadClipError("wrong_shape", f"{where}: column {name} is {kind}; expected numbers (timestamp: int64, us).")
    if column.null_count and name == "timestamp":
        raise BadClipError("not_finite", f"{where}: {column.null_count} rows have no timestamp.")
    array: NDArray[Any] = column.to_numpy()
    return array.astype(np.int64) if name == "timestamp" else array


def _check_image_count(folder: Path, count: int, *, where: str) -> None:
    if not folder.is_dir():
        raise BadClipError("missing_camera", f"{where}: neither {folder.name}.mp4 nor a folder {folder.name}/ exists.")
    found = sum(1 for entry in folder.iterdir() if entry.suffix == ".jpg")
    if found != count:
        raise BadClipError("wrong_shape", f"{where}: {found} images, but {count} timestamps.")


def _read_calibration(file: Path, root: Path, cameras: Sequence[str], *, where: str) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        known = _load_json(_inside(file, root, where=where))
    except ValueError as error:
        raise BadClipError("wrong_shape", f"{where}: calibration.json is not readable JSON ({error}).") from error
    if not isinstance(known, dict):
        raise BadClipError("wrong_shape", f"{where}: calibration.json must hold an object, one entry a camera.")
    return {camera: known[camera] for camera in cameras if camera in known} or None
