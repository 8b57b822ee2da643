"""`check` of 100 clips of 20 s, as JPEGs and as films, beside reading the pictures of their samples alone.

    python benchmarks/bench_check.py [--quick] [--tree DIR]

`--tree` measures another checkout's `check` on the same recordings. Each run is a process of its own; `cpu_s` and
`wall_s` leave its imports out, `total_cpu_s` counts them. `of_reading` is CPU time as a multiple of the baseline's.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark_report import arguments, finish
from pai_tree import encode_h264
from PIL import Image

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.synthetic import SyntheticSource

SIZE = {"jpeg": (1280, 640), "film": (640, 320)}
DRIVES = 10
"""Drives that are rendered; the clips are these in turn, each moved to a place of its own."""

RUN = """
import json, resource, sys, time
import alpacache.checks.source, torch
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
source, cpu, wall = open_source(sys.argv[1]), spent(), time.perf_counter()
if sys.argv[2] == "check":
    report = alpacache.checks.source.check_source(source)
    noted = [check.name for check in report.checks if check.status != "ok"]
else:
    noted = [source.load(ref, cameras=[FRONT_CAMERA], frames=4).frames.shape for ref in select(source)[0]][:0]
wall, cpu = time.perf_counter() - wall, spent() - cpu
print(json.dumps({"cpu_s": cpu, "wall_s": wall, "total_cpu_s": spent(), "noted": noted}))
"""


def write_clips(root: Path, clips: int, kind: str) -> None:
    """A folder of recordings at 10 Hz."""
    source = SyntheticSource(DRIVES, seed=7, mix={"early_curve": 0.4, "late_curve": 0.3, "straight": 0.3})
    names = []
    for number in range(clips):
        drive = source.clip_ids[number % DRIVES]
        names.append(f"clip-{number:03d}")
        clip, track = root / "clips" / names[-1], source.track(drive)
        stamps, first = track.timestamps_us[::2], root / "clips" / f"clip-{number % DRIVES:03d}"
        clip.mkdir(parents=True)
        columns = [*(track.xyz + number).T, *track.quaternion_xyzw.T]
        named = dict(zip(("x", "y", "z", "qx", "qy", "qz", "qw"), columns, strict=True))
        pq.write_table(pa.table({"timestamp": track.timestamps_us, **named}), clip / "egomotion.parquet")
        pq.write_table(pa.table({"timestamp": stamps}), clip / f"{FRONT_CAMERA}.timestamps.parquet")
        if number >= DRIVES:
            for file in [*first.glob("*.mp4"), *first.glob(f"{FRONT_CAMERA}/*")]:
                copy = clip / file.relative_to(first)
                copy.parent.mkdir(exist_ok=True)
                os.link(file, copy)
            continue
        frames = source.film(drive, FRONT_CAMERA, stamps).transpose(0, 2, 3, 1)
        images = [Image.fromarray(frame).resize(SIZE[kind]) for frame in frames]
        if kind == "film":
            pictures = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
            (clip / f"{FRONT_CAMERA}.mp4").write_bytes(encode_h264(pictures, 10, 20))
            continue
        (clip / FRONT_CAMERA).mkdir()
        for place, image in enumerate(images):
            with io.BytesIO() as jpeg:
                image.save(jpeg, "JPEG", quality=88)
                (clip / FRONT_CAMERA / f"{place:06d}.jpg").write_bytes(jpeg.getvalue())
    (root / "dataset.json").write_text(json.dumps({"name": root.name, "cameras": [FRONT_CAMERA], "clips": names}))


def measure(root: Path, what: str, tree: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, f"folder:{root}", what]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="a checkout of alpacache")
    parser.add_argument("--recordings", type=Path, help="where recordings lie, or are written if none do")
    options = parser.parse_args()
    clips, rounds, rows = (DRIVES, 1, []) if options.quick else (100, 3, [])
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("jpeg", "film"):
            root = (options.recordings or Path(scratch)) / f"{kind}-{clips}"
            if not root.exists():
                write_clips(root, clips, kind)
            for what in ("read", "check"):
                runs = [measure(root, what, options.tree.resolve()) for _ in range(rounds)]
                best = min(runs, key=lambda run: float(run["cpu_s"]))
                baseline = best["cpu_s"] if what == "read" else rows[-1]["cpu_s"]
                row = {"clips": clips, "as": kind, "what": what, **best, "of_reading": best["cpu_s"] / baseline}
                rows.append(row | {"noted": " ".join(best["noted"])})
    finish("check", rows, options)


if __name__ == "__main__":
    main()
