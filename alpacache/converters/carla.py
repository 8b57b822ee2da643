"""`carla`: runs of the simulator CARLA as carla_alpamayo records them (libs/schemas, ad_stack/run.py).

    RUN/telemetry/index.json, segment_0000.mcap ...   or RUN/telemetry.mcap: JSON messages, pictures in base64
    RUN/manifest.jsonl, front_rgb.mp4                 a line a recorded frame; frame k of the film is line k
    RUN/summary.json                                  town, success, size of the camera

CARLA's axes are left-handed: x forward, y right, z up; yaw clockwise, pitch nose up. The recorder's MCAP has y, yaw and
pitch negated already, the manifest of the same run has not, nor have the first files under other topics' names. So the
source says which it is, and never the motion: a drive mirrored in y *and* yaw agrees with itself. What the source says
is then held against the steering, which is to the right in all of them. Times are seconds of the simulation.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.converters.drive import Camera, Dropped, Film, LoggedDrive, Pictures, increasing
from alpacache.converters.kind import Kind, check_installed
from alpacache.converters.log_files import MOST_SECONDS, is_file
from alpacache.converters.mcap_log import McapLog
from alpacache.converters.messages import numbers, part
from alpacache.converters.remux import film_frames
from alpacache.converters.ros_pictures import PictureReader
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import MAX_VALUE, Track
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.regular_file import read_regular, regular_size

Axes = Literal["right-handed", "left-handed"]
MANIFEST, FILM, SUMMARY, TELEMETRY, INDEX = "manifest.jsonl", "front_rgb.mp4", "summary.json", "telemetry", "index.json"
_TOPICS: Mapping[Axes, tuple[str, str]] = {
    "right-handed": ("/ego/state", "/camera/front/compressed"),
    "left-handed": ("/state/ego", "/sensors/front_rgb/compressed"),
}
"""Topics of poses and pictures; those of the files that have CARLA's own axes are the older ones."""
_TEXTS = {"left": "Turn left", "right": "Turn right", "straight": "Go straight"}
_NO_TURN = ("lanefollow", "void", "none", "")
"""Commands that end a route: following the lane is no turn."""
STEERED, TURNING_RADPS, MOVING_MPS, LEAST_ROWS = 0.02, 0.02, 1.0, 10
"""Least steering, turning and speed for a row to be compared, and the number of such rows that is needed."""
AGREE = 0.75
"""Share of such rows that must agree."""
SAME_PLACE_M = 0.05
_FIELDS = (
    "timestamp",
    "vehicle_x",
    "vehicle_y",
    "vehicle_z",
    "vehicle_yaw_deg",
    "steer",
    "command",
    "front_rgb_path",
    "episode_id",
)
_MAX_JSON_BYTES, _MAX_LINE_BYTES, _MOST_LINES = 2**24, 2**20, 4_000_000


@dataclass(slots=True)
class _RunRows:
    """A run's rows in CARLA's or the right-handed axes, one a recorded frame."""

    source: str
    axes: Axes
    times_us: NDArray[np.int64]
    places: NDArray[np.float64]
    """`[N, 3]` metres."""
    angles_deg: NDArray[np.float64]
    """`[N, 3]` yaw, pitch, roll."""
    steer: NDArray[np.float64]
    """`[N]`, to the right; NaN where it is not there."""
    commands: list[tuple[int, str]]
    cameras: dict[str, Camera]
    facts: dict[str, Any]
    dropped: list[Dropped] = field(default_factory=list)


def drives(place: Path, *, axes: Axes | None = None) -> Iterator[LoggedDrive | Dropped]:
    """The drive of a run; of a folder with several runs, those of each."""
    runs = _runs(place)
    for run in runs:
        try:
            yield _drive(run, axes)
        except (UsageError, BadClipError) as error:
            if len(runs) == 1:
                raise
            yield Dropped(what="drives", count=1, reason=f"{_run_folder(run).name}: {str(error).rstrip('.')}")


def _runs(place: Path) -> list[Path]:
    """Find the runs of a place: itself, or the folders in it. Raises `SourceError`."""
    if place.is_file() or _is_run(place):
        return [place]
    if not place.is_dir():
        raise SourceError(f"{place} is neither a folder nor a file of a run; name a run's folder.")
    if found := sorted(folder for folder in place.iterdir() if folder.is_dir() and _is_run(folder)):
        return found
    raise SourceError(f"{place} holds neither {MANIFEST} nor telemetry; name a run's folder (outputs/evaluate/RUN).")


