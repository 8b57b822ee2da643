"""`alpacache train`: stage two."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, output

if TYPE_CHECKING:
    from alpacache.planning.workload import MemoryPlan


def train(
    store: Annotated[
        list[str] | None,
        typer.Option(
            help="PATH or PATH=WEIGHT: store to train from (also s3://); repeatable, a weight is its share of an epoch."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint that the store was extracted with.")] = None,
    out: Annotated[str | None, typer.Option(help="Directory of the run.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of the settings; options given here win.")
    ] = None,
    val: Annotated[str | None, typer.Option(help="Store of held-out samples for the validation loss.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the samples, instead of steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step. [default: 8]")] = None,
    draws: Annotated[
        str | None,
        typer.Option(
            help="Noise draws a sample and step; they share its prefix. `auto` fits them to the disk. [default: 1]"
        ),
    ] = None,
    trainable: Annotated[
        str | None,
        typer.Option(help="`all`; `head`: projections and final norm; `lora`: head and adapters. [default: all]"),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters. [default: 16]")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="`adamw8` (24-bit masters, 8-bit moments), `adamw`, or `auto`. [default: auto]")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Samples through the expert at a time. [default: as many as fit]")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations in the backward: less memory. [default: if needed]")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Size of the card to stay within, such as `24GB`. [default: all of it]")
    ] = None,
    balance: Annotated[
        str | None, typer.Option(help="`curvature`: equal shares of straight, gentle and sharp. [default: none]")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option(help="Fuse small operations with torch.compile on a GPU. [default: yes]")
    ] = None,
    capture: Annotated[
        bool | None, typer.Option(help="Replay each step as one CUDA graph on a GPU. [default: yes]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [default: 1e-4; lora 5e-4, head 1e-3]")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Warm-up steps before the cosine. [default: 100, at most a tenth]")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm. [default: 1.0]")] = None,
    causal: Annotated[bool | None, typer.Option(help="Causal attention among action tokens. [default: no]")] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. [default: 200]")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep, besides the best. [default: 2]")] = None,
    val_every: Annotated[int | None, typer.Option(help="Steps between validations. [default: 100]")] = None,
    best_by: Annotated[
        str | None, typer.Option(help="`loss` or `min_ade` of the validation decides which is best. [default: loss]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a new best. [default: never]")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Keep an average of the weights in RAM: decay a step, such as 0.999.")
    ] = None,
    on_damage: Annotated[
        str | None, typer.Option(help="A damaged sample: `stop`, or `skip` it and count. [default: stop]")
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="`tensorboard`, `wandb` (both), or `none`. [default: tensorboard]")
    ] = None,
    in_memory: Annotated[
        bool | None, typer.Option(help="Keep samples in page-locked RAM after their first read. [default: no]")
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the run's newest checkpoint, if it has one.")
    ] = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Stage two: train expert and flow-matching head from the cache alone. The VLM is never loaded.

    Example: `alpacache train --store cache/train --val cache/val --model nvidia/Alpamayo-R1-10B --out runs/one
    --epochs 10`

    After a crash or Ctrl-C: the same command with `--resume`; it ends with the same weights as an undisturbed run.
    """
    from alpacache.config_file import make, read_toml
    from alpacache.errors import UsageError
    from alpacache.torchrun import this_process
    from alpacache.training.config import TrainConfig

    values = read_toml(config, TrainConfig) if config is not None else {}
    if steps is not None or epochs is not None:
        values.pop("steps", None)
        values.pop("epochs", None)
    values |= options.given(
        {
            **{
                "stores": tuple(store) if store else None,
                "model": model,
                "out": out,
                "val": val,
                "steps": steps,
                "epochs": epochs,
            },
            **{
                "batch_size": batch_size,
                "draws": None if draws is None else options.count_or_auto("draws", draws),
                "lr": lr,
                "warmup": warmup,
                "clip": clip,
                "causal": causal,
                "seed": seed,
            },
            **{"save_every": save_every, "keep": keep, "val_every": val_every, "in_memory": in_memory},
            **{"resume": resume, "device": device, "patience": patience, "ema": ema},
            **{"lora_rank": lora_rank, "micro_batch": micro_batch, "checkpointing": checkpointing},
            **{"memory_budget": memory_budget, "capture": capture, "compile": compile},
            **{
                name: options.one_of(name, value, allowed)
                for name, value, allowed in (
                    ("trainable", trainable, ("all", "head", "lora")),
                    ("optimizer", optimizer, ("auto", "adamw8", "adamw")),
                    ("balance", balance, ("none", "curvature")),
                    ("best_by", best_by, ("loss", "min_ade")),
                    ("on_damage", on_damage, ("stop", "skip")),
                    ("track", track, ("tensorboard", "wandb", "none")),
                )
                if value is not None
            },
        }
    )
    missing = [
        option for key, option in (("stores", "--store"), ("model", "--model"), ("out", "--out")) if key not in values
    ]
    if missing:
        raise UsageError(f"{', '.join(missing)} missing; give it as an option or in --config FILE.toml.")
    settings = make(TrainConfig, values)
    with output.show_progress("train") as on_progress:
        from alpacache.training.train import train as run

        report = run(settings, on_progress=on_progress, on_plan=_show_plan)
    if this_process().rank > 0:
        return
    if json:
        output.print_json(report)
        return
    rows = [
        ["run", report.run],
        ["steps", f"{report.steps} over {report.samples} samples"],
        [
            "speed",
            f"{report.samples_per_s:.2f} samples/s in {report.seconds:.1f} s, {report.data_wait:.1%} waiting for data",
        ],
    ]
    if report.first_loss is not None:
        rows.insert(2, ["loss", f"{report.first_loss:.4f} -> {report.last_loss:.4f}"])
    if report.val_loss is not None:
        best = "" if report.best_val_loss is None else f", best {report.best_val_loss:.4f}"
        last = f"{report.val_loss:.4f}" if math.isfinite(report.val_loss) else "not finite; lower --lr"
        rows.append(["validation loss", f"{last}{best}"])
    if report.val_min_ade is not None:
        rows.append(["validation minADE", f"{report.val_min_ade:.3f} m"])
    if report.stopped_early:
        rows.append(["stopped early", "validation had stopped getting better; a larger --patience goes on"])
    if report.damaged:
        rows.append(["damaged", f"{report.damaged} samples left out; `alpacache verify` names them"])
    if report.peak_gib is not None:
        rows.append(["GPU memory", f"{report.peak_gib:.2f} GiB reserved at peak, {report.planned_gib:.2f} planned"])
    output.print_table("train", rows)


def _show_plan(plan: "MemoryPlan") -> None:
    """The memory plan, on stderr."""
    how = f"micro-batches of {plan.micro_batch}, {'' if plan.checkpointing else 'no '}checkpointing, {plan.draws} draws"
    output.note(f"GPU memory, planned for {how}:")
    for name, size in plan.table():
        output.note(f"{size / 2**30:8.2f} GiB  {name}")
