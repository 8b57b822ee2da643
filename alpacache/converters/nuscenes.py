"""nuScenes: its tables read directly, since its devkit does not run beside numpy 2.

    ROOT/v1.0-*/{scene, sample, sample_data, ego_pose, calibrated_sensor, sensor, log}.json
    ROOT/samples/CAM_FRONT/*.jpg (key frames, 2 Hz), ROOT/sweeps/CAM_FRONT/*.jpg (the rest: 12 Hz in all)
    ROOT/can_bus/scene-0001_pose.json (50 Hz)

Poses are those of the rear axle in the map's frame (m, right-handed, z up), quaternions with their scalar first, times
microseconds of 1970. Each picture, sweep of the laser and of the radars has a pose at its own time; all of a scene's
together are dense. Those of the CAN bus are taken where they are there, and held against the tables'.

The tables of the whole set have gigabytes: they are read row by row, and what is kept are numbers.
"""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.converters.drive import Dropped, LoggedDrive, Pictures
from alpacache.converters.kind import Kind
from alpacache.converters.log_files import (
    UnusableError,
    folder_of,
    increasing_part,
    inside,
    pictures_of,
    poses_alone,
    read_text,
)
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError, UsageError
from alpacache.regular_file import regular_size

READS = "the folder of nuScenes with v1.0-*/, samples/ and sweeps/"
CHUNK_BYTES = 2**20
MAX_ROW_BYTES = 2**20
TOKEN_BYTES = 32
MAX_APART_M, MAX_APART_DEG = 1.0, 5.0
"""Most by which poses of the CAN bus and of the tables may differ (median)."""
MISSING_CAN = frozenset({*range(161, 169), *range(170, 177), *range(309, 315)})
"""Scenes without CAN bus, as its description says."""


