"""Udacity's simulator: three cameras' JPEG files and a log of steering and speed, without poses.

    driving_log.csv                               center, left, right, steering, throttle, brake, speed (miles an hour)
    IMG/center_2016_12_01_13_30_48_287.jpg        the time of the row: to the millisecond, of no zone

The poses are integrated from speed and steering with a kinematic bicycle model, whose wheelbase and full lock are
assumptions: the path has the right shape over seconds and drifts over minutes. It is good for trying things out; metres
are not to be reported on it. Rows in which the vehicle reverses are left out, since the log's speed has no sign.
"""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alpacache.converters.dead_reckoning import dead_reckoned
from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.converters.kind import Kind
from alpacache.converters.log_files import folder_of, inside, pictures_of, poses_alone, read_text
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError, UsageError

READS = "the folder that the simulator wrote, with driving_log.csv and IMG/"
MPS_A_MPH = 0.44704
MAX_GAP_S = 0.5
"""Longest hole between two rows of one drive, be it a pause or one that the simulator left."""
FULL_LOCK_DEG = 23.5
"""An assumption: the simulator's wheels turn by 25 degrees, but its tyres slip. With 25 the paths of the recordings
that were tried turned too far, and about 23.5 fitted them; other speeds and tracks may want another."""
WHEELBASE_M = 2.5
BRAKE_REVERSES_MPS, STANDING_MPS = 5 * MPS_A_MPH, 0.3
_NAME = re.compile(r"center_(\d{4}_\d{2}_\d{2}_\d{2}_\d{2}_\d{2})_(\d{1,3})\.jpg")


class Row(NamedTuple):
    """One row of the log."""

    time_us: int
    picture: Path
    steering: float
    """-1 is full lock left, 1 full lock right."""
    throttle: float
    brake: float
    speed_mps: float


def drives(
    place: Path, *, wheelbase_m: float = WHEELBASE_M, full_lock_deg: float = FULL_LOCK_DEG
) -> Iterator[LoggedDrive | Dropped]:
    """The drives of a recording: its stretches without a pause."""
    root = folder_of(place, reads=READS)
    try:
        rows, dropped = read_log(root)
    except BadClipError as error:
        raise UsageError(f"{error}.") from error
    forwards = without_reversing(rows)
    if reversed_rows := len(rows) - len(forwards):
        dropped.append(Dropped(what="rows", count=reversed_rows, reason="the vehicle reverses in them"))
    yield from dropped
    has_pictures = (root / "IMG").is_dir()
    for stretch in stretches(forwards):
        xyz, quaternion = integrated(stretch, wheelbase_m=wheelbase_m, full_lock_rad=math.radians(full_lock_deg))
        times_us = np.array([row.time_us for row in stretch], dtype=np.int64)
        yield LoggedDrive(
            name=f"udacity-{datetime.fromtimestamp(stretch[0].time_us / 1e6, UTC):%Y%m%d-%H%M%S-%f}",
            cameras={FRONT_CAMERA: pictures_of([row.picture for row in stretch], times_us)} if has_pictures else {},
            track=Track(timestamps_us=times_us, xyz=xyz, quaternion_xyzw=quaternion),
            point="rear axle",
            facts={
                "poses": "integrated from speed and steering (kinematic bicycle), not recorded; they drift",
                "wheelbase_m": wheelbase_m,
                "full_lock_deg": full_lock_deg,
                "speed": "miles an hour",
                "clock": "the pictures' names, taken as UTC, to the millisecond",
            },
        )


