"""Training on one and on several GPUs of a machine: `alpacache.train` under torchrun, samples/s beside one GPU.

Full size, random weights, 4 cameras, int8. `weak`: 8 samples a GPU and step; `strong`: 8 samples a step, shared.
`efficiency` is samples/s over those of one GPU times the number of GPUs; of `strong` it is the part of the ideal that
is left when a GPU has less to do. `pinned` keeps samples in RAM, each process its own, and counts the steps after
nearly all were read by each; `page_cache` reads files that are in RAM already. `loss_difference` is the largest
relative difference of a step's loss from one GPU's on the same samples. `--quick` runs a small expert on CPUs with
gloo.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import full_size
import torch
from bench_train_e2e import (
    FULL,
    MODEL,
    QUICK,
    Case,
    Medium,
    Plan,
    hardware,
    make_store,
    prepare_medium,
    step_times,
    train_config,
)
from benchmark_report import arguments, finish

from alpacache.torchrun import this_process
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory
from alpacache.training.train import train

KEYS = (
    *("gpus", "scaling", "medium", "batch", "step_ms", "samples_s", "data_wait", "efficiency", "loss_difference"),
    *("steps", "peak_gib", "note"),
)
UNREAD = 0.01
"""Part of the samples that a process may still have to read when the first step counts."""
BATCH = 8


def cases(counts: list[int], media: Sequence[Medium]) -> list[tuple[int, str, Case]]:
    """(GPUs, kind of scaling, what each run trains); one GPU first, which the others are compared with."""
    found = []
    for medium in media:
        for gpus in counts:
            for scaling in ("weak", "strong") if gpus > 1 else ("weak",):
                batch = BATCH * gpus if scaling == "weak" else BATCH
                case = Case(name=f"{medium}-{gpus}-{scaling}", cameras=4, codec="int8", batch=batch, medium=medium)
                found.append((gpus, scaling, case))
    return found


def worker(config: dict[str, Any]) -> None:
    """In one of torchrun's processes."""
    config["stores"], config["betas"] = tuple(config["stores"]), tuple(config["betas"])
    with mock.patch.object(RunDirectory, "save"):  # weights and moments that nobody reads
        report = train(TrainConfig(**config))
    if this_process().rank == 0:
        Path(config["out"], "report.json").write_text(json.dumps(dataclasses.asdict(report)))


def measure(
    gpus: int, most_gpus: int, scaling: str, case: Case, plan: Plan, work: Path
) -> tuple[dict[str, Any], list[float]]:
    """A row, and the loss of each step."""
    out = work / "runs" / case.name
    shutil.rmtree(out, ignore_errors=True)
    reader = make_store(dataclasses.replace(case, batch=BATCH), plan, work)
    prepare_medium(reader, cold=False)
    # A process sees 1 of `gpus` samples in an epoch, others in the next. All runs have as many steps as the longest,
    # so that their learning rates are the same.
    epochs = math.ceil(math.log(UNREAD) / math.log(1 - 1 / most_gpus))
    read_first = math.ceil(epochs * len(reader) / BATCH) if case.medium == "pinned" else 0
    skip = read_first + plan.settle
    steps = skip + plan.measured + 1
    config, _ = train_config(case, store=reader.path, checkpoint=work / MODEL, out=out, steps=steps)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    row = {"gpus": gpus, "scaling": scaling, "medium": case.medium, "batch": case.batch}
    done = subprocess.run(
        [*command, __file__, "--worker", json.dumps(dataclasses.asdict(config))],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-4000:], flush=True)
        return row | {"note": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1][:160]}"}, []
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [(ms, wait) for step, ms, wait in step_times(metrics, case.batch) if step > skip]
    total_ms = sum(ms for ms, _ in times)
    report = json.loads((out / "report.json").read_text())
    shutil.rmtree(out)
    row |= {
        "step_ms": statistics.median(ms for ms, _ in times),
        "samples_s": case.batch * len(times) / total_ms * 1e3,
        "data_wait": sum(ms * wait for ms, wait in times) / total_ms,
        "steps": len(times),
        "peak_gib": report["peak_gib"],
    }
    return row, [entry["loss"] for entry in metrics]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="checkpoint, store and runs; what is there already is used again")
    parser.add_argument("--store-gb", type=float, default=FULL.store_bytes / 1e9, help="size of the store")
    parser.add_argument("--media", nargs="+", default=["pinned", "page_cache"], choices=["pinned", "page_cache"])
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no case after that many seconds")
    parser.add_argument("--worker", help="used by this program itself")
    options = parser.parse_args()
    started = time.monotonic()
    if options.worker:
        worker(json.loads(options.worker))
        return
    available = 2 if options.quick else torch.cuda.device_count()
    if available < 2:
        raise SystemExit(f"a full run needs two CUDA devices or more, {available} found; --quick runs on CPUs.")
    counts = [count for count in (1, 2, 4, 8) if count <= available]
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    plan = QUICK if options.quick else dataclasses.replace(FULL, store_bytes=int(options.store_gb * 1e9))
    full_size.write_checkpoint(work / MODEL, small=options.quick)
    rows: list[dict[str, Any]] = []
    alone: dict[str, list[float]] = {}
    try:
        for gpus, scaling, case in cases(counts, ["pinned"] if options.quick else options.media):
            if time.monotonic() - started > options.limit_s:
                print(f"no time left for {case.name} and what follows", flush=True)
                break
            row, losses = measure(gpus, max(counts), scaling, case, plan, work)
            if gpus == 1:
                alone[case.medium] = losses
            elif scaling == "strong" and losses:
                pairs = zip(alone[case.medium], losses, strict=False)
                row["loss_difference"] = max((abs(one - other) / one for one, other in pairs), default=None)
            single = [other for other in rows if other["gpus"] == 1 and other["medium"] == case.medium] or [row]
            if "samples_s" in row and "samples_s" in single[0]:
                row["efficiency"] = row["samples_s"] / single[0]["samples_s"] / gpus
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    rows = [{key: row.get(key) for key in KEYS} for row in rows]
    finish("train_scaling", rows, options, hardware=f"{available} x {hardware()}")


if __name__ == "__main__":
    main()
