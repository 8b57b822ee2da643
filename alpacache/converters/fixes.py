"""Logs of satellite receivers and vehicles as tables of fixes: GPX, NMEA and CSV.

All come out in the same units: seconds, degrees, metres, metres a second, radians left positive. A unit that a file
does not say is not guessed: names of columns carry it, and times without a unit must have one in which their steps
make sense. GPX and NMEA are read with what Python has; three sentences of NMEA are all that is needed.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.drive import Dropped
from alpacache.converters.log_files import UnusableError, read_text
from alpacache.driving.poses import MAX_VALUE
from alpacache.driving.sample import Floats

KNOT_MPS, MPH_MPS = 0.514444, 0.44704
MAX_ROWS, MAX_BYTES = 4_000_000, 2**26
DAY_US = 86_400_000_000
STEPS_S = (0.004, 2.4)
"""Median step of a log that is of use; a unit of time in which it lies within is the right one."""
CENTURY_S = (946e6, 4102e6)
"""Years 2000 to 2099, in seconds of 1970."""
UNITS_S: Mapping[str, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

TIMES = ("time", "timestamp", "t", "utc", "datetime", "date_time", "utc_time", "epoch", "unix", "unix_time", "elapsed")
NUMBERS: Mapping[str, tuple[str, float]] = {
    **dict.fromkeys(("latitude", "lat", "latitude_deg", "lat_deg", "gps_latitude"), ("latitude", 1.0)),
    **dict.fromkeys(
        ("longitude", "lon", "lng", "long", "longitude_deg", "lon_deg", "gps_longitude"), ("longitude", 1.0)
    ),
    **dict.fromkeys(("altitude", "alt", "height", "ele", "elevation", "altitude_m", "height_m"), ("height", 1.0)),
    **dict.fromkeys(("speed", "speed_mps", "speed_m_s", "speed_ms", "velocity", "velocity_mps"), ("speed", 1.0)),
    **dict.fromkeys(("speed_kmh", "speed_kph", "speed_km_h", "velocity_kmh"), ("speed", 1 / 3.6)),
    **dict.fromkeys(("speed_mph",), ("speed", MPH_MPS)),
    **dict.fromkeys(("speed_knots", "speed_kn", "speed_kt", "speed_kts"), ("speed", KNOT_MPS)),
    **dict.fromkeys(
        ("course", "bearing", "heading", "cog", "course_deg", "bearing_deg", "heading_deg", "azimuth_deg"),
        ("course", 1.0),
    ),
    **dict.fromkeys(("yaw_rate", "yaw_rate_radps", "yaw_rate_rad_s", "gyro_z_radps"), ("yaw_rate", 1.0)),
    **dict.fromkeys(("yaw_rate_degps", "yaw_rate_deg_s", "yaw_rate_dps"), ("yaw_rate", float(np.pi / 180))),
    **dict.fromkeys(("steering", "steering_angle", "steering_deg", "steering_rad"), ("steering", 1.0)),
    **dict.fromkeys(
        ("accuracy", "horizontal_accuracy", "horizontalaccuracy", "accuracy_m", "hacc", "hacc_m"), ("accuracy", 1.0)
    ),
}
"""Name of a CSV column -> what it is, and its unit in that of `Fixes`."""
COLUMNS = ("latitude", "longitude", "height", "speed", "course", "yaw_rate", "steering", "accuracy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixes:
    """Rows of a log by time; NaN where a row does not say."""

    times_us: NDArray[np.int64]
    """`[N]`, increasing; of 1970 if `absolute`."""
    absolute: bool
    values: Mapping[str, Floats]
    """Column -> `[N]`: latitude, longitude (degrees), height (m), speed (m/s), course (degrees, 0 = north, clockwise),
    yaw_rate (rad/s, left positive), steering (of any unit and sign), accuracy (m)."""
    breaks_us: Sequence[int] = ()
    """Times of rows before which the log's clock was set: how long the row before is ago is not known."""
    dropped: Sequence[Dropped] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self.values[name]).any())