def read_log(recording: Path) -> tuple[list[Row], list[Dropped]]:
    """Rows by time, of rows with one time the first, and what was skipped. Raises `BadClipError`, `UsageError`."""
    log = recording / "driving_log.csv"
    if not log.is_file():
        raise UsageError(f"{log} is not there; expected {READS}.")
    has_pictures = (recording / "IMG").is_dir()
    rows: dict[int, Row] = {}
    skipped: dict[str, list[str]] = {}
    for number, line in enumerate(csv.reader(read_text(log).replace("\0", "").splitlines()), start=1):
        if not any(field.strip() for field in line) or (number == 1 and line[0].strip() == "center"):
            continue
        row = _row(recording, line, number)
        if not all(map(math.isfinite, (row.steering, row.throttle, row.brake, row.speed_mps))):
            skipped.setdefault("a number in them is not finite", []).append(f"line {number}")
        elif has_pictures and not row.picture.is_file():
            skipped.setdefault("their picture is not there", []).append(f"line {number}: {row.picture.name}")
        else:
            rows.setdefault(row.time_us, row)
    dropped = [
        Dropped(what="rows", count=len(lines), reason=f"{why}, the first in {lines[0]}")
        for why, lines in skipped.items()
    ]
    if not has_pictures:
        dropped.append(poses_alone("IMG/ is not there"))
    return [rows[time_us] for time_us in sorted(rows)], dropped


def _row(recording: Path, line: Sequence[str], number: int) -> Row:
    where = f"driving_log.csv, line {number}"
    name = re.split(r"[\\/]", line[0].strip())[-1]  # paths are those of the machine that recorded
    found = _NAME.fullmatch(name)
    if found is None or len(line) < 7:
        raise UsageError(f"{where}: {','.join(line)[:120]} is no row of the simulator's log; expected {READS}.")
    if len(line) > 7 or any("," in field for field in line[3:7]):
        raise UsageError(f"{where}: {len(line)} fields in place of 7; write numbers with decimal points, not commas.")
    try:
        second = datetime.strptime(found[1], "%Y_%m_%d_%H_%M_%S").replace(tzinfo=UTC)
        steering, throttle, brake, speed = map(float, line[3:7])
    except ValueError as error:
        raise UsageError(f"{where}: {error}.") from error
    time_us = int(second.timestamp()) * 1_000_000 + int(found[2]) * 1_000
    return Row(time_us, inside(recording, f"IMG/{name}"), steering, throttle, brake, speed * MPS_A_MPH)


def without_reversing(rows: Sequence[Row]) -> list[Row]:
    """Rows in which the vehicle drives forwards: the log's speed has no sign.

    The simulator's brake becomes the reverse gear once the vehicle is slow. So a speed that grows while it is pressed
    is one backwards, until the vehicle stands again. A log whose speed has a sign is left as it is.
    """
    kept, reverses = [], False
    for before, row in zip([None, *rows], rows, strict=False):
        if row.brake > 0 and row.throttle <= 0 and before and before.speed_mps < BRAKE_REVERSES_MPS:
            reverses = reverses or 0 <= before.speed_mps < row.speed_mps
        elif abs(row.speed_mps) < STANDING_MPS:
            reverses = False
        if not reverses:
            kept.append(row)
    return kept


def stretches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows without a pause between them."""
    parts: list[list[Row]] = []
    for row in rows:
        if not parts or row.time_us - parts[-1][-1].time_us > MAX_GAP_S * 1e6:
            parts.append([])
        parts[-1].append(row)
    return parts


def integrated(rows: Sequence[Row], *, wheelbase_m: float, full_lock_rad: float) -> tuple[Floats, Floats]:
    """Rear axle `[N, 3]` in metres and quaternions `[N, 4]` (scalar last): x forward, y left, start at the origin."""
    time_s = np.array([row.time_us - rows[0].time_us for row in rows]) / 1e6
    speed_mps = np.array([row.speed_mps for row in rows])
    angle = -full_lock_rad * np.array([row.steering for row in rows])  # the simulator counts right, yaw counts left
    return dead_reckoned(time_s, speed_mps, speed_mps * np.tan(angle) / wheelbase_m)


KIND = Kind(name="udacity", reads=READS, drives=drives, takes=("wheelbase_m", "full_lock_deg"))
