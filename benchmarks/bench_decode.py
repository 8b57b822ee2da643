"""Decoding of samples of one clip: in one pass, beside each sample alone.

One camera's 1080p H.264 films at 30 frames a second with B-frames, four pictures a sample, the samples spread evenly,
`apart_s`, over the part of the clip that has room for history and future. `alone_ms` and `one_pass_ms` are processor
time a sample (user and system, one thread) of all that reading takes but resizing: opening, finding frames, decoding,
colours, with freed memory kept as the reading processes keep it; each is the least of several rounds, in turn.
`decoded` counts the frames a sample that leave the decoder. `key_s` is the time between key frames: the longer it is,
the more a sample alone decodes in vain. Frames that others are predicted from are decoded in a pass too, wanted or
not, but once.
"""

import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from bench_extract import PICTURES, VIDEO_CRF, VIDEO_FPS, RepeatedPictures
from benchmark_report import Row, arguments, finish

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import SampleRef
from alpacache.gpu.device import keep_freed_memory
from alpacache.sources import video, views
from alpacache.sources.folder import FolderSource

FRAMES = 4
FIRST_S, ROOM_S = 2.0, 6.5
"""The first moment, and what the last one leaves for its future."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Size of the benchmark."""

    picture: tuple[int, int]
    films: tuple[tuple[int, int], ...]
    """Seconds of each, and frames between its key frames."""
    moments: tuple[int, ...]
    rounds: int


FULL = Scale(picture=(1920, 1080), films=((12, 30), (20, 30), (20, 250)), moments=(1, 5, 25), rounds=3)
QUICK = Scale(picture=(192, 108), films=((12, 250),), moments=(1, 10), rounds=1)


def write_clip(root: Path, scale: Scale, seconds: int, key: int) -> FolderSource:
    """A folder with one clip and one camera."""
    import av

    drive = RepeatedPictures(1, size=scale.picture, cameras=(FRONT_CAMERA,))
    clip, track = drive.clip_ids[0], drive.track(drive.clip_ids[0])
    folder, count = root / "clips" / clip, seconds * VIDEO_FPS
    folder.mkdir(parents=True)
    poses = {"timestamp": track.timestamps_us} | {name: track.xyz[:, axis] for axis, name in enumerate("xyz")}
    poses |= {name: track.quaternion_xyzw[:, axis] for axis, name in enumerate(("qx", "qy", "qz", "qw"))}
    pd.DataFrame(poses).to_parquet(folder / "egomotion.parquet")
    stamps = np.round(np.arange(count) * 1e6 / VIDEO_FPS).astype(np.int64)
    pd.DataFrame({"timestamp": stamps}).to_parquet(folder / f"{FRONT_CAMERA}.timestamps.parquet")
    pictures = drive.film(clip, FRONT_CAMERA, np.arange(PICTURES)).transpose(0, 2, 3, 1)
    options = {"crf": str(VIDEO_CRF), "g": str(key), "x264-params": "scenecut=0", "preset": "veryfast"}
    with av.open(str(folder / f"{FRONT_CAMERA}.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=VIDEO_FPS, options=options)
        (stream.width, stream.height), stream.pix_fmt = scale.picture, "yuv420p"
        for number in range(count):
            picture = np.ascontiguousarray(pictures[number % PICTURES])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    index = {"name": "decode", "cameras": [FRONT_CAMERA], "clips": [clip]}
    (root / "dataset.json").write_text(json.dumps(index))
    return FolderSource(root)


def read(source: FolderSource, stretches: list[list[SampleRef]]) -> float:
    """Read these samples; processor seconds."""
    started = _cpu_s()
    for refs in stretches:
        with views.one_pass(source, refs, cameras=source.cameras, frames=FRAMES, seed=0) as load:
            for ref in refs:
                load(ref)
    return _cpu_s() - started


def measure(source: FolderSource, scale: Scale, seconds: int, moments: int) -> dict[str, Any]:
    """Times of so many samples of the clip."""
    times = np.linspace(FIRST_S, seconds - ROOM_S, moments + 2)[1:-1]
    refs = [SampleRef(clip_id=source.clip_ids[0], t0_us=round(time * 1e6)) for time in times]
    ways = {"alone": [[ref] for ref in refs], "one_pass": [refs]}
    read(source, ways["alone"][:1])
    used: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(scale.rounds):
        for way, stretches in ways.items():
            used[way].append(read(source, stretches))
    row: dict[str, Any] = {"t0s": moments, "apart_s": float(times[1] - times[0]) if moments > 1 else None}
    row |= {f"{way}_ms": 1e3 * min(found) / moments for way, found in used.items()}
    row["of_alone"] = row["one_pass_ms"] / row["alone_ms"]
    for way, stretches in ways.items():
        row[f"{way}_decoded"] = _decoded(source, stretches) / moments
    return row


def _decoded(source: FolderSource, stretches: list[list[SampleRef]]) -> int:
    """How many frames leave the decoder."""
    frames, plain = [], video.needed_frames

    def counted(*given: Any) -> Iterator[Any]:
        for frame in plain(*given):
            frames.append(frame.pts)
            yield frame

    with mock.patch.object(video, "needed_frames", counted):
        read(source, stretches)
    return len(frames)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Entry point of the script."""
    options = arguments(__doc__).parse_args()
    keep_freed_memory()
    scale = QUICK if options.quick else FULL
    rows: list[Row] = []
    root = Path(tempfile.mkdtemp())
    try:
        for number, (seconds, key) in enumerate(scale.films):
            source = write_clip(root / str(number), scale, seconds, key)
            for moments in scale.moments:
                row = {"film_s": seconds, "key_s": key / VIDEO_FPS} | measure(source, scale, seconds, moments)
                print(row, flush=True)
                rows.append(row)
    finally:
        shutil.rmtree(root)
    finish("decode", rows, options)


if __name__ == "__main__":
    main()
