"""Stage one on one and on several GPUs of a machine: `extract` under torchrun, samples/s beside one GPU.

Full size, random weights, generated 1080p drives, one camera, int8. Each GPU has as many samples and as many whole
cores: of fewer GPUs than there are, the others' stay unused. `samples_s` is the slope of a line through the moments at
which commit records appeared while all processes were at work, those of each left out that it may have read ahead: its
first, read while its model was loaded, and as many of its last, beside which nothing is read any more. `efficiency` is
samples/s over those of one process times their number. `decode_s` is reading and preprocessing alone, with as many
workers as the processes have together, on the same cores: a machine may not decode twice as fast with twice as many.
All write to one file system; `--store-dir` on one in RAM shows what a disk that keeps up allows, `write_wait` tells
whether it did. `--one-gpu 2` runs two processes on the first GPU, each with half of the cores: what they cost each
other, as long as that GPU keeps up with both. `--quick` runs a small model on two processes of the CPU.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_extract
import full_size
import numpy as np
import torch
from benchmark_report import arguments, finish, hardware_name
from drills import call

from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.reading_process import default_workers
from alpacache.planning.time_model import prefill_batch
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.stretches import share_of
from cache_store.format.names import COMMITS, record_path, sample_key

KEYS = (
    *("gpus", "processes", "samples", "samples_s", "efficiency", "decode_s", "of_decoding", "workers", "cpu_cores"),
    *("read_wait", "write_wait", "store_on"),
)
BATCH = prefill_batch(cameras=1, frames=4)
AHEAD_BATCHES = 4
"""Prepared (2), in the VLM, being copied; and a sample a worker."""
DECODED = 100
"""Samples of a process that are read and preprocessed alone."""


def commit_moments(store: Path, source: str, t0: str, *, processes: int, samples: int) -> list[list[float]]:
    """Of each process the sorted moments at which its samples were committed; it has those that `extract` deals it."""
    opened = open_source(source, cameras=full_size.camera_names(1))
    refs, _ = select(opened, t0=t0, samples=samples)
    shares = [share_of(refs, opened, number, processes) for number in range(processes)]
    records = [[store / record_path(COMMITS, sample_key(ref.sample_id)) for ref in share] for share in shares]
    return [sorted(record.stat().st_mtime for record in own) for own in records]


def rate_together(moments: Sequence[Sequence[float]], *, ahead: int) -> float | None:
    """Commits a second while all processes are at work, `ahead` left out at both ends; None if they never are."""
    began, ended = max(own[ahead] for own in moments), min(own[-1 - ahead] for own in moments)
    counted = sorted(moment for own in moments for moment in own if began <= moment <= ended)
    if ended <= began:
        return None
    return float(np.polyfit(np.array(counted) - began, np.arange(len(counted)), 1)[0])


def physical_core(cpu: int) -> tuple[int, ...]:
    """What CPUs that share a core have in common, then the CPU; the CPU alone where that cannot be read."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return *(int((topology / name).read_text()) for name in ("physical_package_id", "core_id")), cpu
    except (OSError, ValueError):
        return 0, cpu, cpu


@contextmanager
def cores_of(processes: int, available: int) -> Iterator[int]:
    """Within it this process and those that it starts have the share of the cores of so many of all there may be."""
    cores = sorted(os.sched_getaffinity(0), key=physical_core)
    mine = cores[: max(1, len(cores) * processes // available)]
    os.sched_setaffinity(0, mine)
    try:
        yield len(mine)
    finally:
        os.sched_setaffinity(0, cores)


def measure(
    processes: int, source: str, model: Path, store: Path, *, samples: int, workers: int, small: bool, one_gpu: bool
) -> dict[str, Any]:
    """A row; `workers` are each process's, waits the first one's."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    if one_gpu:
        torchrun += ["--no-python", "env", "LOCAL_RANK=0", sys.executable]
    torchrun += ["-m", "cli.main"]
    command = ["extract", source, "--model", str(model), "--store", str(store), "--codec", "int8"]
    t0 = "every:0.2" if small else bench_extract.T0
    command += ["--samples", str(samples * processes), "--t0", t0, "--workers", str(workers)]
    report = call(*command, *(["--device", "cpu"] if small else []), program=torchrun)
    moments = commit_moments(store, source, t0, processes=processes, samples=samples * processes)
    shutil.rmtree(store)
    first = min(own[0] for own in moments)
    print(json.dumps({"committed_at_s": [[round(at - first, 2) for at in own] for own in moments]}), flush=True)
    return {
        "gpus": 1 if one_gpu else processes,
        "processes": processes,
        "samples": sum(map(len, moments)),
        "samples_s": rate_together(moments, ahead=0 if small else workers + AHEAD_BATCHES * BATCH),
        "read_wait": report["read_wait"],
        "write_wait": report["write_wait"],
    }


def decoding_rate(source: str, model: Path, *, samples: int, workers: int, small: bool) -> float:
    """Samples a second that so many workers read and preprocess, nothing else going on."""
    config = ExtractConfig(
        source=source,
        model=str(model),
        store=str(model.with_name("unused")),  # reading alone
        cameras=full_size.camera_names(1),
        t0="every:0.2" if small else bench_extract.T0,
        samples=samples,
        workers=workers,
    )
    with bench_extract.begun_reading(config, full_size.device()) as (_, _, rate):
        return rate


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
    parser.add_argument("--gpus", type=int, nargs="+", help="how many, in that order; default: 1, 2 and all there are")
    parser.add_argument("--one-gpu", type=int, metavar="N", help="1 and N processes, all of them on the first GPU")
    options = parser.parse_args()
    available = 2 if options.quick else options.one_gpu or torch.cuda.device_count()
    if available < 2 or not (options.quick or torch.cuda.is_available()):
        raise SystemExit("a full run needs two CUDA devices, or --one-gpu 2; --quick runs a small model on the CPU.")
    small: bool = options.quick
    clips = math.ceil(options.samples * available / bench_extract.MOMENTS)
    scale = bench_extract.QUICK if small else dataclasses.replace(bench_extract.FULL, clips=clips)
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        names = full_size.camera_names(1)
        model = full_size.write_checkpoint(work / "vlm-model", small=small, with_vlm=True)
        source = bench_extract.write_drives(work / "drives1", scale, names)
        samples = 6 if small else options.samples
        store = (options.store_dir or work) / "store"
        one_gpu = options.one_gpu is not None
        for processes in options.gpus or sorted({1, available} if one_gpu else {1, 2, available}):
            with cores_of(processes, available) as cores:
                workers = default_workers(cores // processes)
                row = measure(
                    processes, source, model, store, samples=samples, workers=workers, small=small, one_gpu=one_gpu
                )
                row["workers"] = workers * processes
                decoded = min(samples, DECODED) * processes
                row["decode_s"] = decoding_rate(source, model, samples=decoded, workers=row["workers"], small=small)
            row |= {"cpu_cores": cores, "store_on": file_system(store.parent)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    single = next((row["samples_s"] for row in rows if row["processes"] == 1), None)
    for row in rows:
        row["efficiency"] = row["samples_s"] / single / row["processes"] if single and row["samples_s"] else None
        row["of_decoding"] = row["samples_s"] / row["decode_s"] if row["samples_s"] else None
    rows = [{key: row[key] for key in KEYS} for row in rows]
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware_name()
    finish("extract_scaling", rows, options, hardware=hardware if one_gpu else f"{available} x {hardware}")


if __name__ == "__main__":
    main()