@dataclass(slots=True)
class _Scene:
    """One scene, as the tables have it."""

    name: str
    log: Mapping[str, Any]
    times_us: "array[int]" = field(default_factory=lambda: array("q"))
    poses: bytearray = field(default_factory=bytearray)
    """Tokens of the poses at these times, of all sensors, `TOKEN_BYTES` each."""
    files: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Channel -> time (us) and file of each picture."""
    lenses: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def drives(place: Path, *, camera: Sequence[str] = (), pose: str | None = None) -> Iterator[LoggedDrive | Dropped]:
    """The scenes of all tables at `place`, by name; `pose`: `can_bus` or `ego_pose`."""
    root = folder_of(place, reads=READS)
    if pose not in (None, "can_bus", "ego_pose"):
        raise UsageError(f"--pose {pose}: expected can_bus or ego_pose.")
    tables = sorted(folder for folder in root.glob("v1.0-*") if (folder / "sample_data.json").is_file())
    if not tables and (root / "sample_data.json").is_file():
        root, tables = root.parent, [root]
    if not tables:
        raise UsageError(f"{place} holds no v1.0-*/sample_data.json; expected {READS}.")
    cameras = dict(entry.split("=", 1) for entry in camera) or {FRONT_CAMERA: "CAM_FRONT"}
    for folder in tables:
        try:
            scenes, poses = _read_tables(folder, set(cameras.values()))
        except BadClipError as error:
            raise UsageError(f"{error}.") from error
        for scene in sorted(scenes, key=lambda scene: scene.name):
            try:
                yield _drive(root, scene, poses, cameras, pose)
            except BadClipError as error:
                yield Dropped(what="drives", count=1, reason=f"{scene.name}: {error}")


def _drive(root: Path, scene: _Scene, poses: "_Poses", cameras: Mapping[str, str], wanted: str | None) -> LoggedDrive:
    dropped: list[Dropped] = []
    ego = poses.track(scene.times_us, scene.poses)
    can_file = inside(root, f"can_bus/{scene.name}_pose.json")
    facts = {"frame": f"the map's of {scene.log.get('location')}", "vehicle": str(scene.log.get("vehicle"))}
    if wanted == "ego_pose" or (wanted is None and not can_file.is_file()):
        track, facts["poses"] = ego, "ego_pose of all sensors, each at its own time"
    elif not can_file.is_file():
        has_none = scene.name[-4:].isdigit() and int(scene.name[-4:]) in MISSING_CAN
        known = "; this scene is one of those without CAN bus" if has_none else ""
        raise UnusableError(f"{can_file} is not there{known}; take --pose ego_pose", kind="missing_poses")
    else:
        track = _can_track(can_file, dropped)
        facts["poses"] = f"can_bus, {_compared(track, ego)}"
    if (root / "samples").is_dir() or (root / "sweeps").is_dir():
        pictures = {name: _pictures(root, scene, name, channel, dropped) for name, channel in cameras.items()}
    else:
        pictures = {}
        dropped.append(poses_alone("neither samples/ nor sweeps/ is there"))
    return LoggedDrive(
        name=scene.name,
        cameras=pictures,
        track=track,
        point="rear axle",
        calibration={name: scene.lenses[cameras[name]] for name in pictures if cameras[name] in scene.lenses},
        dropped=dropped,
        facts=facts | {"clock": "microseconds of 1970", "quaternions": "scalar first in the tables"},
    )


def _pictures(root: Path, scene: _Scene, name: str, channel: str, dropped: list[Dropped]) -> Pictures:
    rows = sorted(scene.files.get(channel, []))
    if not rows:
        raise UnusableError(f"no {channel} in its tables", kind="missing_camera")
    files = [inside(root, file) for _, file in rows]
    there = [number for number, file in enumerate(files) if file.is_file()]
    if absent := len(files) - len(there):
        first = next(file for number, file in enumerate(files) if number not in set(there))
        reason = f"not there, the first is {first.relative_to(root)}"
        dropped.append(Dropped(what=f"{name} frames", count=absent, reason=reason))
    times_us = np.array([rows[number][0] for number in there], dtype=np.int64)
    kept = increasing_part(times_us)
    if len(kept) < 2:
        raise UnusableError(f"{len(kept)} pictures of {channel} are there", kind="missing_camera")
    return pictures_of([files[there[place]] for place in kept.tolist()], times_us[kept])


def _can_track(file: Path, dropped: list[Dropped]) -> Track:
    try:
        rows = strict_json.loads(read_text(file, limit_bytes=2**26))
        times_us = np.array([int(row["utime"]) for row in rows], dtype=np.int64)
        xyz = np.array([row["pos"] for row in rows], dtype=np.float64).reshape(-1, 3)
        scalar_first = np.array([row["orientation"] for row in rows], dtype=np.float64).reshape(-1, 4)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UnusableError(f"{file.name} is no list of poses ({error}); take --pose ego_pose") from error
    kept = increasing_part(times_us)
    if lost := len(times_us) - len(kept):
        dropped.append(Dropped(what="poses", count=lost, reason=f"out of the order of time in {file.name}"))
    if len(kept) < 2:
        raise UnusableError(f"{file.name} holds {len(kept)} poses", kind="missing_poses")
    return Track(timestamps_us=times_us[kept], xyz=xyz[kept], quaternion_xyzw=scalar_first[kept][:, [1, 2, 3, 0]])


def _compared(track: Track, ego: Track) -> str:
    """Distance of the CAN bus's poses from the tables', in words. Raises `UnusableError` if that is too far."""
    from scipy.spatial.transform import Rotation, Slerp

    inside_ego = (track.timestamps_us >= ego.timestamps_us[0]) & (track.timestamps_us <= ego.timestamps_us[-1])
    if inside_ego.sum() < 2:
        raise UnusableError("can_bus and ego_pose have no time in common; take --pose ego_pose")
    times = track.timestamps_us[inside_ego] - ego.timestamps_us[0]
    known = ego.timestamps_us - ego.timestamps_us[0]
    there = np.stack([np.interp(times, known, axis) for axis in ego.xyz[:, :2].T], axis=1)
    apart_m = float(np.median(np.linalg.norm(track.xyz[inside_ego, :2] - there, axis=1)))
    turned = Slerp(known, Rotation.from_quat(ego.quaternion_xyzw))(times)
    between = Rotation.from_quat(track.quaternion_xyzw[inside_ego]) * turned.inv()
    apart_deg = float(np.rad2deg(np.median(between.magnitude())))
    found = f"{apart_m:.2f} m and {apart_deg:.2f} degrees from ego_pose (median)"
    if apart_m > MAX_APART_M or apart_deg > MAX_APART_DEG:
        raise UnusableError(f"its can_bus poses are {found}; take --pose ego_pose")
    return found


class _Poses:
    """The table of poses as arrays, found by token."""

    def __init__(self, file: Path) -> None:
        tokens, numbers = bytearray(), array("d")
        for row in rows_of(file):
            tokens += _token(row["token"])
            numbers.extend((*row["translation"], *row["rotation"]))
        self._rows = np.frombuffer(numbers, np.float64).reshape(-1, 7)
        self._tokens = np.frombuffer(tokens, f"S{TOKEN_BYTES}")
        self._order = np.argsort(self._tokens)
        self._tokens = self._tokens[self._order]

    def track(self, times_us: "array[int]", tokens: bytearray) -> Track:
        """Poses by time, of equal times the first. Raises `UnusableError` for a token that no row has."""
        wanted = np.frombuffer(tokens, f"S{TOKEN_BYTES}")
        place = np.searchsorted(self._tokens, wanted).clip(max=max(0, len(self._tokens) - 1))
        if not len(self._tokens) or (self._tokens[place] != wanted).any():
            raise UnusableError("ego_pose.json lacks poses that sample_data.json names", kind="missing_poses")
        times: NDArray[np.int64]
        times, first = np.unique(np.array(times_us, dtype=np.int64), return_index=True)
        if len(times) < 2:
            raise UnusableError(f"{len(times)} poses in its tables", kind="missing_poses")
        rows: Floats = self._rows[self._order[place[first]]]
        return Track(timestamps_us=times, xyz=rows[:, :3], quaternion_xyzw=rows[:, [4, 5, 6, 3]])


def _token(token: Any) -> bytes:
    """A row's name in a fixed number of bytes."""
    name = str(token).encode()
    if len(name) > TOKEN_BYTES:
        raise UnusableError(f"the token {name[:40]!r} is longer than {TOKEN_BYTES} bytes")
    return name.ljust(TOKEN_BYTES, b"\0")


