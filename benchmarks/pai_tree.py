"""Writes a small PhysicalAI-AV tree out of generated drives, for tests and benchmarks: the dataset is gated and large.

Files, names and columns are those of the dataset: chunked zip archives with H.264 video and timestamps, egomotion,
calibration and the metadata tables.
"""

import io
import itertools
import json
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.cameras import CAMERAS
from alpacache.driving.poses import Track
from alpacache.sources.synthetic import SyntheticSource

LEAD_US = 100_000
"""The tree's clock starts this long after the drive's, so that poses exist before its zero, as in the dataset."""
_EVENT_US = (3_000_000, 7_500_000, 19_500_000)
_FILMS_AT_ONCE = 4
"""Bounds memory."""


def write_tree(
    directory: str | Path,
    *,
    source: SyntheticSource,
    cameras: Sequence[str],
    seconds: float = 12.0,
    fps: int = 10,
    crf: int = 12,
    clips_per_chunk: int = 2,
    same_films: bool = False,
) -> list[str]:
    """Write all clips of `source` below `directory` and return their ids. `crf` is x264's: larger means smaller video.

    With `same_films` all clips of a chunk have the first one's films, as encoding takes its time.

    Video starts at 0 us with a few microseconds of jitter, as recorded clocks have; poses start `LEAD_US` earlier.
    """
    root = Path(directory)
    features = _features(cameras)
    clips = list(source.clip_ids)
    chunks = [clips[start : start + clips_per_chunk] for start in range(0, len(clips), clips_per_chunk)]

    def write_films(number: int, camera: str) -> None:
        films = [_film(source, clip, camera, seconds, fps, crf) for clip in chunks[number][: 1 if same_films else None]]
        for clip in chunks[number][len(films) :]:
            films.append({name.replace(chunks[number][0], clip): data for name, data in films[0].items()})
        _write_zip(root / _chunk_path("camera", camera, number), {name: film[name] for film in films for name in film})

    with ThreadPoolExecutor(_FILMS_AT_ONCE) as pool:
        for done in [pool.submit(write_films, *place) for place in itertools.product(range(len(chunks)), cameras)]:
            done.result()
    for number, members in enumerate(chunks):
        poses = {f"{clip}.egomotion.parquet": _parquet(_egomotion(source.track(clip), seconds)) for clip in members}
        _write_zip(root / _chunk_path("labels", "egomotion", number), poses)
        _write_calibration(root, source, members, cameras, number)
    _write_metadata(root, features, clips, clips_per_chunk, cameras)
    return clips


def encode_h264(images: NDArray[np.uint8], fps: int, crf: int = 12) -> bytes:
    """Encode RGB frames `[N, 3, H, W]` as an MP4."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "g": "30"})
        stream.height, stream.width = images.shape[2:]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image.transpose(1, 2, 0)))))
        container.mux(stream.encode())
    return buffer.getvalue()


def _film(source: SyntheticSource, clip: str, camera: str, seconds: float, fps: int, crf: int) -> dict[str, bytes]:
    """Video and frame timestamps of one clip and camera, by file name."""
    import pandas as pd

    times = np.round(np.arange(int(seconds * fps)) * (1e6 / fps)).astype(np.int64)
    jitter = np.random.default_rng(len(clip) + CAMERAS.index(camera)).integers(0, 40, len(times))
    images = source.film(clip, camera, times + LEAD_US)
    return {
        f"{clip}.{camera}.mp4": encode_h264(images, fps, crf),
        f"{clip}.{camera}.timestamps.parquet": _parquet(pd.DataFrame({"timestamp": times + jitter})),
    }


def _egomotion(track: Track, seconds: float) -> Any:
    """The track as a table with the dataset's columns; velocities, accelerations and curvature are left at zero."""
    import pandas as pd

    kept = track.timestamps_us <= round((seconds + 0.2) * 1e6)
    columns: dict[str, NDArray[Any]] = {"timestamp": track.timestamps_us[kept] - LEAD_US}
    columns |= {name: track.quaternion_xyzw[kept, axis] for axis, name in enumerate(("qx", "qy", "qz", "qw"))}
    columns |= {name: track.xyz[kept, axis] for axis, name in enumerate(("x", "y", "z"))}
    zeros = np.zeros(int(kept.sum()))
    return pd.DataFrame(columns | dict.fromkeys(("vx", "vy", "vz", "ax", "ay", "az", "curvature"), zeros))


