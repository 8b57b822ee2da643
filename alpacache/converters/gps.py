"""A film and a log of a satellite receiver beside it, with or without speed and yaw rate or steering.

    FOLDER/drive.mp4     FOLDER/drive.gpx, drive.nmea or drive.csv     and perhaps FOLDER/drive.vehicle.csv
    FOLDER/GX010001.MP4  of a GoPro, whose fixes are in the film itself

Fixes become metres east, north and up on the ellipsoid, are smoothed forwards and backwards, and the heading is the
course; at standstill it is held. What the smoother knows of its own error is reported, and a stretch on which it knows
too little is refused: so is a log of one fix a second that says no more than places. Where the film belongs in the log
is found from its turns, unless `film_start` says it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.clips import SHORTEST_US
from alpacache.converters.dead_reckoning import yaw_quaternions
from alpacache.converters.drive import Dropped, Film, LoggedDrive
from alpacache.converters.film_clock import FilmStart, find_start, shown_us, turning_of
from alpacache.converters.fix_path import TOLD, SmoothPath, VehicleMotion, driven_path, path_of
from alpacache.converters.fixes import Fixes, read_fixes
from alpacache.converters.gopro import film_fixes
from alpacache.converters.kind import Kind
from alpacache.converters.log_files import UnusableError, poses_alone
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.camera_files import FILMS

READS = (
    "a log (.gpx, .nmea, .csv), with a film of the same name beside it (.mp4, .mov, .mkv), a film of a GoPro, or a "
    "folder of such"
)
LOGS = (".gpx", ".nmea", ".csv", ".txt", ".log")
CERTAIN = (".gpx", ".nmea", ".csv")
"""Endings of logs that no other text has."""
VEHICLE = ".vehicle.csv"
MAX_GAP_S = 1.5
"""Time without a fix after which a new stretch begins; with a vehicle's speed and yaw rate `MAX_OUTAGE_S`."""
MAX_OUTAGE_S = 5.0


class _Parts(NamedTuple):
    """The files of a drive."""

    film: Path | None
    log: Path
    """The film itself where no log is beside it: a GoPro writes its fixes there."""
    vehicle: Path | None


def drives(place: Path, *, film_start: str | None = None) -> Iterator[LoggedDrive | Dropped]:
    """The films at `place` with their logs, by name."""
    pairs = _pairs(place)
    for film, log, vehicle in pairs:
        try:
            yield from film_drives(film, log, vehicle, film_start=film_start)
        except BadClipError as error:
            yield Dropped(what="drives", count=1, reason=f"{(film or log).name}: {error}")
    if place.is_dir():
        taken = {parts.log for parts in pairs}
        logs = sorted(file for file in place.iterdir() if _ending(file) in CERTAIN and not file.name.endswith(VEHICLE))
        if alone := [log.name for log in logs if log not in taken]:
            reason = f"{alone[0]}: no film of that name is beside it; named by itself, it gives its poses alone"
            yield Dropped(what="logs", count=len(alone), reason=reason)


