"""`alpacache train`: stage two."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpacache.config import read_toml
from alpacache.torchrun import this_process
from alpacache.training.config import TrainConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.planning.workload import MemoryPlan


def _read_file(file: Path, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config file; to resume with a run's own means that run, wherever it lies now."""
    values = read_toml(file, TrainConfig)
    if "out" not in typed and typed.get("resume", values.get("resume")):
        from alpacache.training.run_directory import run_of

        if (run := run_of(file)) is not None:
            values["out"] = str(run)
    return values


@from_config(
    TrainConfig,
    alternatives=("steps", "epochs"),
    read_file=_read_file,
    panels={
        "Data": "epochs steps batch_size draws prefix route_dropout balance only exclude split_by sample_weights "
        "on_overlap on_damage seed",
        "What is trained": "trainable lora_rank lora_alpha causal times ema ema_every",
        "An expert of one's own size": "from_scratch expert_layers expert_width expert_intermediate expert_heads "
        "expert_map",
        "Optimizer": "optimizer lr min_lr warmup betas weight_decay clip",
        "Validation": "val val_every val_samples best_by patience",
        "Run directory": "save_every keep track take_over",
        "Memory and speed": "micro_batch checkpointing memory_budget in_memory capture compile device",
    },
)
def train(config: TrainConfig, json: bool) -> None:
    """Stage two: train expert and flow-matching head from the cache alone. The VLM is never loaded.

    Example: `alpacache train --store cache/train --val cache/val --model nvidia/Alpamayo-R1-10B --out runs/one
    --epochs 10`

    After a crash or Ctrl-C: the same command with `--resume`; it ends with the same weights as an undisturbed run.
    """
    with output.show_progress("train") as on_progress:
        from alpacache.training.train import train as run

        report = run(config, on_progress=on_progress, on_plan=_show_plan, on_note=output.note)
    if this_process().rank > 0:
        return
    lines = {"run": report.run, "steps": f"{report.steps} over {report.samples} samples"}
    if report.first_loss is not None:
        lines["loss"] = f"{report.first_loss:.4f} -> {report.last_loss:.4f}"
    speed = f"{report.samples_per_s:.2f} samples/s in {report.seconds:.1f} s"
    lines["speed"] = f"{speed}, {report.data_wait:.1%} waiting for data"
    if report.val_loss is not None:
        best = "" if report.best_val_loss is None else f", best {report.best_val_loss:.4f}"
        last = f"{report.val_loss:.4f}" if math.isfinite(report.val_loss) else "not finite; lower --lr"
        lines["validation loss"] = last + best
    if report.val_min_ade is not None:
        lines["validation minADE"] = f"{report.val_min_ade:.3f} m"
    if report.stopped_early:
        lines["stopped early"] = "validation had stopped getting better; a larger --patience goes on"
    if report.damaged:
        lines["damaged"] = f"{report.damaged} samples left out; `alpacache verify --deep` names them"
    if report.skipped:
        lines["skipped"] = f"{report.skipped} steps not applied, loss or gradient not finite; metrics.jsonl names them"
    if report.missed:
        lines["passing faults"] = f"{report.missed} samples could not be read once; metrics.jsonl names them"
    if report.peak_gib is not None:
        lines["GPU memory"] = f"{report.peak_gib:.2f} GiB reserved at peak, {report.planned_gib:.2f} planned"
    output.print_result(report, "train", lines, as_json=json)


def _show_plan(plan: "MemoryPlan") -> None:
    """Print the memory plan on stderr."""
    output.note(f"GPU memory, planned for {plan.settings}, {plan.draws} draws:")
    for name, size in plan.table():
        output.note(f"{size / 2**30:8.2f} GiB  {name}")
