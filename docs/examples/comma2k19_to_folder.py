"""Segments of comma2k19 as a folder of clips that `alpacache` reads.

    python comma2k19_to_folder.py SEGMENT [SEGMENT ...] OUT

SEGMENT is `CHUNK/ROUTE/NUMBER` with video.hevc and, in global_pose/, the arrays frame_times (s), frame_positions (ECEF,
m) and frame_orientations (quaternion, scalar first): `.npy` files without the ending. processed_log/ is not needed.

The pose is the camera's: forward, left, up of the camera stand for those of the vehicle.
"""

import argparse
import json
import shutil
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial.transform import Rotation

CAMERA = "camera_front_wide_120fov"  # the layout knows no narrower front camera but the 30 degree one
FRAMES_A_SECOND = 20
EQUATOR_M, POLE_M = 6_378_137.0, 6_356_752.314245
"""Half axes of the WGS 84 ellipsoid."""


def enu_from_ecef(origin_m: np.ndarray) -> Rotation:
    """Turns ECEF axes into east, north, up at a place (Bowring's formula for its latitude)."""
    x, y, z = origin_m
    from_axis = np.hypot(x, y)
    reduced = np.arctan2(z * EQUATOR_M, from_axis * POLE_M)
    squared = 1 - (POLE_M / EQUATOR_M) ** 2
    height = z + squared / (1 - squared) * POLE_M * np.sin(reduced) ** 3
    latitude = np.arctan2(height, from_axis - squared * EQUATOR_M * np.cos(reduced) ** 3)
    longitude = np.arctan2(y, x)
    east = [-np.sin(longitude), np.cos(longitude), 0.0]
    up = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    return Rotation.from_matrix(np.stack([east, np.cross(up, east), up]))


def poses(segment: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (us), positions `[N, 3]` (m), quaternions `[N, 4]` (scalar last); east, north, up at the first frame."""
    folder = segment / "global_pose"
    times_s, ecef, scalar_first = (
        np.load(folder / name) for name in ("frame_times", "frame_positions", "frame_orientations")
    )
    if (
        not len(times_s) == len(ecef) == len(scalar_first) > 1
        or ecef.shape[1:] != (3,)
        or scalar_first.shape[1:] != (4,)
    ):
        raise ValueError(f"global_pose/ holds arrays of {times_s.shape}, {ecef.shape} and {scalar_first.shape}")
    bad = ~np.isfinite(np.column_stack([times_s, ecef, scalar_first])).all(axis=1)
    if bad.any():
        raise ValueError(f"{bad.sum()} poses are not finite, the first is number {np.argmax(bad)}")
    if (np.diff(times_s) <= 0).any():
        raise ValueError(f"frame_times do not increase at number {np.argmax(np.diff(times_s) <= 0) + 1}")
    to_enu = enu_from_ecef(ecef[0])
    ecef_from_camera = Rotation.from_quat(scalar_first[:, [1, 2, 3, 0]])
    forward_left_up = Rotation.from_euler("x", 180, degrees=True)  # the camera's axes are forward, right, down
    turned = to_enu * ecef_from_camera * forward_left_up
    return np.rint(times_s * 1e6).astype(np.int64), to_enu.apply(ecef - ecef[0]), turned.as_quat()


def write_mp4(raw: Path, movie: Path) -> int:
    """The stream as it is in a container with times: a frame's number. Returns how many frames there are."""
    count = 0
    with av.open(str(raw)) as source, av.open(str(movie), "w") as target:
        stream = source.streams.video[0]
        if stream.codec_context.has_b_frames:
            raise ValueError("video.hevc holds frames out of the order of presentation; encode it without B-frames")
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if not packet.size:  # the end of the stream
                continue
            packet.stream, packet.time_base = copy, Fraction(1, FRAMES_A_SECOND)
            packet.pts, packet.dts, packet.duration = count, count, 1
            target.mux(packet)
            count += 1
    return count


def write_clip(segment: Path, clip: Path) -> None:
    """One segment, one clip."""
    clip.mkdir(parents=True)
    stamps, xyz, quaternion = poses(segment)
    frames = write_mp4(segment / "video.hevc", clip / f"{CAMERA}.mp4")
    if frames != len(stamps):
        raise ValueError(f"{frames} frames in video.hevc, {len(stamps)} in frame_times; leave it out")
    columns = dict(
        zip(("x", "y", "z", "qx", "qy", "qz", "qw"), np.concatenate([xyz, quaternion], axis=1).T, strict=True)
    )
    pq.write_table(pa.table({"timestamp": stamps, **columns}), clip / "egomotion.parquet")
    pq.write_table(pa.table({"timestamp": stamps}), clip / f"{CAMERA}.timestamps.parquet")


def convert(segments: list[Path], out: Path) -> list[str]:
    """Write all segments; returns the clips' ids, `ROUTE--NUMBER`. `out` is there once all of them are.

    A segment that cannot be used is skipped and named on stderr.
    """
    if out.exists():
        raise SystemExit(f"{out} exists already; choose another folder, or remove it.")
    names = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as working:
        new = Path(working) / "new"
        for segment in map(Path.resolve, segments):
            name = f"{segment.parent.name.replace('|', '_')}--{segment.name}"
            try:
                if name in names:
                    raise ValueError("named twice")
                write_clip(segment, new / "clips" / name)
            except (OSError, ValueError, av.error.FFmpegError) as error:
                print(f"skipped {segment}: {error}", file=sys.stderr)
                if name not in names:
                    shutil.rmtree(new / "clips" / name, ignore_errors=True)
                continue
            names.append(name)
        if not names:
            raise SystemExit("no segment could be used.")
        index = {"name": "comma2k19", "cameras": [CAMERA], "clips": names}
        (new / "dataset.json").write_text(json.dumps(index, indent=1))
        new.rename(out)
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("segments", type=Path, nargs="+")
    parser.add_argument("out", type=Path, help="a new folder")
    given = parser.parse_args()
    print(f"{len(convert(given.segments, given.out))} clips in {given.out}")
