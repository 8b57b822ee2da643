"""comma2k19: segments of a minute of highway with poses of the camera.

    CHUNK/ROUTE/NUMBER/video.hevc
    CHUNK/ROUTE/NUMBER/global_pose/{frame_times, frame_positions, frame_orientations}      .npy without the ending

Times are seconds of the device's clock, 48.7 to 51.3 ms apart, so the film gets them in place of its nominal 20 Hz.
Positions are ECEF metres. Quaternions have their scalar first and lead from the camera (forward, right, down) to ECEF;
the other way round, as its README has it, headings are 11 degrees off the course. The camera looks a degree to the left
of travel and some down, so its mount is estimated on straights. processed_log/ is not needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alpacache.converters.drive import Dropped, Film, LoggedDrive
from alpacache.converters.geodesy import geodetic_of, level_axes
from alpacache.converters.kind import Kind
from alpacache.converters.log_files import UnusableError, as_microseconds, folder_of, poses_alone
from alpacache.converters.remux import film_frames
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.errors import BadClipError, UsageError
from alpacache.regular_file import regular_size

READS = "a segment of comma2k19 (with video.hevc and global_pose/), or a folder of some"
MAX_ARRAY_BYTES = 2**28
DEPTHS = ("", "*/", "*/*/", "*/*/*/")
"""Places of segments below a segment, a route, a chunk and the data set."""


def drives(place: Path) -> Iterator[LoggedDrive | Dropped]:
    """The segments below `place`, by name."""
    root = folder_of(place, reads=READS)
    segments = sorted({found.parent for depth in DEPTHS for found in root.glob(f"{depth}global_pose")}, key=_by_number)
    if not segments:
        raise UsageError(f"{place} holds no global_pose/ at any depth; expected {READS}.")
    for segment in segments:
        try:
            yield segment_drive(segment)
        except BadClipError as error:
            yield Dropped(what="drives", count=1, reason=f"{segment.parent.name}/{segment.name}: {error}")


def segment_drive(segment: Path) -> LoggedDrive:
    """One segment. Raises `BadClipError`."""
    track, origin = _track(segment / "global_pose")
    film, there = segment / "video.hevc", (segment / "video.hevc").exists()
    if there and (frames := film_frames(film).total) != len(track.timestamps_us):
        raise UnusableError(f"{frames} frames in video.hevc, {len(track.timestamps_us)} in frame_times")
    return LoggedDrive(
        name=f"{segment.parent.name.replace('|', '_')}--{segment.name}",
        cameras={FRONT_CAMERA: Film(path=film, times_us=track.timestamps_us)} if there else {},
        track=track,
        point="camera",
        mount_deg="estimate",
        dropped=() if there else (poses_alone(f"{segment.name}/video.hevc is not there"),),
        facts={
            "poses": "camera, quaternions from forward, right, down to ECEF, scalar first; turned to forward, left, up",
            "positions": "east, north, up (m) of the first one on the WGS 84 ellipsoid",
            "origin": "latitude {:.8f}, longitude {:.8f}, height {:.3f} m".format(*origin),
            "clock": "frame_times, seconds since the device was started",
        },
    )


def _track(folder: Path) -> tuple[Track, tuple[float, float, float]]:
    """Poses in east, north, up of the first one, and where that is."""
    from scipy.spatial.transform import Rotation

    names = ("frame_times", "frame_positions", "frame_orientations")
    times_s, ecef, scalar_first = (_array(folder / name) for name in names)
    shapes = (times_s.shape, ecef.shape, scalar_first.shape)
    if shapes != ((len(times_s),), (len(times_s), 3), (len(times_s), 4)) or len(times_s) < 2:
        raise UnusableError(f"global_pose/ holds arrays of {', '.join(map(str, shapes))}; expected [N], [N, 3], [N, 4]")
    bad = ~np.isfinite(np.column_stack([times_s, ecef, scalar_first])).all(axis=1)
    if bad.any():
        reason = f"{bad.sum()} poses are not finite, the first is number {np.argmax(bad)}"
        raise UnusableError(reason, kind="not_finite")
    if (np.abs(np.linalg.norm(scalar_first, axis=1) - 1) > 0.05).any():
        raise UnusableError("frame_orientations holds quaternions that have not length 1")
    times_us = as_microseconds(times_s, where="frame_times")
    if (np.diff(times_s) <= 0).any():
        reason = f"frame_times do not increase at number {np.argmax(np.diff(times_s) <= 0) + 1}"
        raise UnusableError(reason, kind="time_order")
    latitude, longitude, height = map(float, geodetic_of(ecef[0]))
    to_enu = level_axes(latitude, longitude)
    ecef_from_camera = Rotation.from_quat(scalar_first[:, [1, 2, 3, 0]])
    turned = Rotation.from_matrix(to_enu) * ecef_from_camera * Rotation.from_euler("x", 180, degrees=True)
    track = Track(
        timestamps_us=times_us,
        xyz=(ecef - ecef[0]) @ to_enu.T,
        quaternion_xyzw=turned.as_quat(),
    )
    return track, (latitude, longitude, height)


def _array(file: Path) -> Any:
    """Numbers of a .npy file, as float64; mapped, so that a header that promises more than there is costs nothing."""
    try:
        regular_size(file, limit_bytes=MAX_ARRAY_BYTES)
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(mapped, np.ndarray):
            raise UnusableError(f"global_pose/{file.name} is a .npz archive; expected a single array")
        if mapped.dtype.kind not in "fiu":
            raise UnusableError(f"global_pose/{file.name} holds {mapped.dtype}; expected numbers")
        return np.array(mapped, dtype=np.float64)
    except FileNotFoundError as error:
        raise UnusableError(f"global_pose/{file.name} is not there", kind="missing_poses") from error
    except UnusableError:
        raise
    except Exception as error:  # of a damaged header NumPy raises anything
        raise UnusableError(f"global_pose/{file.name} cannot be read as an array ({error}); copy it again") from error


def _by_number(segment: Path) -> tuple[Sequence[str], int, str]:
    """Sort key that puts segment 9 before segment 10."""
    number = int(segment.name) if segment.name.isascii() and segment.name.isdigit() and len(segment.name) < 10 else -1
    return segment.parent.parts, number, segment.name


KIND = Kind(name="comma2k19", reads=READS, drives=drives)
