"""LeRobot data sets: episodes whose rows hold where the vehicle is, in columns that `columns` names.

A preset knows L2D's: speed in km/h, time in nanoseconds of 1970, places in float32 degrees (steps of 0.42 m to the
north), the receiver's course, and instructions as routes. Its episodes are windows of drives that overlap by nine
tenths; each moment is taken once, and all clips of a drive get names that fall on one side of the split.

Rows have the time of a column, if one is named, and else their nominal one. A frame is found by its own film's times.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.dead_reckoning import yaw_quaternions
from alpacache.converters.drive import Camera, Dropped, Film, LoggedDrive, Pictures
from alpacache.converters.fix_path import PLACE_M, TOLD, path_of
from alpacache.converters.fixes import COLUMNS, Fixes
from alpacache.converters.kind import Kind
from alpacache.converters.lerobot_meta import READS, DataSet, Episode, frames_of, read_data_set, tasks_of
from alpacache.converters.lerobot_windows import Rows, Window, each_moment_once
from alpacache.converters.log_files import UnusableError, as_microseconds, poses_alone
from alpacache.converters.remux import film_frames
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.driving.route import check_route
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.table import check_table

UNITS: Mapping[str, tuple[str, float]] = {
    "latitude": ("latitude", 1.0),
    "longitude": ("longitude", 1.0),
    "height": ("height", 1.0),
    "speed_mps": ("speed", 1.0),
    "speed_kmh": ("speed", 1 / 3.6),
    "course_deg": ("course", 1.0),
    "x_m": ("x", 1.0),
    "y_m": ("y", 1.0),
    "z_m": ("z", 1.0),
    "yaw_rad": ("yaw", 1.0),
    "yaw_deg": ("yaw", float(np.pi / 180)),
    "qx": ("qx", 1.0),
    "qy": ("qy", 1.0),
    "qz": ("qz", 1.0),
    "qw": ("qw", 1.0),
}
"""Quantities that a column can be mapped to, and their units."""
TIMES_US: Mapping[str, float] = {"time_ns": 1e-3, "time_us": 1.0, "time_ms": 1e3, "time_s": 1e6}
L2D: Mapping[str, str] = {
    "latitude": "observation.state.vehicle.hp_loc_latitude",
    "longitude": "observation.state.vehicle.hp_loc_longitude",
    "height": "observation.state.vehicle.hp_loc_altitude",
    "speed_kmh": "observation.state.vehicle.speed",
    "course_deg": "observation.state.vehicle.heading",
    "time_ns": "observation.state.timestamp",
    "route": "task.instructions",
}
L2D_CAMERA = "observation.images.front_left"
MOST_SKIPPED = 10
"""Most frames that the beginning of a part gives up to begin at a key frame."""
TASK, TASK_INDEX = "task", "task_index"
"""Names under which `--map route=` takes the index's text of each row's task, which is no column."""
SESSION = "session_id"
"""A column whose name ends so tells which drive a row is of."""


def drives(place: Path, *, camera: Sequence[str] = (), map: Sequence[str] = ()) -> Iterator[LoggedDrive | Dropped]:
    """The episodes of a data set, each moment of a drive once."""
    data_set = read_data_set(place)
    wanted = _wanted(data_set, map)
    cameras = _cameras(data_set, camera)
    dropped: list[Dropped] = []
    windows = _windows(data_set, wanted, dropped)
    recorded = any(name in TIMES_US for name in wanted)
    rows = each_moment_once(windows, data_set.name, recorded=recorded)
    if copies := sum(len(window.times_us) for window in windows) - sum(len(part.times_us) for part in rows):
        dropped.append(Dropped(what="rows", count=copies, reason="other episodes hold the same moments of the drive"))
    yield from dropped
    for part in rows:
        try:
            yield _drive(data_set, part, wanted, cameras)
        except BadClipError as error:
            yield Dropped(what="drives", count=1, reason=f"episode {part.episode.index}: {error}")


def _drive(data_set: DataSet, part: Rows, wanted: Mapping[str, str], cameras: Mapping[str, str]) -> LoggedDrive:
    table = _episode_table(
        data_set, part.episode, tuple(sorted({_column(data_set, source)[0] for source in wanted.values()}))
    )
    rows = slice(part.first, part.first + len(part.times_us))
    values = {
        UNITS[name][0]: _numbers(data_set, table, source)[rows] * UNITS[name][1]
        for name, source in wanted.items()
        if name in UNITS
    }
    dropped: list[Dropped] = []
    routes = _routes(data_set, table, part, rows, wanted, dropped)
    facts: dict[str, Any] = {**wanted, "episode": part.episode.index, "drive": part.drive}
    if data_set.hub is not None:
        facts["hub"] = f"{data_set.hub.repo} at {data_set.hub.revision}"
    if not any(name in TIMES_US for name in wanted):
        facts["clock"] = f"nominal, {data_set.fps:g} rows a second; no recorded times"
    if "latitude" in values:
        track, more = _track_of_places(part.times_us, values, _precision(data_set, wanted))
        facts |= more
    else:
        track = _track_of_metres(part.times_us, values)
    absent = [
        key for key in cameras.values() if key in part.episode.films and not data_set.has(part.episode.films[key])
    ]
    if absent and len(absent) == len(cameras):
        dropped.append(poses_alone(f"{part.episode.films[absent[0]]} is not there"))
        cameras = {}
    pictures = {name: _camera(data_set, part, rows, key) for name, key in cameras.items()}
    return LoggedDrive(
        name=part.drive,
        cameras=pictures,
        track=track,
        point="antenna",
        routes=routes,
        dropped=dropped,
        facts=facts,
        told=TOLD if "latitude" in values else (),
    )


def _camera(data_set: DataSet, part: Rows, rows: slice, key: str) -> Camera:
    episode = part.episode
    if data_set.features[key].get("dtype") == "video":
        film = data_set.file(episode.films[key])
        first = frames_of(film, episode.film_begins_s[key], part.stamps_s) + part.first
        skipped = _to_key_frame(film, first) if part.first else 0
        return Film(path=film, times_us=part.times_us[skipped:], first=first + skipped)

    def read(begin: int, end: int) -> Iterator[bytes]:
        pictures = _episode_table(data_set, episode, (key,)).column(key)
        for row in range(rows.start + begin, rows.start + end):
            picture = pictures[row].as_py()
            content = picture.get("bytes") if isinstance(picture, dict) else picture
            if not isinstance(content, bytes):
                raise UnusableError(f"row {row} of {key} holds no picture", kind="undecodable_video")
            yield content

    return Pictures(times_us=part.times_us, read=read)


def _to_key_frame(film: Path, first: int) -> int:
    """Frames to leave out so that the rest can be copied without encoding it anew; none if that were many."""
    frames = film_frames(film)
    later = frames.numbers[frames.keys & (frames.numbers >= first)]
    skipped = int(later.min()) - first if len(later) else 0
    return skipped if skipped <= MOST_SKIPPED else 0


def _track_of_places(
    times_us: NDArray[np.int64], values: Mapping[str, Floats], step_m: float
) -> tuple[Track, dict[str, Any]]:
    """Smoothed: places, which jump by their precision, along speed and course."""
    columns = {name: values.get(name, np.full(len(times_us), np.nan)) for name in COLUMNS}
    columns["accuracy"] = np.full(len(times_us), float(np.hypot(PLACE_M, step_m)))
    path = path_of(Fixes(times_us=times_us, absolute=True, values=columns), 0, len(times_us))
    facts = {**path.facts, "steps of places": f"{step_m:.2f} m"}
    return Track(timestamps_us=path.times_us, xyz=path.xyz, quaternion_xyzw=yaw_quaternions(path.yaw_rad)), facts


def _track_of_metres(times_us: NDArray[np.int64], values: Mapping[str, Floats]) -> Track:
    xyz = np.stack([values["x"], values["y"], values.get("z", 0 * values["x"])], axis=1)
    if "qw" in values:
        quaternion = np.stack([values[name] for name in ("qx", "qy", "qz", "qw")], axis=1)
    else:
        quaternion = yaw_quaternions(values["yaw"])
    return Track(timestamps_us=times_us, xyz=xyz, quaternion_xyzw=quaternion)


def _windows(data_set: DataSet, wanted: Mapping[str, str], dropped: list[Dropped]) -> list[Window]:
    """Window of each episode's recording."""
    windows: list[Window] = []
    for episode in data_set.episodes:
        try:
            windows.append(_window(data_set, episode, wanted))
        except BadClipError as error:
            dropped.append(Dropped(what="drives", count=1, reason=f"episode {episode.index}: {error}"))
    return windows