def read_fixes(file: Path) -> Fixes:
    """Rows of a log, by its ending. Raises `UnusableError`."""
    readers: dict[str, Callable[[str, str], Fixes]] = {".gpx": gpx_fixes, ".csv": csv_fixes}
    reader = readers.get(file.suffix.lower(), nmea_fixes)
    text = read_text(file, limit_bytes=MAX_BYTES, is_mixed=reader is nmea_fixes)
    fixes = reader(text, file.name)
    if len(fixes.times_us) < 2:
        why = "; ".join(f"{drop.count} {drop.what}: {drop.reason}" for drop in fixes.dropped) or "it has no others"
        raise UnusableError(f"{file.name} has {len(fixes.times_us)} rows with a time and a fix ({why})")
    return fixes


def gpx_fixes(text: str, name: str) -> Fixes:
    """Points of all tracks of a GPX file."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UnusableError(f"{name} has a document type with entities of its own; GPX needs none, take that out")
    try:
        rows, lost = _gpx_rows(io.BytesIO(text.encode()))
    except ElementTree.ParseError as error:
        raise UnusableError(f"{name} is not well-formed XML ({error}); it may be cut off, export it again") from error
    facts = {"format": "GPX", "clock": "UTC of the points", "speed": "m/s", "course": "degrees, 0 = north, clockwise"}
    return _table(rows, {"lat": "latitude", "lon": "longitude", "ele": "height"}, lost, facts, absolute=True)


def _gpx_rows(file: BinaryIO) -> tuple[list[tuple[int, dict[str, float]]], "_Lost"]:
    """Points of all tracks, one element after the other. Raises `ElementTree.ParseError`."""
    rows: list[tuple[int, dict[str, float]]] = []
    lost, number = _Lost(), 0
    for _, point in ElementTree.iterparse(file):  # noqa: S314 (no entities, see above)
        if _local(point) != "trkpt":
            continue
        number += 1
        said = {_local(node): (node.text or "").strip() for node in point.iter() if node is not point}
        said |= {_local_name(key): value for key, value in point.attrib.items()}
        point.clear()
        try:
            row = {key: float(said[key]) for key in ("lat", "lon", "ele", "speed", "course") if said.get(key)}
            time_us = _iso_us(said["time"])
        except UnusableError:
            raise
        except (KeyError, ValueError):
            lost.add("points", "without a time or with a number that is none", f"point {number}")
            continue
        if said.get("fix") == "none":
            lost.add("points", "without a fix", f"point {number}")
            continue
        rows.append((time_us, row))
    return rows, lost


def nmea_fixes(text: str, name: str) -> Fixes:
    """Fixes of an NMEA 0183 log: RMC for date, time, place, speed and course, GGA for the height, GST for errors."""
    lost, epochs = _Lost(), list[tuple[int, dict[str, float]]]()
    day_us = None
    for number, line in enumerate(text.splitlines(), start=1):
        found = re.search(r"\$([A-Z]{2})(RMC|GGA|GST),([^*$]*)\*([0-9A-Fa-f]{2})", line)
        if found is None:
            continue
        body = line[found.start() + 1 : found.end() - 3]
        where, fields = f"line {number}", found[3].split(",")
        if _checksum(body) != int(found[4], 16):
            lost.add("sentences", "their checksum does not fit", where)
            continue
        try:
            kind = found[2]
            if (kind == "RMC" and fields[1] != "A") or (kind == "GGA" and fields[5] in ("", "0")):
                lost.add("sentences", f"without a fix ({'V' if kind == 'RMC' else '0'})", where)
                continue
            seconds_us = _of_day_us(fields[0])
            if kind == "RMC":
                day_us = _date_us(fields[8])
                values = {"latitude": _degrees(fields[2], fields[3]), "longitude": _degrees(fields[4], fields[5])}
                values |= {"speed": float(fields[6]) * KNOT_MPS} if fields[6] else {}
                values |= {"course": float(fields[7])} if fields[7] else {}
            elif day_us is None:
                continue  # nothing has said the date yet
            elif kind == "GGA":
                values = {"latitude": _degrees(fields[1], fields[2]), "longitude": _degrees(fields[3], fields[4])}
                values |= {"height": float(fields[8]) + float(fields[10] or 0)} if fields[8] else {}
            else:
                values = {"accuracy": float(np.hypot(float(fields[5]), float(fields[6])))} if fields[5] else {}
        except UnusableError:
            raise
        except (ValueError, IndexError):
            lost.add("sentences", "a field is no number", where)
            continue
        time_us = day_us + seconds_us
        if kind != "RMC" and epochs and time_us < epochs[-1][0] - DAY_US // 2:
            time_us += DAY_US  # the first sentence after midnight; the date comes with the next
        own = next((said for at_us, said in epochs[-2:] if at_us == time_us), None)
        if own is None:  # a clock that was set back says the same times again, of other places
            epochs.append((time_us, own := {}))
        own.update(values)
    rows = [(time_us, said) for time_us, said in epochs if "latitude" in said]
    if not rows and not lost:
        raise UnusableError(f"{name} holds no RMC sentence of NMEA 0183, nor is it named .gpx or .csv")
    facts = {
        "format": "NMEA 0183 (RMC, GGA, GST)",
        "clock": "UTC of the sentences",
        "speed": "knots",
        "course": "degrees, 0 = north, clockwise",
        "height": "above the ellipsoid",
    }
    return _table(rows, {}, lost, facts, absolute=True)


def csv_fixes(text: str, name: str) -> Fixes:
    """Rows of a CSV table with names of columns in its first line."""
    delimiter = _delimiter(text)
    lines = csv.reader(text.replace("\0", "").splitlines(), delimiter=delimiter)
    heads = [_plain(head) for head in next(lines, [])]
    time_at, unit = _time_column(heads, name)
    columns = {at: NUMBERS[head] for at, head in enumerate(heads) if head in NUMBERS}
    if twice := [what for what, _ in columns.values() if [other for other, _ in columns.values()].count(what) > 1]:
        raise UnusableError(f"{name} has two columns of {twice[0]}; keep one of them")
    lost, stamps, rows = _Lost(), list[str](), list[dict[str, float]]()
    for number, line in enumerate(lines, start=2):
        if not any(cell.strip() for cell in line):
            continue
        if any(cell.strip() for cell in line[len(heads) :]):
            why = "more fields than columns; between commas, numbers need decimal points"
            lost.add("rows", why, f"line {number}")
            continue
        try:
            line = line if delimiter == "," else list(map(_with_point, line))
            stamp = line[time_at].strip()
            row = {what: float(line[at]) * scale for at, (what, scale) in columns.items() if line[at].strip()}
        except (IndexError, ValueError):
            lost.add("rows", "a field is no number, or absent", f"line {number}")
            continue
        if not stamp or _is_endless(stamp):
            lost.add("rows", "without a time", f"line {number}")
            continue
        stamps.append(stamp)
        rows.append(row)
    times_us, absolute, clock = _csv_times(stamps, unit, heads[time_at], name)
    units = {heads[at]: what if scale == 1 else f"{what}, times {scale:.6g}" for at, (what, scale) in columns.items()}
    left = [head for at, head in enumerate(heads) if at != time_at and at not in columns and head]
    facts = {"format": "CSV", "clock": clock, **units, "columns not read": ", ".join(left) or "none"}
    return _table(list(zip(times_us, rows, strict=True)), {}, lost, facts, absolute=absolute)


class _Lost:
    """Rows that are left out, counted by reason."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, what: str, why: str, where: str) -> None:
        self._found.setdefault((what, why), [0, where])[0] += 1

    def items(self) -> list[Dropped]:
        return [
            Dropped(what=what, count=count, reason=f"{why}, the first at {where}")
            for (what, why), (count, where) in self._found.items()
        ]


