"""Stage one on one and on several GPUs of a machine: `extract` under torchrun, samples/s beside one GPU.

Full size, random weights, generated 1080p drives, one camera, int8. Each GPU has as many samples and as many cores: of
fewer GPUs than there are, the others' cores stay unused. Rates are those at which commit records appeared, over all
processes and from the first to the last: loading does not count. `efficiency` is samples/s over those of one GPU times
the number of GPUs. All write to one file system; `--store-dir` on one in RAM shows what a disk that keeps up allows,
`write_wait` tells whether it did. `--quick` runs a small model on two processes of the CPU.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_extract
import full_size
import torch
from benchmark_report import arguments, finish, hardware_name
from drills import call

KEYS = ("gpus", "samples", "samples_s", "efficiency", "cpu_cores", "read_wait", "write_wait", "store_on")


@contextmanager
def cores_of(gpus: int, available: int) -> Iterator[int]:
    """Within it this process and those that it starts have so many GPUs' share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[: max(1, len(cores) * gpus // available)]
    os.sched_setaffinity(0, mine)
    try:
        yield len(mine)
    finally:
        os.sched_setaffinity(0, cores)


def measure(gpus: int, source: str, model: Path, store: Path, *, samples: int, small: bool) -> dict[str, Any]:
    """A row; waits are the first process's."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "cli.main"]
    command = ["extract", source, "--model", str(model), "--store", str(store), "--codec", "int8"]
    command += ["--samples", str(samples * gpus), "--t0", "every:0.2" if small else bench_extract.T0]
    report = call(*command, *(["--device", "cpu"] if small else []), program=torchrun)
    times = sorted(record.stat().st_mtime for record in (store / "commits").iterdir())
    shutil.rmtree(store)
    return {
        "gpus": gpus,
        "samples": len(times),
        "samples_s": (len(times) - 1) / (times[-1] - times[0]),
        "read_wait": report["read_wait"],
        "write_wait": report["write_wait"],
    }


def file_system(place: Path) -> str:
    """Its kind, such as ext4 or tmpfs."""
    return subprocess.run(
        ["stat", "--file-system", "--format=%T", str(place)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="checkpoint and recordings; what is there already is used again")
    parser.add_argument("--store-dir", type=Path, help="where stores are written; default: --work")
    parser.add_argument("--samples", type=int, default=200, help="of each GPU")
    options = parser.parse_args()
    available = 2 if options.quick else torch.cuda.device_count()
    if available < 2:
        raise SystemExit("a full run needs two CUDA devices; --quick runs a small model on the CPU.")
    scale = bench_extract.QUICK if options.quick else bench_extract.FULL
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        names = full_size.camera_names(1)
        model = full_size.write_checkpoint(work / "vlm-model", small=options.quick, with_vlm=True)
        source = bench_extract.write_drives(work / "drives1", scale, names)
        samples = 4 if options.quick else options.samples
        store = (options.store_dir or work) / "store"
        for gpus in sorted({1, 2, available}):
            with cores_of(gpus, available) as cores:
                row = measure(gpus, source, model, store, samples=samples, small=options.quick)
            row |= {"cpu_cores": cores, "store_on": file_system(store.parent)}
            row["efficiency"] = row["samples_s"] / (rows[0] if rows else row)["samples_s"] / gpus
            rows.append({key: row[key] for key in KEYS})
            print(json.dumps(rows[-1]), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware_name()
    finish("extract_scaling", rows, options, hardware=f"{available} x {hardware}")


if __name__ == "__main__":
    main()
