"""Stage one as people run it, at full size: 300 one-camera samples, int8, killed twice on the way, verified in depth.

Every part is the command that a user types, in a process of its own; random weights, generated 1080p drives. `--quick`
runs a small model on the CPU.
"""

import shutil
from pathlib import Path
from typing import Any

import bench_extract
import full_size
from drills import call, kill_at, run_drill


def drill(work: Path, *, small: bool) -> dict[str, Any]:
    samples, kills, scale = (8, (2, 5), bench_extract.QUICK) if small else (300, (100, 200), bench_extract.FULL)
    names = full_size.camera_names(1)
    model = full_size.write_checkpoint(work / "vlm-model", small=small, with_vlm=True)
    store = work / "extracted"
    source = bench_extract.write_drives(work / "drives1", scale, names)
    command = ["extract", source, "--model", str(model), "--store", str(store), "--cameras", ",".join(names)]
    command += ["--codec", "int8", "--t0", "every:0.2" if small else bench_extract.T0, "--samples", str(samples)]
    command += ["--batch-size", str(scale.batch), "--device", "cpu"] if small else []

    def committed() -> int:
        return sum(1 for _ in (store / "commits").glob("*")) if store.exists() else 0

    killed = [kill_at(number, committed, command) for number in kills]
    report = call(*command)
    verified = call("verify", str(store), "--deep")
    stored = call("info", str(store))
    shutil.rmtree(store)
    return {
        "samples": stored["samples"],
        "killed_at": [number for number, _ in killed],
        "extracted_last": report["extracted"],
        "quarantined": report["quarantined"],
        "samples_s": report["samples_per_s"],
        "wall_s": sum(seconds for _, seconds in killed) + report["wall_s"],
        "damaged": len(verified["damaged"]),
        "verify_s": verified["wall_s"],
        "gb": stored["size_bytes"] / 1e9,
    }


if __name__ == "__main__":
    run_drill("extract_drill", drill, __doc__)
