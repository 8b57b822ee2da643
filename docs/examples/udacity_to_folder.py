"""A recording of the Udacity simulator as a folder of clips that `alpacache` reads.

    python udacity_to_folder.py RECORDING OUT

RECORDING/driving_log.csv: center, left, right, steering, throttle, brake, speed (miles an hour), with or without a
heading line, with decimal points. RECORDING/IMG/center_2016_12_01_13_30_48_287.jpg: the name holds the time.

**The log has no poses.** They are integrated from speed and steering with a kinematic bicycle model, whose wheelbase
and full lock are assumptions. The path has the right shape over seconds and drifts over minutes. Rows in which the
vehicle reverses are left out. Try things out with it; do not report metres on it.
"""

import argparse
import csv
import json
import math
import re
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "camera_front_wide_120fov"  # the layout knows no narrower front camera but the 30 degree one
MPS_A_MPH = 0.44704
MAX_GAP_S = 0.5
"""A longer hole between two rows was a pause: a new clip begins."""
MIN_CLIP_S = 8.1
"""A sample needs more than 1.6 s before t0 and 6.4 s after it."""
FULL_LOCK_DEG = 23.5
"""An assumption: the simulator's wheels turn by 25 degrees, but its tyres slip. With 25 the paths of the recordings
that were tried turned too far, and about 23.5 fitted them; other speeds and tracks may want another."""
BRAKE_REVERSES_MPS, STANDING_MPS = 5 * MPS_A_MPH, 0.3
_NAME = re.compile(r"center_(\d{4}_\d{2}_\d{2}_\d{2}_\d{2}_\d{2})_(\d{1,3})\.jpg")


class Row(NamedTuple):
    """What one row of the log says."""

    time_us: int
    picture: Path
    steering: float
    """-1 is full lock left, 1 full lock right."""
    throttle: float
    brake: float
    speed_mps: float


