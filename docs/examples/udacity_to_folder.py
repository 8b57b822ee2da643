"""A recording of the Udacity simulator as a folder of clips that `alpacache` reads.

    python udacity_to_folder.py RECORDING OUT

RECORDING/driving_log.csv: center, left, right, steering, throttle, brake, speed (miles an hour), with or without a
heading line. RECORDING/IMG/center_2016_12_01_13_30_48_287.jpg: the name holds the time.

**The log has no poses.** They are integrated from speed and steering with a kinematic bicycle model, whose wheelbase
and full lock are assumptions. The path has the right shape over seconds and drifts over minutes. Try things out with
it; do not report metres on it.
"""

import argparse
import csv
import json
import re
import shutil
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
_NAME = re.compile(r"center_(\d{4}_\d{2}_\d{2}_\d{2}_\d{2}_\d{2})_(\d{1,3})\.jpg")


class Row(NamedTuple):
    """What one row of the log says."""

    time_us: int
    picture: Path
    steering: float
    """-1 is full lock left, 1 full lock right."""
    speed_mps: float


def read_log(recording: Path) -> list[Row]:
    """Rows by time; of rows with one time the first."""
    rows: dict[int, Row] = {}
    with open(recording / "driving_log.csv", newline="") as file:
        for number, line in enumerate(csv.reader(file), start=1):
            if number == 1 and line[0].strip() == "center":
                continue
            name = re.split(r"[\\/]", line[0].strip())[-1]  # paths are those of the machine that recorded
            found = _NAME.fullmatch(name)
            if found is None or len(line) < 7:
                raise SystemExit(f"driving_log.csv, line {number}: {line} is not a row of the simulator's log.")
            second = datetime.strptime(found[1], "%Y_%m_%d_%H_%M_%S").replace(tzinfo=UTC)
            time_us = int(second.timestamp()) * 1_000_000 + int(found[2]) * 1_000
            row = Row(time_us, recording / "IMG" / name, float(line[3]), float(line[6]) * MPS_A_MPH)
            rows.setdefault(time_us, row)
    return [rows[time_us] for time_us in sorted(rows)]


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


def convert(recording: Path, out: Path, *, wheelbase_m: float = 2.5, full_lock_deg: float = 25.0) -> list[str]:
    """Write all clips of a recording; returns their ids."""
    clips = clips_of(read_log(recording))
    if not clips:
        raise SystemExit(f"{recording}: no stretch of {MIN_CLIP_S} s without a pause.")
    names = []
    for clip in clips:
        names.append(f"udacity-{datetime.fromtimestamp(clip[0].time_us / 1e6, UTC):%Y%m%d-%H%M%S-%f}")
        xyz, quaternion = drive(clip, wheelbase_m=wheelbase_m, full_lock_rad=np.deg2rad(full_lock_deg))
        write_clip(out / "clips" / names[-1], clip, xyz, quaternion)
    index = {"name": "Udacity simulator", "cameras": [CAMERA], "clips": names}
    (out / "dataset.json").write_text(json.dumps(index, indent=1))
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--wheelbase-m", type=float, default=2.5, help="an assumption (default: %(default)s)")
    parser.add_argument("--full-lock-deg", type=float, default=25.0, help="an assumption (default: %(default)s)")
    given = parser.parse_args()
    written = convert(given.recording, given.out, wheelbase_m=given.wheelbase_m, full_lock_deg=given.full_lock_deg)
    print(f"{len(written)} clips in {given.out}; poses are integrated from speed and steering, not recorded.")