def _is_run(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or bool(_segments(folder)[0])


def _run_folder(place: Path) -> Path:
    folder = place.absolute().parent if place.is_file() else place.absolute()
    return folder.parent if folder.name == TELEMETRY else folder


def _drive(place: Path, axes: Axes | None) -> LoggedDrive:
    folder = _run_folder(place)
    files, lost = ([place], []) if place.suffix == ".mcap" else ([], []) if place.is_file() else _segments(place)
    manifest = place if place.suffix == ".jsonl" else folder / MANIFEST
    if files:
        check_installed(("mcap",), "telemetry of carla", extra="ros")
        run = _from_telemetry(files)
        run.dropped += lost
        if place.is_dir() and manifest.is_file():
            _compare(run, _from_manifest(manifest, with_film=False), folder)
    elif manifest.is_file():
        run = _from_manifest(manifest)
    else:
        raise SourceError(f"{place} is neither an .mcap file nor a manifest.jsonl.")
    return _as_drive(run, folder, axes)


def _as_drive(run: _RunRows, folder: Path, axes: Axes | None) -> LoggedDrive:
    from scipy.spatial.transform import Rotation

    taken = axes or run.axes
    xyz, angles = run.places.copy(), run.angles_deg.copy()
    if taken == "left-handed":
        xyz[:, 1] *= -1
        angles[:, :2] *= -1
    steering = _held_against_steering(run, np.deg2rad(angles[:, 0]), xyz, taken, asked=axes is not None)
    track = Track(
        timestamps_us=run.times_us, xyz=xyz, quaternion_xyzw=Rotation.from_euler("ZYX", angles, degrees=True).as_quat()
    )
    routes = _changes(run.commands)
    words = Counter(command for _, command in run.commands if _word(command) not in (*_NO_TURN, *_TEXTS))
    others = [
        Dropped(what="commands", count=count, reason=f"{command[:40]!r} is none of {', '.join(_TEXTS)}")
        for command, count in words.most_common(10)
    ]
    facts = {
        "source": run.source,
        "axes": f"{taken} in the log ({'as asked' if axes else 'by its source'}); x forward, y left, z up here; metres",
        "steering": steering,
        "clock": "seconds of the simulation",
        "point": "CARLA's actor, about the middle of the vehicle; --origin-offset moves it to the rear axle",
        **run.facts,
        **_summary(folder),
    }
    return LoggedDrive(
        name=folder.name,
        cameras=run.cameras,
        track=track,
        point="actor",
        routes=routes,
        dropped=[*run.dropped, *others],
        facts=facts,
    )


def _held_against_steering(
    run: _RunRows, yaw_rad: NDArray[np.float64], xyz: NDArray[np.float64], axes: Axes, *, asked: bool
) -> dict[str, Any]:
    """Compare turns with steering. Raises `UsageError` where the vehicle turns the wrong way, or it cannot be told."""
    time_s = (run.times_us - run.times_us[0]) / 1e6
    speed = np.linalg.norm(np.gradient(xyz[:, :2], time_s, axis=0), axis=1)
    turning = np.gradient(np.unwrap(yaw_rad), time_s)
    counted = (np.abs(run.steer) >= STEERED) & (np.abs(turning) >= TURNING_RADPS) & (speed >= MOVING_MPS)
    rows, agreeing = int(counted.sum()), int((np.sign(turning) == -np.sign(run.steer))[counted].sum())
    found = {"rows": rows, "turning_as_steered": agreeing}
    if asked:
        return found
    other = "left-handed" if axes == "right-handed" else "right-handed"
    remedy = f"Say with --axes {axes} or --axes {other} which the log has"
    if rows < LEAST_ROWS:
        raise UsageError(
            f"{run.source} should be {axes}, but only {rows} frames turn with the wheel turned, too few to make sure. "
            f"{remedy}."
        )
    if agreeing < AGREE * rows:
        raise UsageError(
            f"{run.source} should be {axes}, but in {rows - agreeing} of {rows} frames of turns the vehicle turns "
            f"against its steering. {remedy}."
        )
    return found


def _compare(run: _RunRows, manifest: _RunRows, folder: Path) -> None:
    """Hold telemetry against the manifest of the same run. Raises `UsageError` where they are of different places."""
    shared, here, there = np.intersect1d(run.times_us, manifest.times_us, return_indices=True)
    if not len(shared):
        run.facts["manifest"] = "has no time in common"
        return
    sign = [1, -1 if run.axes == "right-handed" else 1, 1]
    apart = np.linalg.norm(run.places[here] - manifest.places[there] * sign, axis=1)
    if apart.max() > SAME_PLACE_M:
        at = int(np.argmax(apart))
        raise UsageError(
            f"{folder}: at {shared[at] / 1e6:.2f} s telemetry and {MANIFEST} are {apart[at]:.2f} m apart in the same "
            f"axes; they are not of one run. Name one of them as the input."
        )
    run.facts["manifest"] = f"agrees within {apart.max():.3f} m at {len(shared)} times"


def _segments(folder: Path) -> tuple[list[Path], list[Dropped]]:
    """MCAP files of a run in order, and what its index names and is not there."""
    home = folder / TELEMETRY if (folder / TELEMETRY).is_dir() else folder
    single = [folder / "telemetry.mcap"] if (folder / "telemetry.mcap").is_file() else []
    found = sorted(home.glob("segment_*.mcap")) or single
    index = home / INDEX
    if not index.is_file():
        return found, []
    try:
        listed = strict_json.loads(read_regular(index, limit_bytes=_MAX_JSON_BYTES))["segments"]
        names = [Path(str(segment["path"])).name for segment in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return found, [Dropped(what="indices", count=1, reason=f"{index.name} cannot be read ({error})")]
    absent = [name for name in names if not is_file(home / name)]
    lost = [Dropped(what="segments", count=1, reason=f"{name} of {index.name} is not there") for name in absent]
    known = [home / name for name in names if name not in absent]
    return known or found, lost


def _from_telemetry(files: Sequence[Path]) -> _RunRows:
    log = McapLog(files)
    topics = log.topics
    axes: Axes = "right-handed"
    if _TOPICS[axes][0] not in topics:
        axes = "left-handed"
    if _TOPICS[axes][0] not in topics:
        named = " or ".join(state for state, _ in _TOPICS.values())
        raise SourceError(f"{files[0].name} has no {named}; is it of CARLA's recorder? `convert mcap` reads others.")
    state_topic, camera_topic = _TOPICS[axes]
    if camera_topic not in topics:
        raise SourceError(f"{files[0].name} has no {camera_topic}, so no pictures; name {MANIFEST} if there is a film.")
    control, debug = (_topic(topics, word) for word in ("control", "planning_debug"))
    pictures = PictureReader(camera_topic, topics[camera_topic].type, stamps="log")
    states: list[tuple[int, list[float]]] = []
    steers: list[tuple[int, float]] = []
    commands: list[tuple[int, str]] = []
    for message in log.messages({state_topic, camera_topic, *(name for name in (control, debug) if name)}):
        time_us = (message.log_ns + 500) // 1000
        if message.topic == camera_topic:
            pictures.take(message)
            continue
        value = message.read()
        if message.topic == state_topic:
            pose = part(value, "pose") or value
            yaw, *tilt = numbers(pose, "yaw_deg", "pitch_deg", "roll_deg")
            tilt = [0.0 if math.isnan(angle) else angle for angle in tilt]
            states.append((time_us, [*numbers(pose, "x", "y", "z"), yaw, *tilt]))
        elif message.topic == control:
            steers.append((time_us, numbers(value, "steer")[0]))
        elif (command := part(value, "core", "route_command")) is not None:
            commands.append((time_us, str(command)))
    camera, facts, lost = pictures.camera(log)
    dropped = [*log.lost, *lost]
    times, rows = _sound(states, dropped, state_topic)
    steer = np.full(len(times), np.nan)
    if steers:
        known, values = (np.array(column) for column in zip(*sorted(steers), strict=True))
        nearest = np.clip(np.searchsorted(known, times), 0, len(known) - 1)
        steer = np.where(np.abs(known[nearest] - times) <= 50_000, values[nearest], np.nan)
    episode = {key: value[:500] for key, value in log.metadata("episode").items()}
    return _RunRows(
        source=f"{state_topic} of {', '.join(file.name for file in files[:3])}{' ...' if len(files) > 3 else ''}",
        axes=axes,
        times_us=times,
        places=rows[:, :3],
        angles_deg=rows[:, 3:],
        steer=steer,
        commands=commands,
        cameras={FRONT_CAMERA: camera},
        facts={"episode": episode, "camera": facts["form"], "routes": debug or "no topic with route_command"},
        dropped=dropped,
    )


def _topic(topics: Iterable[str], word: str) -> str | None:
    """The vehicle's topic with a word in its name, which older files have elsewhere in it."""
    return next((name for name in sorted(topics) if word in name.split("/") and "ego" in name.split("/")), None)


def _from_manifest(manifest: Path, *, with_film: bool = True) -> _RunRows:
    lines, dropped = _lines(manifest)
    states = []
    for _, line in lines:
        values = numbers(line, "vehicle_x", "vehicle_y", "vehicle_z", "vehicle_yaw_deg")
        states.append((_time_us(line), [*values, 0.0, 0.0]))
    times, rows = _sound(states, dropped, manifest.name)
    steer_of = {_time_us(line): numbers(line, "steer")[0] for _, line in lines}
    cameras: dict[str, Camera] = {}
    if with_film:
        cameras = {FRONT_CAMERA: _film(manifest, lines, dropped)}
    return _RunRows(
        source=manifest.name,
        axes="left-handed",
        times_us=times,
        places=rows[:, :3],
        angles_deg=rows[:, 3:],
        steer=np.array([steer_of[time] for time in times.tolist()]),
        commands=[(_time_us(line), str(line["command"])) for _, line in lines if line.get("command") is not None],
        cameras=cameras,
        facts={"pitch_and_roll": "0, which the manifest has not", "routes": "command"},
        dropped=dropped,
    )


def _lines(manifest: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[Dropped]]:
    """Number and content of the manifest's lines with a time. Raises `SourceError`."""
    found: list[tuple[int, dict[str, Any]]] = []
    bad: list[int] = []
    count = 0
    try:
        regular_size(manifest)
        with manifest.open("rb") as file:
            while (line := file.readline(_MAX_LINE_BYTES + 1)) and count < _MOST_LINES:
                if line.strip():
                    value = None
                    if len(line) <= _MAX_LINE_BYTES:
                        try:
                            value = json.loads(line)
                        except (ValueError, RecursionError):
                            value = None
                    if isinstance(value, dict) and abs(numbers(value, "timestamp")[0]) < MOST_SECONDS:
                        found.append((count, {key: value.get(key) for key in _FIELDS}))
                    else:
                        bad.append(count)
                    count += 1
    except OSError as error:
        raise SourceError(f"{manifest} cannot be read: {error}.") from error
    if not found:
        raise SourceError(f"{manifest} holds no line with a timestamp.")
    episodes = Counter(str(line["episode_id"]) for _, line in found)
    if len(episodes) > 1:
        raise SourceError(f"{manifest} holds {len(episodes)} episodes, and one film cannot be of all; split it.")
    dropped = []
    if bad:
        reason = f"{manifest.name}: line {bad[0] + 1} is no JSON object with a timestamp"
        dropped.append(Dropped(what="lines", count=len(bad), reason=reason))
    return found, dropped


def _film(manifest: Path, lines: Sequence[tuple[int, dict[str, Any]]], dropped: list[Dropped]) -> Camera:
    """The film beside a manifest, whose frame k is line k; else the pictures that its lines name."""
    film = manifest.parent / FILM
    if not film.is_file():
        return _named_pictures(manifest, lines, dropped)
    count = film_frames(film).total
    numbers_of, stamps = [number for number, _ in lines], [_time_us(line) for _, line in lines]
    held = [at for at, number in enumerate(numbers_of) if number < count]
    if len(held) < len(lines):
        reason = f"{FILM} holds {count} frames for {numbers_of[-1] + 1} lines; the last lines are without picture"
        dropped.append(Dropped(what="frames", count=len(lines) - len(held), reason=reason))
    # A line that cannot be read leaves a frame without time: frames are taken up to it, or from it on.
    follows = [numbers_of[at] == numbers_of[at - 1] + 1 and stamps[at] > stamps[at - 1] for at in held]
    breaks = [0, *(at for at in held[1:] if not follows[at]), len(held)]
    first, last = max(pairwise(breaks), key=lambda ends: ends[1] - ends[0])
    if last - first < len(held):
        reason = f"{FILM}: beyond a line whose time cannot be read or does not increase"
        dropped.append(Dropped(what="frames", count=len(held) - (last - first), reason=reason))
    return Film(path=film, times_us=np.array(stamps[first:last], np.int64), first=numbers_of[first])


def _named_pictures(manifest: Path, lines: Sequence[tuple[int, dict[str, Any]]], dropped: list[Dropped]) -> Camera:
    root = manifest.parent.resolve()
    files: list[tuple[int, Path]] = []
    for _, line in lines:
        named = line["front_rgb_path"]
        if not isinstance(named, str):
            continue
        # Paths are of the project that wrote them; what they end with is in the run's folder.
        steps = Path(named).parts
        places = (root.joinpath(*steps[at:]) for at in range(len(steps)) if not Path(*steps[at:]).is_absolute())
        file = next((place for place in places if is_file(place) and place.resolve().is_relative_to(root)), None)
        if file is not None:
            files.append((_time_us(line), file))
    if not files:
        what = f"{root} has neither {FILM} nor the pictures that {manifest.name} names"
        raise SourceError(f"{what}; record with record_video, or name the telemetry.")
    if len(files) < len(lines):
        reason = f"{manifest.name} names no picture that is there"
        dropped.append(Dropped(what="frames", count=len(lines) - len(files), reason=reason))
    times = np.array([time for time, _ in files], np.int64)
    order = increasing(times)

    def read(begin: int, end: int) -> Iterator[bytes]:
        for at in order[begin:end]:
            try:
                yield read_regular(files[at][1], limit_bytes=2**28)
            except OSError as error:
                raise BadClipError("undecodable_video", f"{files[at][1].name} cannot be read: {error}.") from error

    return Pictures(times_us=times[order], read=read)


def _time_us(line: Mapping[str, Any]) -> int:
    return round(float(line["timestamp"]) * 1e6)


def _sound(
    states: Sequence[tuple[int, list[float]]], dropped: list[Dropped], where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keep finite rows, in the order of time. Raises `BadClipError` for fewer than two."""
    times = np.array([time for time, _ in states], np.int64)
    rows = np.array([row for _, row in states], np.float64).reshape(-1, 6)
    finite = (np.abs(rows) < MAX_VALUE).all(axis=1)
    if (~finite).any():
        dropped.append(Dropped(what="poses", count=int((~finite).sum()), reason=f"{where}: not finite"))
    times, rows = times[finite], rows[finite]
    order = increasing(times)
    if len(order) < len(times):
        reason = f"{where}: a row of the same time is there already"
        dropped.append(Dropped(what="poses", count=len(times) - len(order), reason=reason))
    if len(order) < 2:
        raise BadClipError("missing_poses", f"{where} holds {len(order)} usable poses; at least two are needed.")
    return times[order], rows[order]


def _word(command: str) -> str:
    """`RoadOption.LANE_FOLLOW`, `lanefollow` and their like as one word."""
    return command.lower().removeprefix("roadoption.").replace("_", "")


def _changes(commands: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Find the times at which the text changes; a run that only follows its lane has none."""
    routes: list[tuple[int, str]] = []
    for time, command in sorted(commands, key=lambda item: item[0]):
        text = _TEXTS.get(_word(command), "")
        if text != (routes[-1][1] if routes else ""):
            if routes and routes[-1][0] == time:
                routes.pop()
            routes.append((time, text))
    return routes


def _summary(folder: Path) -> dict[str, Any]:
    """Read facts from the run's summary, if it has one."""
    try:
        summary = strict_json.loads(read_regular(folder / SUMMARY, limit_bytes=_MAX_JSON_BYTES))
    except (OSError, ValueError):
        return {}
    names = ("town", "success", "failure_reason", "record_hz", "camera_width", "camera_fov")
    said = {name: summary[name] for name in names if isinstance(summary, dict) and name in summary}
    short = {name: value if isinstance(value, (int, float)) else str(value)[:500] for name, value in said.items()}
    return {"run": short} if short else {}


KIND = Kind(
    name="carla",
    reads="a run's folder with telemetry/ or manifest.jsonl, one of its files, or a folder of runs",
    drives=drives,
    takes=("axes",),
)