def _read_tables(folder: Path, channels: set[str]) -> tuple[list[_Scene], _Poses]:
    """Scenes, and the poses that they name. Raises `UnusableError`."""
    try:
        logs = {row["token"]: row for row in rows_of(folder / "log.json")}
        scenes = {
            row["token"]: _Scene(name=str(row["name"]), log=logs.get(row["log_token"], {}))
            for row in rows_of(folder / "scene.json")
        }
        owners = {row["token"]: scenes[row["scene_token"]] for row in rows_of(folder / "sample.json")}
        names = {row["token"]: str(row["channel"]) for row in rows_of(folder / "sensor.json")}
        sensors = {row["token"]: row for row in rows_of(folder / "calibrated_sensor.json")}
        for row in rows_of(folder / "sample_data.json"):
            scene, sensor = owners[row["sample_token"]], sensors[row["calibrated_sensor_token"]]
            scene.times_us.append(int(row["timestamp"]))
            scene.poses += _token(row["ego_pose_token"])
            if (channel := names[sensor["sensor_token"]]) in channels:
                scene.files.setdefault(channel, []).append((int(row["timestamp"]), str(row["filename"])))
                scene.lenses.setdefault(channel, _lens(sensor, row))
        poses = _Poses(folder / "ego_pose.json")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, BadClipError):
            raise
        raise UnusableError(f"the tables in {folder} do not fit together ({error!r})") from error
    known = {channel for scene in scenes.values() for channel in scene.files}
    if unknown := sorted(channels - known):
        raise UsageError(f"--camera: the tables in {folder.name} have no pictures of {unknown[0]}; such as CAM_FRONT.")
    return list(scenes.values()), poses


def _lens(sensor: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pinhole that pictures are undistorted to."""
    matrix = np.array(sensor["camera_intrinsic"], dtype=np.float64)
    if matrix.shape != (3, 3):
        return {}
    size = {"width": int(row["width"]), "height": int(row["height"])}
    return {**size, "distortion_model": "plumb_bob", "K": matrix.ravel().tolist(), "D": []}


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON list, one after the other. Raises `UnusableError` for what is none, or is cut off."""
    try:
        regular_size(file)
    except OSError as error:
        raise UnusableError(f"{file} cannot be read: {error}") from error
    decoder, text, begun = json.JSONDecoder(), "", False
    with file.open(encoding="utf-8-sig", errors="replace") as opened:
        while True:
            chunk = opened.read(CHUNK_BYTES)
            text, place = text + chunk, 0
            if not begun:
                text = text.lstrip()
                if not text.startswith("["):
                    raise UnusableError(f"{file} is no JSON list")
                begun, place = True, 1
            while True:
                place = _skip(text, place)
                if text[place : place + 1] == "]":
                    return
                try:
                    row, place = decoder.raw_decode(text, place)
                except ValueError as error:
                    if chunk and len(text) - place < MAX_ROW_BYTES:
                        break  # the rest of the row comes with the next part
                    raise UnusableError(f"{file} is cut off or no JSON list of objects ({error})") from error
                except RecursionError as error:
                    raise UnusableError(f"{file} is nested too deeply") from error
                if not isinstance(row, dict):
                    raise UnusableError(f"{file} holds {str(row)[:40]!r}; expected a list of objects")
                yield row
            text = text[place:]


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


KIND = Kind(name="nuscenes", reads=READS, drives=drives, takes=("camera", "pose"))