def _table(
    rows: Sequence[tuple[int, Mapping[str, float]]],
    names: Mapping[str, str],
    lost: _Lost,
    facts: Mapping[str, str],
    *,
    absolute: bool,
) -> Fixes:
    from alpacache.converters.log_files import increasing_part

    if len(rows) > MAX_ROWS:
        raise UnusableError(f"{len(rows):,} rows; at most {MAX_ROWS:,} are read. Cut the log into parts.")
    times_us = np.array([time_us for time_us, _ in rows], dtype=np.int64)
    values = {name: np.full(len(rows), np.nan) for name in COLUMNS}
    for at, (_, row) in enumerate(rows):
        for key, value in row.items():
            values[names.get(key, key)][at] = value
    with np.errstate(invalid="ignore"):
        away = (np.abs(values["latitude"]) > 90) | (np.abs(values["longitude"]) > 180)
        nowhere = (values["latitude"] == 0) & (values["longitude"] == 0)  # what receivers write without a fix
        beyond = np.any([np.abs(column) > MAX_VALUE for column in values.values()], axis=0)
    bad = away | nowhere | beyond
    for at in np.flatnonzero(bad).tolist():
        lost.add("rows", "no place on earth, or 0, 0", f"row {at + 1}")
    kept = np.flatnonzero(~bad)
    forth = kept[increasing_part(times_us[kept])]
    for at in np.setdiff1d(kept, forth).tolist():
        beside = forth[forth < at][-1] if (forth < at).any() else forth[0]
        lost.add("rows", "out of the order of time", f"row {at + 1}, {(times_us[at] - times_us[beside]) / 1e6:+.1f} s")
    return Fixes(
        times_us=times_us[forth],
        absolute=absolute,
        values={name: column[forth] for name, column in values.items()},
        breaks_us=_breaks_us(times_us, np.setdiff1d(kept, forth), forth),
        dropped=lost.items(),
        facts=facts,
    )


