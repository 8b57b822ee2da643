"""Stage one on one and on several GPUs of a machine: `extract` under torchrun, samples/s beside one GPU.

Full size, random weights, generated 1080p drives, one camera, int8; as many samples a GPU, and the machine's cores are
shared. Rates are those at which commit records appeared, over all processes and from the first to the last: loading
does not count. `efficiency` is samples/s over those of one GPU times the number of GPUs. `--quick` runs a small model
on two processes of the CPU.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_extract
import full_size
import torch
from benchmark_report import arguments, finish, hardware_name
from drills import call

KEYS = ("gpus", "samples", "samples_s", "efficiency", "cpu_cores", "read_wait", "write_wait")


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
        "cpu_cores": len(os.sched_getaffinity(0)),
        "read_wait": report["read_wait"],
        "write_wait": report["write_wait"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="checkpoint and recordings; what is there already is used again")
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
        for gpus in sorted({1, 2, available}):
            row = measure(gpus, source, model, work / "store", samples=samples, small=options.quick)
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