def film_drives(
    film: Path | None, log: Path, vehicle: Path | None, *, film_start: str | None
) -> Iterator[LoggedDrive | Dropped]:
    """Stretches of one film that can be used. Raises `BadClipError`."""
    fixes = film_fixes(log) if log == film else read_fixes(log)
    if fixes is None:
        raise UnusableError(f"no log is beside it ({log.stem}.gpx, .nmea or .csv), and it has no telemetry of a GoPro")
    beside = None if vehicle is None else read_fixes(vehicle)
    motion = _motion_of(fixes, beside)
    breaks_us = [*fixes.breaks_us, *(() if beside is None else beside.breaks_us)]
    has_places = _has_places(fixes, motion, log)
    if has_places and motion is not None:
        fixes = _within(fixes, motion)
    gap_s = MAX_OUTAGE_S if motion is not None and has_places else MAX_GAP_S
    rows_us = fixes.times_us if has_places or motion is None else motion.times_us
    dropped = list(fixes.dropped)
    paths, short = [], 0
    for begin, end in _stretches(rows_us, gap_s, breaks_us):
        if rows_us[end - 1] - rows_us[begin] < SHORTEST_US:
            short += 1
            continue
        try:
            if motion is not None and not has_places:
                paths.append(driven_path(motion, begin, end))
            else:
                paths.append(path_of(fixes, begin, end, motion))
        except UnusableError as error:
            first_s, last_s = ((rows_us[at] - rows_us[0]) / 1e6 for at in (begin, end - 1))
            reason = f"{log.name}, {first_s:.1f} to {last_s:.1f} s: {error}"
            dropped.append(Dropped(what="stretches", count=1, reason=reason))
    if short:
        between = f"between gaps of more than {gap_s:g} s or settings of the clock in {log.name}"
        reason = f"shorter than {SHORTEST_US / 1e6:.1f} s, {between}"
        dropped.append(Dropped(what="stretches", count=short, reason=reason))
    if not paths:
        raise UnusableError("; ".join(f"{drop.what} ({drop.count}): {drop.reason}" for drop in dropped))
    if film is None:
        times_us, clock = np.empty(0, dtype=np.int64), "none"
    else:
        shown = shown_us(film)
        start_us, clock = (
            (0, "its own") if log == film and film_start is None else (_film_start(film, film_start, fixes, paths))
        )
        times_us = start_us + shown
        if not any(_reaches(times_us, path) for path in paths):
            since, until = (_clock(rows_us[at], fixes.absolute) for at in (0, -1))
            raise UnusableError(
                f"the film, {clock}, does not reach into its log from {since} to {until}; a time in UTC is that of one "
                "film, seconds after the log's first row may be those of every film in a folder (--film-start)"
            )
    for number, path in enumerate(paths):
        first, last = _shown_within(times_us, path)
        if film is not None and not _reaches(times_us, path):
            reason = (
                f"the film does not reach into the log's stretch from {_clock(path.times_us[0], fixes.absolute)} on"
            )
            dropped.append(Dropped(what="stretches", count=1, reason=reason))
            continue
        yield LoggedDrive(
            name=log.stem if len(paths) == 1 else f"{log.stem}-{number + 1}",
            cameras={} if film is None else {FRONT_CAMERA: Film(path=film, times_us=times_us[first:last], first=first)},
            track=Track(timestamps_us=path.times_us, xyz=path.xyz, quaternion_xyzw=yaw_quaternions(path.yaw_rad)),
            point="antenna" if has_places else "rear axle",
            dropped=() if film is not None else (poses_alone(f"no film is beside {log.name}"),),
            facts={**fixes.facts, **path.facts, "film": clock},
            told=TOLD if film is None else (*TOLD, "film"),
        )
    yield from dropped


def _stretches(times_us: NDArray[np.int64], gap_s: float, breaks_us: Sequence[int]) -> list[tuple[int, int]]:
    """Rows from one index up to another without a gap, and without a time from which on the clock is another."""
    gaps = np.flatnonzero(np.diff(times_us) > gap_s * 1e6) + 1
    cuts = np.union1d(gaps, np.searchsorted(times_us, np.array(breaks_us, dtype=np.int64)))
    return list(pairwise([0, *cuts[(cuts > 0) & (cuts < len(times_us))].tolist(), len(times_us)]))


def _has_places(fixes: Fixes, motion: VehicleMotion | None, log: Path) -> bool:
    """Tell whether the rows have places; raises `UnusableError` if some have not, or nothing stands in for them."""
    has = np.isfinite(fixes.values["latitude"]) & np.isfinite(fixes.values["longitude"])
    if has.all():
        return True
    if has.any():
        raise UnusableError("some rows have no place; leave them out, or put speed and yaw rate into NAME.vehicle.csv")
    if motion is None or motion.steering:
        lacking = f"{log.name} has no latitude and longitude"
        raise UnusableError(f"{lacking}, nor in their place speed and yaw_rate, four times a second or more")
    return False


def _within(fixes: Fixes, motion: VehicleMotion) -> Fixes:
    """The fixes of the time in which the vehicle's own log says how it moves. Raises `UnusableError` without any."""
    inside = (fixes.times_us >= motion.times_us[0]) & (fixes.times_us <= motion.times_us[-1])
    if inside.sum() < 2:
        raise UnusableError("the vehicle's log and the fixes have no time in common; are they on one clock?")
    dropped = list(fixes.dropped)
    if lost := int((~inside).sum()):
        dropped.append(Dropped(what="rows", count=lost, reason="the vehicle's own log does not reach so far"))
    values = {name: column[inside] for name, column in fixes.values.items()}
    return replace(fixes, times_us=fixes.times_us[inside], values=values, dropped=dropped)


def _motion_of(fixes: Fixes, vehicle: Fixes | None) -> VehicleMotion | None:
    """Speed and yaw rate or steering, of the vehicle's log or of the fixes' own."""
    source = fixes if vehicle is None else vehicle
    turning = next((name for name in ("yaw_rate", "steering") if source.has(name)), None)
    if turning is None or not source.has("speed"):
        if vehicle is None:
            return None
        raise UnusableError("the vehicle's log needs a column speed, and yaw_rate or steering")
    if vehicle is not None and vehicle.absolute != fixes.absolute:
        raise UnusableError("one of both logs has times of 1970 and the other has not; write both on one clock")
    rows = np.isfinite(source.values["speed"]) & np.isfinite(source.values[turning])
    if rows.sum() < 2 or np.median(np.diff(source.times_us[rows])) > 0.25e6:
        return None
    return VehicleMotion(
        times_us=source.times_us[rows],
        speed_mps=source.values["speed"][rows],
        yaw_rate=source.values[turning][rows],
        steering=turning == "steering",
    )