def _breaks_us(times_us: NDArray[np.int64], left: NDArray[np.intp], kept: NDArray[np.intp]) -> list[int]:
    """Times of kept rows that follow rows left out of the order of time.

    One row in the wrong place is no more than that, but a clock that goes on from another time has been set.
    """
    places = np.searchsorted(kept, left)
    inner = [int(place) for place in np.unique(places) if 0 < place < len(kept)]
    return [int(times_us[kept[place]]) for place in inner if len(np.unique(times_us[left[places == place]])) > 1]


def _csv_times(stamps: Sequence[str], unit: str | None, head: str, name: str) -> tuple[list[int], bool, str]:
    """Microseconds, whether they are of 1970, and in words."""
    try:
        numbers = np.array([float(stamp) for stamp in stamps])
    except ValueError:
        try:
            return [_iso_us(stamp) for stamp in stamps], True, f"{head}, as UTC"
        except UnusableError:
            raise
        except ValueError as error:
            raise UnusableError(f"{name}: column {head} holds neither numbers nor ISO times ({error})") from error
    if len(numbers) < 2:
        return [round(value) for value in numbers], False, head
    if unit is None:
        unit = _unit_of(numbers, head, name)
    # whole numbers are kept whole: a double does not hold nanoseconds of today
    scale = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}[unit]
    if unit == "ns":
        times = [int(stamp) // 1000 if stamp.isdigit() else round(float(stamp) / 1000) for stamp in stamps]
    else:
        times = [round(float(stamp) * scale) for stamp in stamps]
    absolute = times[0] > 10**15 * 0.6  # 1989 on; a device that has run so long since its start there is none
    return times, absolute, f"{head} in {unit}, {'since 1970' if absolute else 'of a clock of its own'}"


def _is_endless(stamp: str) -> bool:
    """Tell whether a time is NaN or infinite."""
    try:
        return not math.isfinite(float(stamp))
    except ValueError:  # in words, or no time at all
        return False


def _unit_of(numbers: Floats, head: str, name: str) -> str:
    """The unit in which times are of this century, or else the one in which their steps make sense."""
    steps = np.diff(numbers)
    step = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
    dated = [word for word, scale in UNITS_S.items() if CENTURY_S[0] < numbers[0] * scale < CENTURY_S[1]]
    fitting = [word for word, scale in UNITS_S.items() if STEPS_S[0] <= step * scale <= STEPS_S[1]]
    found = [word for word in dated if word in fitting] or fitting
    if len(found) != 1:
        remedy = f"name it {head}_s, {head}_ms, {head}_us or {head}_ns"
        raise UnusableError(f"{name}: the unit of {head} is not clear (median step {step:g}); {remedy}")
    return found[0]


def _time_column(heads: Sequence[str], name: str) -> tuple[int, str | None]:
    for at, head in enumerate(heads):
        stem, _, unit = head.rpartition("_")
        unit = {"usec": "us", "msec": "ms", "nsec": "ns", "sec": "s", "seconds": "s", "nanos": "ns"}.get(unit, unit)
        if head in TIMES:
            return at, None
        if stem in TIMES and unit in UNITS_S:
            return at, unit
    raise UnusableError(f"{name} has no column of times; expected one named {', '.join(TIMES[:4])} or such as time_ms")


def _plain(head: str) -> str:
    """`Speed (km/h)` as `speed_km_h`."""
    return re.sub(r"[^a-z0-9]+", "_", head.strip().lower()).strip("_")


def _with_point(cell: str) -> str:
    """`48,137` as `48.137`: tables with another delimiter than the comma are written with it for the decimal point."""
    return re.sub(r"^(\s*[+-]?\d+),(\d+)", r"\1.\2", cell)


def _delimiter(text: str) -> str:
    first = text.partition("\n")[0]
    return max(",;\t", key=first.count)


def _refuse_leap(text: str, second: str) -> None:
    """Refuse a log across a leap second: times behind it would come a second too soon. Raises `UnusableError`."""
    if second == "60":
        raise UnusableError(f"{text[:40]} is a leap second, which a clock of 1970 does not have; cut the log there")


def _iso_us(text: str) -> int:
    if found := re.search(r"\d:\d\d:(\d\d)", text):
        _refuse_leap(text, found[1])
    at = datetime.fromisoformat(text.strip())
    since = (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _of_day_us(text: str) -> int:
    """`hhmmss.ss` as microseconds of the day."""
    if not re.fullmatch(r"\d{6}(\.\d{1,6})?", text):
        raise ValueError(text)
    _refuse_leap(text, text[4:6])
    return (int(text[:2]) * 3600 + int(text[2:4]) * 60) * 1_000_000 + round(float(text[4:]) * 1e6)


def _date_us(text: str) -> int:
    """`ddmmyy` as microseconds of 1970; GPS itself began in 1980, which a receiver says that does not know the date."""
    year = int(text[4:6])
    day = datetime((1900 if year >= 80 else 2000) + year, int(text[2:4]), int(text[:2]), tzinfo=UTC)
    return int(day.timestamp()) * 1_000_000


def _degrees(text: str, side: str) -> float:
    """`ddmm.mmmm` and a side as degrees."""
    whole, _, _ = text.partition(".")
    value = float(whole[:-2] or 0) + float(text[len(whole) - 2 :]) / 60
    return {"N": value, "E": value, "S": -value, "W": -value}[side] if side in "NESW" and side else float(side)


def _checksum(body: str) -> int:
    value = 0
    for character in body:
        value ^= ord(character)
    return value


def _local(node: Any) -> str:
    return _local_name(node.tag) if isinstance(node.tag, str) else ""


def _local_name(name: str) -> str:
    return name.rpartition("}")[2].lower()
