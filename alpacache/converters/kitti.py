"""KITTI: raw drives with OXTS poses, and the sequences of the odometry benchmark.

    DATE/DATE_drive_NNNN_{sync,extract}/oxts/timestamps.txt, oxts/data/0000000000.txt, ...
    DATE/DATE_drive_NNNN_{sync,extract}/image_02/timestamps.txt, image_02/data/0000000000.png, ...
    sequences/NN/times.txt, sequences/NN/image_2/000000.png, ...   and   poses/NN.txt

A raw pose is the IMU's: latitude, longitude (degrees) and height (m), roll, pitch and yaw (rad; 0 is east, left
positive). Positions are east, north and up on the ellipsoid; KITTI's own tools use a Mercator projection, which is off
by 0.4 m in 190. Each camera and the IMU have a file of times of their own. Odometry poses are those of the left grey
camera (x right, y down, z forward), seen from the first one: both sides are turned to forward, left, up.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.drive import Dropped, LoggedDrive, Pictures
from alpacache.converters.geodesy import enu_m, level_axes
from alpacache.converters.kind import Kind
from alpacache.converters.log_files import (
    UnusableError,
    as_microseconds,
    folder_of,
    increasing_part,
    pictures_of,
    poses_alone,
    read_text,
)
from alpacache.driving.cameras import FRONT_CAMERA, full_camera_name
from alpacache.driving.poses import Track
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError, UsageError

READS = (
    "a folder of KITTI drives (DATE_drive_NNNN_sync, with oxts/), one such drive, or the odometry benchmark's folder"
)
IMU_TO_AXLE_M = (0.05, -0.32, -0.93)
"""The middle of the rear axle on the ground, seen from the IMU: the setup's drawing puts the laser 0.76 m in front of
the axle in the middle of the car, `calib_imu_to_velo.txt` the IMU 0.81 m behind and 0.32 m left of it, 0.93 m high."""
CAMERA_TO_AXLE_M = (-1.03, 0.0, -1.65)
"""The same from camera 0, which is 0.27 m in front of the laser and 1.65 m high."""
OXTS_FIELDS = 30
COURSE_MPS = 3.0
"""Speed from which velocity tells the course."""
MAX_COURSE_GAP_RAD = float(np.deg2rad(15.0))
"""Median gap of yaw and course beyond which the yaw is another one; a car's is within 1 degree."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?")
_FRAME = r"(\d{1,10})\.(?:png|jpg|jpeg)"
_CAMERA_0 = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
"""Turns right, down, forward into forward, left, up."""


def drives(place: Path, *, camera: Sequence[str] = ()) -> Iterator[LoggedDrive | Dropped]:
    """The drives below `place`, by name; `camera`: `front_wide=image_02` and so on."""
    cameras = _cameras(camera)
    if place.is_file():
        yield _odometry_alone(place.resolve(), cameras)
        return
    root = folder_of(place, reads=READS)
    raw = sorted(folder.parent for depth in ("oxts", "*/oxts", "*/*/oxts") for folder in root.glob(depth))
    sequences = sorted(folder for folder in root.glob("sequences/*") if folder.is_dir())
    if not raw and not sequences:
        raise UsageError(f"{place} holds neither oxts/ of a drive nor sequences/; expected {READS}.")
    for folder in raw:
        try:
            yield raw_drive(folder, cameras)
        except UnusableError as error:
            yield Dropped(what="drives", count=1, reason=f"{folder.name}: {error}")
    for folder in sequences:
        try:
            yield odometry_drive(folder, root / "poses" / f"{folder.name}.txt", folder / "times.txt", cameras)
        except UnusableError as error:
            yield Dropped(what="drives", count=1, reason=f"sequence {folder.name}: {error}")


def raw_drive(folder: Path, cameras: Mapping[str, str]) -> LoggedDrive:
    """One drive with OXTS. Raises `UnusableError`."""
    dropped: list[Dropped] = []
    track, facts = _oxts_track(folder / "oxts", dropped)
    cameras = _present(folder, cameras, dropped)
    pictures = {
        name: _pictures(folder, f"{source}/data", _times_us(folder / source / "timestamps.txt"), name, dropped)
        for name, source in cameras.items()
    }
    return LoggedDrive(
        name=folder.name,
        cameras=pictures,
        track=track,
        point="imu",
        origin_offset_m=IMU_TO_AXLE_M,
        calibration=_lenses(folder, cameras),
        dropped=dropped,
        facts=facts | {"cameras": {name: f"{source}, times of its own" for name, source in cameras.items()}},
    )


