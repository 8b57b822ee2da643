"""Stage two as people run it, at full size: 300 steps under a 24 GB cap, killed twice, resumed, exported, evaluated.

Every part is the command that a user types, in a process of its own; random weights and keys and values, so the errors
in metres mean nothing but have to be the same of the run and of what was exported from it. `rerun_difference` is the
largest relative difference in loss of a step that was done once before a kill and again after it; `pictures` and the
report are written too. `--quick` runs a small expert on the CPU, in float32, which `export` rounds to the bfloat16 of
the base.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import full_size
from drills import call, kill_at, run_drill


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, as far as it was written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}


def progress(run: Path, least: int) -> int:
    """The last step that was written, once there is a checkpoint of step `least`: it is written while steps go on."""
    saved = (run / "checkpoints" / f"step-{least:07d}").is_dir()
    return max(losses(run), default=0) if saved else 0


def store(path: Path, model: Path, samples: int, *, small: bool) -> Path:
    shortest, longest = (72, 80) if small else full_size.PREFIX_TOKENS[1]
    full_size.write_store(path, model, cameras=1, codec="int8", samples=samples, shortest=shortest, longest=longest)
    return path


def drill(work: Path, *, small: bool) -> dict[str, Any]:
    steps, every, kills = (12, 4, (5, 10)) if small else (300, 80, (100, 180))
    model, run, exported = full_size.write_checkpoint(work / "model", small=small), work / "run", work / "exported"
    data = store(work / "train", model, 24 if small else 160, small=small)
    held_out = store(work / "val", model, 8, small=small)
    for old in (run, exported, work / "eval-run", work / "eval-exported"):
        shutil.rmtree(old, ignore_errors=True)
    command = ["train", "--store", str(data), "--val", str(held_out), "--model", str(model), "--out", str(run)]
    command += ["--steps", str(steps), "--save-every", str(every), "--val-every", str(every), "--batch-size", "8"]
    command += ["--device", "cpu"] if small else ["--memory-budget", "24GB"]
    killed, seconds, before = [], 0.0, {}
    for number, step in enumerate(kills):
        command_now = [*command, *(["--resume"] if number else [])]
        at, lost = kill_at(step, lambda least=step // every * every: progress(run, least), command_now)
        killed.append(at)
        seconds += lost
        before |= losses(run)
    report = call(*command, "--resume")
    after = losses(run)
    again = [step for step in before if step > every and after[step] is not None and step <= max(killed)]
    done = call("export", "--model", str(model), "--checkpoint", str(run / "last"), "--out", str(exported))
    device = ["--device", "cpu"] if small else []
    judged = ["eval", "--store", str(held_out), *device]
    first = [*judged, "--model", str(model), "--checkpoint", str(run / "last"), "--out", str(work / "eval-run")]
    second = [*judged, "--model", str(exported), "--out", str(work / "eval-exported")]
    with ThreadPoolExecutor(2) as pool:
        trained, loaded = pool.map(lambda command: call(*command), (first, second))
    metrics = [
        found["summary"]["strata"]["all"]["metrics"][label] for found, label in ((trained, "trained"), (loaded, "base"))
    ]
    return {
        "steps": report["steps"],
        "steps_written": len(after),
        "killed_at": killed,
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step")),
        "rerun_steps": len(again),
        "rerun_difference": max((abs(after[step] - before[step]) / abs(after[step]) for step in again), default=None),
        "first_loss": after[1],
        "last_loss": after[steps],
        "val_loss": report["val_loss"],
        "peak_gib": report["peak_gib"],
        "planned_gib": report["planned_gib"],
        "train_wall_s": seconds + report["wall_s"],
        "export_s": done["wall_s"],
        "export_gb": done["written_bytes"] / 1e9,
        "eval_s": trained["wall_s"],
        "min_ade_run": metrics[0]["min_ade"],
        "min_ade_exported": metrics[1]["min_ade"],
        "ade_run": metrics[0]["ade"],
        "ade_exported": metrics[1]["ade"],
    }


if __name__ == "__main__":
    run_drill("full_run", drill, __doc__)