def _write_calibration(
    root: Path, source: SyntheticSource, clips: Sequence[str], cameras: Sequence[str], chunk: int
) -> None:
    """Write intrinsics as an f-theta polynomial (r = f theta, right near the pinhole's centre), and extrinsics."""
    import pandas as pd
    from scipy.spatial.transform import Rotation

    lenses, places = {}, {}
    for clip in clips:
        for camera in cameras:
            lens = source.calibration(clip, camera)
            lenses[clip, camera] = {name: lens[name] for name in ("width", "height", "cx", "cy")}
            lenses[clip, camera] |= {f"fw_poly_{power}": lens["fx"] if power == 1 else 0.0 for power in range(5)}
            lenses[clip, camera] |= {f"bw_poly_{power}": 1 / lens["fx"] if power == 1 else 0.0 for power in range(5)}
            turn = Rotation.from_matrix(lens["rotation"]).as_quat()
            places[clip, camera] = dict(zip(("qx", "qy", "qz", "qw"), turn, strict=True))
            places[clip, camera] |= dict(zip(("x", "y", "z"), lens["position_m"], strict=True))
    for feature, rows, level in (
        ("camera_intrinsics", lenses, "camera_name"),
        ("sensor_extrinsics", places, "sensor_name"),
    ):
        index = pd.MultiIndex.from_tuples(list(rows), names=["clip_id", level])
        file = root / _chunk_path("calibration", feature, chunk)
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(list(rows.values()), index=index).to_parquet(file)


def _write_metadata(
    root: Path, features: Any, clips: Sequence[str], clips_per_chunk: int, cameras: Sequence[str]
) -> None:
    import pandas as pd

    index = pd.Index(clips, name="clip_id")
    present = ["egomotion", *cameras, "camera_intrinsics", "sensor_extrinsics"]
    events = [json.dumps([{"event_start_timestamp": time, "coc": "keep the lane"} for time in _EVENT_US])] * len(clips)
    tables = {
        "clip_index": {
            "chunk": [number // clips_per_chunk for number in range(len(clips))],
            "split": ["train"] * len(clips),
            "clip_is_valid": [True] * len(clips),
        },
        "metadata/feature_presence": {name: [True] * len(clips) for name in present},
        "metadata/data_collection": {"country": ["Nowhere"] * len(clips)},
        "splits/default": {"split": ["train"] * len(clips)},
        "reasoning/ood_reasoning": {"split": ["train"] * len(clips), "events": events},
    }
    for name, columns in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(columns, index=index).to_parquet(root / f"{name}.parquet")
    features.to_csv(root / "features.csv")


def _features(cameras: Sequence[str]) -> Any:
    """The table from which the devkit learns where each feature lies."""
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    for camera in cameras:
        members = {
            "video": f"{{clip_id}}.{camera}.mp4",
            "frame_timestamps": f"{{clip_id}}.{camera}.timestamps.parquet",
        }
        rows[camera] = {"directory": "camera", "clip_files_in_zip": json.dumps(members)}
    rows["egomotion"] = {
        "directory": "labels",
        "clip_files_in_zip": json.dumps({"egomotion": "{clip_id}.egomotion.parquet"}),
    }
    for name in ("camera_intrinsics", "sensor_extrinsics"):
        rows[name] = {"directory": "calibration", "clip_files_in_zip": None}
    for name, row in rows.items():
        row["chunk_path"] = _chunk_path(row["directory"], name, None)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("feature")


def _chunk_path(directory: str, feature: str, chunk: int | None) -> str:
    ending = "parquet" if directory == "calibration" else "zip"
    number = "{chunk_id:04d}" if chunk is None else f"{chunk:04d}"
    return f"{directory}/{feature}/{feature}.chunk_{number}.{ending}"


def _write_zip(file: Path, members: Mapping[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _parquet(table: Any) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()