def odometry_drive(folder: Path, poses: Path, times: Path, cameras: Mapping[str, str]) -> LoggedDrive:
    """One sequence of the odometry benchmark, pictures in `folder`. Raises `UnusableError`."""
    seconds = _numbers(times, 1)[:, 0]
    rows = _numbers(poses, 12).reshape(-1, 3, 4)
    if len(rows) != len(seconds):
        raise UnusableError(f"{len(rows)} poses in {poses.name}, {len(seconds)} times in {times.name}")
    times_us = as_microseconds(seconds, where=times.name)
    _check_increasing(times_us, times)
    dropped: list[Dropped] = []
    stamps = dict(enumerate(times_us.tolist()))
    sources = _present(folder, {name: f"image_{int(source[-2:])}" for name, source in cameras.items()}, dropped)
    pictures = {name: _pictures(folder, source, stamps, name, dropped) for name, source in sources.items()}
    return LoggedDrive(
        name=f"kitti-odometry-{poses.stem}",
        cameras=pictures,
        track=Track(
            timestamps_us=times_us,
            xyz=rows[:, :, 3] @ _CAMERA_0.T,
            quaternion_xyzw=_quaternions(_CAMERA_0 @ rows[:, :, :3] @ _CAMERA_0.T),
        ),
        point="camera",
        origin_offset_m=CAMERA_TO_AXLE_M,
        mount_deg="estimate",
        dropped=dropped,
        facts={
            "poses": "camera 0 (left, grey), metres from its first pose; axes turned from right, down, forward",
            "clock": "times.txt, seconds since the first frame",
        },
    )


def _present(folder: Path, cameras: Mapping[str, str], dropped: list[Dropped]) -> Mapping[str, str]:
    """The cameras, or none where a drive has no pictures at all. Raises `UnusableError` where it has others alone."""
    beside = sorted(entry.name for entry in folder.glob("image_*"))
    if not beside:
        dropped.append(poses_alone(f"{folder.name} has no image_ folders"))
        return {}
    if absent := [source for source in cameras.values() if source not in beside]:
        there = ", ".join(beside)
        raise UnusableError(f"no {absent[0]}/; cameras there: {there} (--camera front_wide=image_03 takes another)")
    return cameras