def _window(data_set: DataSet, episode: Episode, wanted: Mapping[str, str]) -> Window:
    """Window of an episode's recording. Raises `BadClipError`."""
    time = next((name for name in wanted if name in TIMES_US), None)
    session = next((column for column in data_set.features if column.endswith(SESSION)), None)
    names = {"timestamp", *([session] if session else []), *([_column(data_set, wanted[time])[0]] if time else [])}
    table = _episode_table(data_set, episode, tuple(sorted(names)))
    if len(table) < 2:
        raise UnusableError(f"{len(table)} rows in {episode.data.name}")
    stamps_s = _numbers(data_set, table, "timestamp")
    if time is None:
        times_us = as_microseconds(stamps_s, where="timestamp")
    else:
        whole = table.column(_column(data_set, wanted[time])[0]).to_pylist()
        whole = [one[0] if isinstance(one, list) else one for one in whole]
        if not all(isinstance(one, int) for one in whole):
            try:
                whole = [round(float(one) * TIMES_US[time]) for one in whole]
            except (OverflowError, TypeError, ValueError) as error:
                raise UnusableError(f"{wanted[time]} holds a time that is no number ({error})") from error
        elif TIMES_US[time] < 1:
            whole = [one // round(1 / TIMES_US[time]) for one in whole]
        else:
            whole = [one * round(TIMES_US[time]) for one in whole]
        times_us = np.array(whole, dtype=np.int64)
    if (np.diff(times_us) <= 0).any():
        raise UnusableError(f"times do not increase at row {np.argmax(np.diff(times_us) <= 0) + 1}", kind="time_order")
    told = table.column(session)[0].as_py() if session else None
    told = told[0] if isinstance(told, list) and told else told
    session_id = None if told is None else str(told)
    return Window(episode=episode, times_us=times_us, stamps_s=stamps_s, session=session_id)


def _routes(
    data_set: DataSet, table: Any, part: Rows, rows: slice, wanted: Mapping[str, str], dropped: list[Dropped]
) -> list[tuple[int, str]]:
    """Find the times (us) at which the text changes, with the text that holds from then on."""
    if "route" not in wanted:
        return []
    routes: list[tuple[int, str]] = []
    column, _ = _column(data_set, wanted["route"])
    said = table.column(column)[rows].to_pylist()
    if column == TASK_INDEX:
        tasks = tasks_of(data_set.root)
        said = [tasks.get(number) for number in said]
    for time_us, text in zip(part.times_us.tolist(), said, strict=True):
        text = text[0] if isinstance(text, list) and text else text
        try:
            text = check_route(text) or ""
        except ValueError as error:
            dropped.append(Dropped(what="routes", count=1, reason=f"episode {part.episode.index}: {error}"))
            text = ""
        if text != (routes[-1][1] if routes else ""):
            routes.append((time_us, text))
    return routes


def _precision(data_set: DataSet, wanted: Mapping[str, str]) -> float:
    """Metres to the north between two neighbouring values of the latitude's type."""
    column, _ = _column(data_set, wanted["latitude"])
    return 0.42 if data_set.features[column].get("dtype") == "float32" else 0.0


@lru_cache(maxsize=4)
def _file_table(file: Path, names: tuple[str, ...], _changed: int) -> Any:
    import pyarrow.parquet as pq

    check_table(file, where=file.name)
    absent = [name for name in names if name not in pq.ParquetFile(file).schema_arrow.names]
    if absent:
        raise UnusableError(f"{file.name} lacks the column {absent[0]}")
    return pq.read_table(file, columns=list(names))


def _episode_table(data_set: DataSet, episode: Episode, names: tuple[str, ...]) -> Any:
    """Rows of one episode, of columns of the data set."""
    file = data_set.file(episode.data)
    table = _file_table(file, (*names, "episode_index"), file.stat().st_mtime_ns)
    owners = np.asarray(table.column("episode_index").combine_chunks())
    begin, end = np.searchsorted(owners, [episode.index, episode.index + 1])
    return table.slice(int(begin), int(end - begin))


def _numbers(data_set: DataSet, table: Any, source: str) -> Floats:
    """A column, or one part of it, as float64 `[N]`; nulls are NaN."""
    name, part = _column(data_set, source)
    cells = table.column(name).to_pylist()
    try:
        cells = [cell[part or 0] if isinstance(cell, list) else cell for cell in cells]
        return np.array([np.nan if cell is None else float(cell) for cell in cells], dtype=np.float64)
    except (TypeError, ValueError, IndexError) as error:
        raise UnusableError(f"{source} does not hold numbers ({error})") from error


def _column(data_set: DataSet, source: str) -> tuple[str, int | None]:
    """Column and part of `observation.state.vehicle.speed` or `observation.state[3]`. Raises `UsageError`."""
    if source in data_set.features or source == "timestamp":
        return source, None
    if source == TASK:
        return TASK_INDEX, None
    if (found := re.fullmatch(r"(.+)\[(\d{1,4})\]", source)) and found[1] in data_set.features:
        return found[1], int(found[2])
    column, _, axis = source.rpartition(".")
    if column in data_set.features and axis in data_set.axes(column):
        return column, data_set.axes(column).index(axis)
    known = ", ".join(key for key in data_set.features if key not in data_set.cameras)
    raise UsageError(f"--map {source}: there is no such column, nor a part of one; columns: {known}.")


def _wanted(data_set: DataSet, columns: Sequence[str]) -> dict[str, str]:
    """Quantity -> column. Raises `UsageError` if these make no poses."""
    wanted: dict[str, str] = {}
    vehicle = "observation.state.vehicle"
    if not columns and vehicle in data_set.features and "hp_loc_latitude" in data_set.axes(vehicle):
        wanted = {name: source for name, source in L2D.items() if name != "route" or source in data_set.features}
    for entry in columns:
        name, _, source = entry.partition("=")
        if name == "preset" and source == "l2d":
            wanted |= L2D
        elif name in UNITS or name in TIMES_US or name == "route":
            wanted[name] = source
        else:
            known = ", ".join([*UNITS, *TIMES_US, "route"])
            raise UsageError(f"--map {entry}: {name} is unknown; expected NAME=COLUMN with one of {known}.")
    for name, source in wanted.items():
        column, _ = _column(data_set, source)
        if name == "route" and column == TASK_INDEX:
            tasks_of(data_set.root)
        elif name == "route" and data_set.features[column].get("dtype") != "string":
            raise UsageError(f"--map route={source}: expected a column of texts, or task.")
    has = {UNITS[name][0] for name in wanted if name in UNITS}
    if not (
        {"latitude", "longitude"} <= has or ({"x", "y"} <= has and ("yaw" in has or {"qx", "qy", "qz", "qw"} <= has))
    ):
        known = ", ".join(key for key in data_set.features if key not in data_set.cameras)
        poses = "latitude, longitude (and speed_mps, course_deg), or x_m, y_m and yaw_rad or qx, qy, qz, qw"
        raise UsageError(f"no poses among the columns; name them with --map NAME=COLUMN: {poses}. Columns: {known}.")
    return wanted


def _cameras(data_set: DataSet, written: Sequence[str]) -> dict[str, str]:
    """Full camera name -> key."""
    pairs = dict(entry.split("=", 1) for entry in written)
    if not pairs:
        keys = [key for key in data_set.cameras if key == L2D_CAMERA] or data_set.cameras
        if len(keys) != 1:
            known = ", ".join(data_set.cameras) or "none"
            raise UsageError(f"which camera looks ahead? Name it: --camera front_wide=KEY. Cameras: {known}.")
        pairs = {FRONT_CAMERA: keys[0]}
    if unknown := [key for key in pairs.values() if key not in data_set.cameras]:
        raise UsageError(f"--camera: there is no {unknown[0]}; cameras: {', '.join(data_set.cameras)}.")
    return pairs


KIND = Kind(name="lerobot", reads=READS, drives=drives, takes=("camera", "map"), hub=True)