def read_log(recording: Path) -> list[Row]:
    """Rows by time; of rows with one time the first. What is skipped is named on stderr."""
    log, rows, skipped = recording / "driving_log.csv", {}, {}
    if not log.is_file():
        raise SystemExit(f"{log} is not there; RECORDING is the folder that the simulator wrote.")
    with open(log, newline="", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(csv.reader(part.replace("\0", "") for part in file), start=1):
            if not any(field.strip() for field in line) or (number == 1 and line[0].strip() == "center"):
                continue
            row = _row(recording, line, number)
            if not all(map(math.isfinite, (row.steering, row.throttle, row.brake, row.speed_mps))):
                skipped.setdefault("rows with a number that is not finite", []).append(f"line {number}")
            elif not row.picture.is_file():
                skipped.setdefault("rows whose picture is not there", []).append(f"line {number}: {row.picture.name}")
            else:
                rows.setdefault(row.time_us, row)
    for what, lines in skipped.items():
        print(f"skipped {len(lines)} {what}, the first in {lines[0]}", file=sys.stderr)
    return [rows[time_us] for time_us in sorted(rows)]


def _row(recording: Path, line: list[str], number: int) -> Row:
    where = f"driving_log.csv, line {number}"
    name = re.split(r"[\\/]", line[0].strip())[-1]  # paths are those of the machine that recorded
    found = _NAME.fullmatch(name)
    if found is None or len(line) < 7:
        raise SystemExit(f"{where}: {line} is not a row of the simulator's log.")
    if len(line) > 7 or any("," in field for field in line[3:7]):
        raise SystemExit(f"{where}: {len(line)} fields in place of 7; write numbers with decimal points, not commas.")
    try:
        second = datetime.strptime(found[1], "%Y_%m_%d_%H_%M_%S").replace(tzinfo=UTC)
        steering, throttle, brake, speed = map(float, line[3:7])
    except ValueError as error:
        raise SystemExit(f"{where}: {error}.") from error
    time_us = int(second.timestamp()) * 1_000_000 + int(found[2]) * 1_000
    return Row(time_us, recording / "IMG" / name, steering, throttle, brake, speed * MPS_A_MPH)


def without_reversing(rows: list[Row]) -> list[Row]:
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
    if len(kept) < len(rows):
        print(f"skipped {len(rows) - len(kept)} rows in which the vehicle reverses", file=sys.stderr)
    return kept


def clips_of(rows: list[Row]) -> list[list[Row]]:
    """Rows without a pause between them, long enough for a sample."""
    clips: list[list[Row]] = [[]]
    for row in rows:
        if clips[-1] and row.time_us - clips[-1][-1].time_us > MAX_GAP_S * 1e6:
            clips.append([])
        clips[-1].append(row)
    return [clip for clip in clips if clip and clip[-1].time_us - clip[0].time_us >= MIN_CLIP_S * 1e6]


def drive(clip: list[Row], *, wheelbase_m: float, full_lock_rad: float) -> tuple[np.ndarray, np.ndarray]:
    """Rear axle `[N, 3]` in metres and quaternions `[N, 4]` (scalar last): x forward, y left, start at the origin.

    Yaw rate = v tan(steering angle) / wheelbase; between two rows speed and yaw rate are the mean of both.
    """
    time_s = np.array([row.time_us for row in clip]) / 1e6
    speed = np.array([row.speed_mps for row in clip])
    angle = -full_lock_rad * np.array([row.steering for row in clip])  # the simulator counts right, yaw counts left
    yaw_rate = speed * np.tan(angle) / wheelbase_m
    dt, mean = np.diff(time_s), lambda values: (values[1:] + values[:-1]) / 2
    yaw = np.concatenate([[0.0], np.cumsum(mean(yaw_rate) * dt)])
    steps = (mean(speed) * dt)[:, None] * np.stack([np.cos(mean(yaw)), np.sin(mean(yaw))], axis=1)
    xyz = np.zeros((len(clip), 3))
    xyz[1:, :2] = np.cumsum(steps, axis=0)
    quaternion = np.stack([0 * yaw, 0 * yaw, np.sin(yaw / 2), np.cos(yaw / 2)], axis=1)
    return xyz, quaternion


def write_clip(folder: Path, clip: list[Row], xyz: np.ndarray, quaternion_xyzw: np.ndarray) -> None:
    """Poses, times and the pictures as they are, not encoded again."""
    (folder / CAMERA).mkdir(parents=True)
    stamps = np.array([row.time_us for row in clip], np.int64)
    poses = np.concatenate([xyz, quaternion_xyzw], axis=1)
    columns = dict(zip(("x", "y", "z", "qx", "qy", "qz", "qw"), poses.T, strict=True))
    pq.write_table(pa.table({"timestamp": stamps, **columns}), folder / "egomotion.parquet")
    pq.write_table(pa.table({"timestamp": stamps}), folder / f"{CAMERA}.timestamps.parquet")
    for number, row in enumerate(clip):
        shutil.copyfile(row.picture, folder / CAMERA / f"{number:06d}.jpg")


def convert(recording: Path, out: Path, *, wheelbase_m: float = 2.5, full_lock_deg: float = FULL_LOCK_DEG) -> list[str]:
    """Write all clips of a recording; returns their ids. `out` is there once all of them are."""
    if out.exists():
        raise SystemExit(f"{out} exists already; choose another folder, or remove it.")
    clips = clips_of(without_reversing(read_log(recording)))
    if not clips:
        raise SystemExit(f"{recording}: no stretch of {MIN_CLIP_S} s without a pause.")
    names = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as working:
        new = Path(working) / "new"
        for clip in clips:
            names.append(f"udacity-{datetime.fromtimestamp(clip[0].time_us / 1e6, UTC):%Y%m%d-%H%M%S-%f}")
            xyz, quaternion = drive(clip, wheelbase_m=wheelbase_m, full_lock_rad=np.deg2rad(full_lock_deg))
            write_clip(new / "clips" / names[-1], clip, xyz, quaternion)
        index = {"name": "Udacity simulator", "cameras": [CAMERA], "clips": names}
        (new / "dataset.json").write_text(json.dumps(index, indent=1))
        new.rename(out)
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--wheelbase-m", type=float, default=2.5, help="an assumption (default: %(default)s)")
    parser.add_argument(
        "--full-lock-deg", type=float, default=FULL_LOCK_DEG, help="an assumption (default: %(default)s)"
    )
    given = parser.parse_args()
    written = convert(given.recording, given.out, wheelbase_m=given.wheelbase_m, full_lock_deg=given.full_lock_deg)
    print(f"{len(written)} clips in {given.out}; poses are integrated from speed and steering, not recorded.")