def _lenses(folder: Path, cameras: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Lenses of the date's calibration, of rectified pictures and of others; none without the file."""
    file = folder.parent / "calib_cam_to_cam.txt"
    if not file.is_file():
        return {}
    rows = {key.strip(): fields.split() for key, _, fields in (line.partition(":") for line in _lines(file))}
    rectified, lenses = not folder.name.endswith("_extract"), {}
    for name, source in cameras.items():
        number = source[-2:]
        size, matrix = (f"S_rect_{number}", f"P_rect_{number}") if rectified else (f"S_{number}", f"K_{number}")
        try:
            width, height = (int(float(field)) for field in rows[size])
            values = [float(field) for field in rows[matrix]]
            distortion = [] if rectified else [float(field) for field in rows[f"D_{number}"]]
        except (KeyError, ValueError) as error:
            raise UnusableError(f"{file.name} does not tell the lens of {source} ({error})") from error
        if rectified:
            values = [value for at, value in enumerate(values) if at % 4 != 3]  # the last column is the base line
        lens = {"width": width, "height": height, "distortion_model": "plumb_bob"}
        lenses[name] = lens | {"K": values, "D": distortion}
    return lenses


def _lines(file: Path) -> list[str]:
    return read_text(file, limit_bytes=2**20).splitlines()


def _odometry_alone(poses: Path, cameras: Mapping[str, str]) -> LoggedDrive:
    """The sequence of a file of poses, with the times that lie where the benchmark has them, or beside it."""
    folder = poses.parent.parent / "sequences" / poses.stem
    places = (folder / "times.txt", poses.with_name(f"{poses.stem}_times.txt"), poses.with_name("times.txt"))
    times = next((place for place in places if place.is_file()), None)
    if times is None:
        wanted = " nor ".join(map(str, places))
        raise UsageError(f"{poses} has no times, and neither {wanted} is there; put the sequence's times there.")
    try:
        return odometry_drive(folder, poses, times, cameras)
    except BadClipError as error:
        raise UsageError(f"{error}.") from error


def _oxts_track(folder: Path, dropped: list[Dropped]) -> tuple[Track, dict[str, str]]:
    from scipy.spatial.transform import Rotation

    stamps = _times_us(folder / "timestamps.txt")
    files = _numbered(folder / "data", r"(\d{1,10})\.txt")
    kept = [number for number in sorted(stamps) if number in files]
    if missing := len(stamps) - len(kept):
        dropped.append(Dropped(what="poses", count=missing, reason=f"without a file in {folder.name}/data"))
    if len(kept) < 2:
        raise UnusableError(f"{len(kept)} poses in {folder}; at least 2 are needed")
    rows = np.array([_oxts(files[number]) for number in kept])
    times_us = np.array([stamps[number] for number in kept])
    forth = increasing_part(times_us)
    if lost := len(times_us) - len(forth):
        first = int(np.argmax(np.diff(times_us) <= 0)) + 1
        reason = f"their times step back, the first in line {kept[first] + 1} of {folder.name}/timestamps.txt"
        dropped.append(Dropped(what="poses", count=lost, reason=reason))
        if lost > len(forth):
            raise UnusableError(f"{lost} of {len(times_us)} poses are out of the order of time")
    rows, times_us = rows[forth], times_us[forth]
    latitude, longitude, height, roll, pitch, yaw = rows[:, :6].T
    if (np.abs(latitude) > 90).any() or (np.abs(longitude) > 180).any():
        raise UnusableError(f"{folder}: latitudes or longitudes beyond 90 or 180 degrees")
    _check_course(yaw, north_mps=rows[:, 6], east_mps=rows[:, 7], where=folder)
    level = Rotation.from_matrix(level_axes(latitude[0], longitude[0]) @ level_axes(latitude, longitude).swapaxes(1, 2))
    turned = level * Rotation.from_euler("ZYX", np.stack([yaw, pitch, roll], axis=1))
    origin = (float(latitude[0]), float(longitude[0]), float(height[0]))
    facts = {
        "poses": "OXTS of the IMU: roll (left up), pitch (nose down), yaw (0 east, left positive)",
        "positions": "east, north, up (m) on the WGS 84 ellipsoid; no Mercator projection",
        "origin": f"latitude {origin[0]:.8f}, longitude {origin[1]:.8f}, height {origin[2]:.3f} m",
        "clock": "timestamps.txt of each sensor, taken as UTC",
        "accuracy": f"{float(np.median(rows[:, 23])):.3f} m by the receiver's own word (median)",
    }
    track = Track(timestamps_us=times_us, xyz=enu_m(latitude, longitude, height), quaternion_xyzw=turned.as_quat())
    return track, facts


def _check_course(yaw_rad: Floats, *, north_mps: Floats, east_mps: Floats, where: Path) -> None:
    moving = np.hypot(north_mps, east_mps) > COURSE_MPS
    if not moving.any():
        return
    gap = np.arctan2(north_mps[moving], east_mps[moving]) - yaw_rad[moving]
    median = float(np.median(np.abs((gap + np.pi) % (2 * np.pi) - np.pi)))
    if median > MAX_COURSE_GAP_RAD:
        expected = "yaw in rad, 0 = east, anticlockwise, and velocities to the north and to the east"
        raise UnusableError(
            f"{where}: yaw and velocity are {np.rad2deg(median):.0f} degrees apart; expected {expected}"
        )


def _oxts(file: Path) -> list[float]:
    fields = read_text(file, limit_bytes=2**16).split()
    try:
        numbers = [float(field) for field in fields]
    except ValueError as error:
        raise UnusableError(f"{file}: {error}") from error
    if len(numbers) != OXTS_FIELDS or not np.isfinite(numbers).all():
        raise UnusableError(f"{file} holds {len(numbers)} numbers, or some that are not finite; expected {OXTS_FIELDS}")
    return numbers


def _times_us(file: Path) -> dict[int, int]:
    """Line number (from 0) -> microseconds since 1970 of each line that is not empty."""
    times = {}
    for number, line in enumerate(read_text(file).splitlines()):
        if not (text := line.strip()):
            continue
        if not _TIME.fullmatch(text):
            raise UnusableError(f"{file}, line {number + 1}: {text[:40]!r} is no time; expected 2011-09-26 13:02:25.9")
        try:
            times[number] = (int(np.datetime64(text, "ns").astype(np.int64)) + 500) // 1000
        except ValueError as error:
            raise UnusableError(f"{file}, line {number + 1}: {error}") from error
    return times


def _pictures(drive: Path, source: str, stamps: Mapping[int, int], name: str, dropped: list[Dropped]) -> Pictures:
    """The pictures in a folder of the drive; frame number -> time (us)."""
    folder = drive / source
    files = _numbered(folder, _FRAME)
    kept = [number for number in sorted(stamps) if number in files]
    if missing := len(stamps) - len(kept):
        dropped.append(Dropped(what=f"{name} frames", count=missing, reason="their times have no picture"))
    if extra := len(files.keys() - stamps.keys()):
        dropped.append(Dropped(what=f"{name} frames", count=extra, reason="pictures without a time"))
    times = np.array([stamps[number] for number in kept], dtype=np.int64)
    forth = increasing_part(times)
    if lost := len(times) - len(forth):
        dropped.append(Dropped(what=f"{name} frames", count=lost, reason="their times step back"))
    if len(forth) < 2:
        raise UnusableError(f"{folder}: {len(forth)} pictures with times; at least 2 are needed")
    return pictures_of([files[kept[place]] for place in forth.tolist()], times[forth])


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Find files by the number in their name."""
    if not folder.is_dir():
        raise UnusableError(f"{folder} does not exist")
    found = ((re.fullmatch(pattern, entry.name, re.IGNORECASE), entry) for entry in folder.iterdir())
    return {int(match[1]): entry for match, entry in found if match}


def _numbers(file: Path, columns: int) -> Floats:
    """`[N, columns]` numbers of a text file."""
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = [float(field) for field in line.split()]
        except ValueError as error:
            raise UnusableError(f"{file}, line {number}: {error}") from error
        if len(row) != columns or not np.isfinite(row).all():
            raise UnusableError(f"{file}, line {number}: expected {columns} finite numbers, found {len(row)}")
        rows.append(row)
    if len(rows) < 2:
        raise UnusableError(f"{file} holds {len(rows)} rows; at least 2 are needed")
    return np.array(rows)


def _check_increasing(times_us: NDArray[np.int64], file: Path) -> None:
    if (np.diff(times_us) <= 0).any():
        line = int(np.argmax(np.diff(times_us) <= 0)) + 2
        raise UnusableError(f"{file}, line {line}: times do not increase")


def _quaternions(rotations: Floats) -> Floats:
    from scipy.spatial.transform import Rotation

    apart = np.abs(rotations @ rotations.swapaxes(1, 2) - np.eye(3)).max()
    if apart > 0.01 or (np.linalg.det(rotations) < 0).any():
        raise UnusableError("the first three columns of the poses are no rotations; expected 3 x 4 matrices by rows")
    quaternions: Floats = Rotation.from_matrix(rotations).as_quat()
    return quaternions


def _cameras(written: Sequence[str]) -> dict[str, str]:
    """Full camera name -> folder of its pictures."""
    cameras = {}
    for entry in written or (f"{FRONT_CAMERA}=image_02",):
        name, _, source = entry.partition("=")
        if not re.fullmatch(r"image_0?[0-3]", source):
            raise UsageError(
                f"--camera {entry} is not a name and one of image_00 to image_03; such as front_wide=image_02."
            )
        cameras[full_camera_name(name)] = f"image_{int(source[6:]):02d}"
    return cameras


KIND = Kind(name="kitti", reads=READS, drives=drives, takes=("camera",))
