"""`alpacache plan`: what both stages will take, worked out beforehand."""

from typing import TYPE_CHECKING

from alpacache.planning.config import PlanConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.planning.plan import Plan

_SHOWN_BYTES = 10_000


@from_config(
    PlanConfig,
    panels={
        "Stage one": "views model cameras frames picture codec hidden_states reasoning rollouts store",
        "Stage two": "batch_size draws epochs trainable lora_rank memory_budget",
        "Machine": "gpu probe",
    },
)
def plan(config: PlanConfig, json: bool) -> None:
    """Tokens, bytes, hours and GPU memory of both stages. Needs no GPU, no weights and, without --model, no network.

    Example: `alpacache plan --samples 1000 --codec int8 --epochs 10 --batch-size 4 --gpu 4090 --memory-budget 24GB`
    """
    from alpacache.planning.plan import plan as run

    plan = run(config)
    if json:
        output.print_json(plan)
        return
    output.print_table(plan.model, _sample_rows(plan))
    output.print_table("codecs", _codec_rows(plan), heads=["codec", "KV MB", "sample MB", "store GB"])
    output.print_table(f"time on {plan.machine.gpu.name} ({plan.machine.gpu_is})", _time_rows(plan))
    output.print_table("GPU memory of train", _memory_rows(plan), heads=[_settings(plan), "GiB"])
    output.print_table("what the numbers rest on", [["-", text] for text in plan.notes])


def _sample_rows(plan: "Plan") -> list[list[str]]:
    sizes = dict(plan.bytes_by_field)
    tails = sum(sizes.pop(name) for name in list(sizes) if name.startswith("tail."))
    shown = {name: size for name, size in sizes.items() if size >= _SHOWN_BYTES}
    views = f" ({plan.views} views of {plan.samples // plan.views})" if plan.views > 1 else ""
    rows = [
        ["cameras", f"{', '.join(plan.cameras)}; {plan.frames} frames each"],
        ["tokens a sample", f"{plan.tokens}, of which {plan.images} images of {plan.tokens_an_image}"],
        ["bytes a sample", f"{(sum(sizes.values()) + tails) / 1e6:.2f} MB ({plan.codec})"],
        *[[f"  {name}", f"{size / 1e6:.3f} MB"] for name, size in shown.items()],
        *([[f"  {plan.rollouts} rollouts", f"at most {tails / 1e6:.3f} MB"]] if tails else []),
        ["  other fields", f"{(sum(sizes.values()) - sum(shown.values())) / 1e6:.3f} MB"],
        ["store", f"{plan.store_bytes / 1e9:.1f} GB for {plan.samples} samples{views}"],
    ]
    if plan.free_bytes is not None:
        rows.append(["free at --store", f"{plan.free_bytes / 1e9:.1f} GB"])
    return rows


def _codec_rows(plan: "Plan") -> list[list[str]]:
    return [
        [
            f"{codec} *" if codec == plan.codec else codec,
            f"{plan.kv_bytes_by_codec[codec] / 1e6:.1f}",
            f"{size / 1e6:.1f}",
            f"{size * plan.samples / 1e9:.1f}",
        ]
        for codec, size in plan.bytes_by_codec.items()
    ]


def _time_rows(plan: "Plan") -> list[list[str]]:
    one, two, machine = plan.extract, plan.train, plan.machine
    busy_s = two.compute_s + two.optimizer_s
    writes = f"{machine.disk_is} {machine.write_bytes_s / 1e9:.2f} GB/s"
    reads = f"{machine.disk_is} {machine.read_bytes_s / 1e9:.2f} GB/s"
    in_memory = f"{_duration(two.hours_in_memory)} if samples stay in RAM after the first epoch (--in-memory)"
    return [
        ["extract", _duration(one.hours)],
        ["  a sample", f"{one.prefill_s * 1e3:.0f} ms VLM"],
        ["", f"{one.reading_s * 1e3:.0f} ms decoding ({machine.disk_is} {machine.cores} cores)"],
        ["", f"{one.write_s * 1e3:.0f} ms durable write ({writes})"],
        ["  GPU memory", f"{one.weights_bytes / 2**30:.1f} GiB of weights, and activations"],
        ["train", f"{_duration(two.hours)} for {two.steps} steps, {_bound(busy_s, two.read_s)}"],
        ["  in RAM", in_memory],
        ["  a step", f"{two.compute_s * 1e3:.0f} ms forward and backward, {two.optimizer_s * 1e3:.0f} ms optimizer"],
        ["  a batch", f"{two.read_s * 1e3:.0f} ms from disk ({reads})"],
    ]


def _bound(busy_s: float, read_s: float) -> str:
    return "the GPU decides" if busy_s >= read_s else "the disk decides"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _settings(plan: "Plan") -> str:
    memory = plan.memory
    how = f"micro-batches of {memory.micro_batch}, {'with' if memory.checkpointing else 'no'} checkpointing"
    return f"{how}, draws {memory.draws}"


def _memory_rows(plan: "Plan") -> list[list[str]]:
    rows = [[name, f"{size / 2**30:.2f}"] for name, size in plan.memory.table()]
    return [*rows, ["allowed", f"{plan.cap_bytes / 2**30:.2f}"]]