def _shown_within(times_us: NDArray[np.int64], path: SmoothPath) -> tuple[int, int]:
    """First of the frames that are shown while a path is driven, and the first behind them."""
    first, last = np.searchsorted(times_us, [path.times_us[0], path.times_us[-1]], side="left").tolist()
    return first, last


def _reaches(times_us: NDArray[np.int64], path: SmoothPath) -> bool:
    first, last = _shown_within(times_us, path)
    return last - first >= 2


def _film_start(film: Path, written: str | None, fixes: Fixes, paths: Sequence[SmoothPath]) -> tuple[int, str]:
    """Time of the first frame (us), and in words where that is from."""
    first_us = int(fixes.times_us[0])
    if written is not None and written != "estimate":
        return _given_start(written, fixes), f"first frame at {written}, as given"
    longest = max(paths, key=lambda path: path.times_us[-1] - path.times_us[0])
    found = find_start(turning_of(film), (longest.times_us - first_us) / 1e6, longest.yaw_rad)
    if not isinstance(found, FilmStart):
        remedy = "say when its first frame was taken: --film-start 2026-05-01T10:00:00.25Z, or seconds into the log"
        raise UnusableError(f"where the film belongs in the log cannot be told from its turns: {found}; {remedy}")
    said = f"first frame {found.seconds:+.2f} s into the log, found from its turns"
    return first_us + round(found.seconds * 1e6), f"{said} (error {found.error_s:.2f} s, likeness {found.likeness:.2f})"


def _given_start(written: str, fixes: Fixes) -> int:
    try:
        return int(fixes.times_us[0]) + round(float(written.removesuffix("s")) * 1e6)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(written)
    except ValueError as error:
        raise UsageError(
            f"--film-start {written} is neither a time such as 2026-05-01T10:00:00.25Z nor seconds into the log."
        ) from error
    if not fixes.absolute:
        raise UsageError(f"--film-start {written} is a date, and the log's times are none; give seconds into the log.")
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return round(at.timestamp() * 1e6)


def _clock(time_us: int, absolute: bool) -> str:
    if absolute:
        return datetime.fromtimestamp(int(time_us) / 1e6, UTC).isoformat()
    return f"{int(time_us) / 1e6:.3f} s"


def _pairs(place: Path) -> list[_Parts]:
    """Film, log and vehicle's log of each drive. Raises `UsageError` where it is not clear which belong together."""
    if not place.exists():
        raise UsageError(f"{place} does not exist; expected {READS}.")
    files = sorted(entry for entry in (place if place.is_dir() else place.parent).iterdir() if entry.is_file())
    films = [file for file in files if _ending(file) in FILMS]
    logs = [file for file in files if _ending(file) in LOGS and not file.name.endswith(VEHICLE)]
    if place.is_dir() and films:
        return [_of_film(film, logs, files) for film in films]
    if place.is_dir() and logs:
        return [_of_log(log, [], files) for log in logs]
    if place in films:
        return [_of_film(place, logs, files)]
    if place in logs:
        return [_of_log(place, films, files)]
    raise UsageError(f"{place} is neither a film nor a log, nor holds one; expected {READS}.")


def _of_film(film: Path, logs: Sequence[Path], files: Sequence[Path]) -> _Parts:
    own = [log for log in logs if log.stem == film.stem]
    if len(own) > 1:
        found = " and ".join(log.name for log in own)
        raise UsageError(f"{film}: {found} are beside it; keep the log that belongs to it.")
    return _of_log(own[0] if own else film, [film], files)


def _of_log(log: Path, films: Sequence[Path], files: Sequence[Path]) -> _Parts:
    own = [film for film in films if film.stem == log.stem]
    if len(own) > 1:
        raise UsageError(f"{log}: {' and '.join(film.name for film in own)} are beside it; name the film.")
    vehicle = next((file for file in files if file.name == f"{log.stem}{VEHICLE}"), None)
    return _Parts(own[0] if own else None, log, vehicle)


def _ending(file: Path) -> str:
    return file.suffix.lower()


KIND = Kind(name="gps", reads=READS, drives=drives, takes=("film_start",))
