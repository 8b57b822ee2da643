"""`alpacache plan`: what both stages will take, worked out beforehand."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from alpacache.driving.cameras import camera_words
from alpacache.planning.config import PlanConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.planning.plan import Plan
    from alpacache.planning.prefill_plan import PrefillPlan

_SHOWN_BYTES = 10_000


@from_config(
    PlanConfig,
    panels={
        "Samples": "samples split split_by clips t0",
        "Stage one": "views model cameras blank frames picture codec layers hidden_states reasoning rollouts store",
        "Stage two": "batch_size draws prefix epochs trainable lora_rank memory_budget",
        "An expert of one's own size": "from_scratch expert_layers expert_width expert_intermediate expert_heads "
        "expert_map",
        "Machine": "gpu probe",
    },
)
def plan(config: PlanConfig, json: bool) -> None:
    """Tokens, bytes, hours and GPU memory of both stages. Needs no GPU, no weights and, without --model, no network.

    Of a SOURCE the samples are counted, as `extract` would take them: clips times t0s.

    Example: `alpacache plan --samples 1000 --codec int8 --epochs 10 --batch-size 4 --gpu 4090 --memory-budget 24GB`
    """
    from alpacache.planning.plan import plan as run

    plan = run(config)
    if json:
        output.print_json(plan)
        return
    output.print_lines(plan.model, _sample_lines(plan))
    codecs = [
        [f"{codec} *" if codec == plan.codec else codec]
        + [f"{number:.1f}" for number in (plan.kv_bytes_by_codec[codec] / 1e6, size / 1e6, size * plan.samples / 1e9)]
        for codec, size in plan.bytes_by_codec.items()
    ]
    output.print_table("codecs", codecs, heads=["codec", "KV MB", "sample MB", "store GB"])
    output.print_lines(f"time on {plan.machine.gpu.name} ({plan.machine.gpu_is})", _time_lines(plan))
    memory = plan.memory
    sizes = [[name, f"{size / 2**30:.2f}"] for name, size in (*memory.table(), ("allowed", plan.cap_bytes))]
    output.print_table("GPU memory of train", sizes, heads=[f"{memory.settings}, draws {memory.draws}", "GiB"])
    output.print_table("what the numbers rest on", [["-", text] for text in plan.notes])


def _sample_lines(plan: "Plan") -> output.Lines:
    sizes = dict(plan.bytes_by_field)
    tails = sum(sizes.pop(name) for name in list(sizes) if name.startswith("tail."))
    shown = {name: size for name, size in sizes.items() if size >= _SHOWN_BYTES}
    views = f" ({plan.views} views of {plan.samples // plan.views})" if plan.views > 1 else ""
    counted = None if plan.clips is None else f"{plan.samples // plan.views:,} of {plan.clips:,} clips"
    return {
        "samples": counted,
        "cameras": f"{camera_words({'cameras': plan.cameras, 'blank': plan.blank})}; {plan.frames} frames each",
        "tokens a sample": f"{plan.tokens}, of which {plan.images} images of {plan.tokens_an_image}",
        "bytes a sample": f"{(sum(sizes.values()) + tails) / 1e6:.2f} MB ({plan.codec})",
        **{f"  {name}": f"{size / 1e6:.3f} MB" for name, size in shown.items()},
        f"  {plan.rollouts} rollouts": f"at most {tails / 1e6:.3f} MB" if tails else None,
        "  other fields": f"{(sum(sizes.values()) - sum(shown.values())) / 1e6:.3f} MB",
        "store": f"{plan.store_bytes / 1e9:.1f} GB for {plan.samples} samples{views}",
        "a checkpoint": f"{plan.checkpoint_bytes / 1e9:.1f} GB; a run has three (--keep 2 and the best)",
        "free at --store": None if plan.free_bytes is None else f"{plan.free_bytes / 1e9:.1f} GB",
    }


def _time_lines(plan: "Plan") -> output.Lines:
    two = plan.train
    over_bus_s = two.copy_s + two.bus_s
    bound, in_memory = _longest({"GPU": two.step_s, "bus": over_bus_s, "disk": two.read_s}), "the GPU decides"
    if over_bus_s > two.step_s:
        in_memory = "the bus decides"
    return {
        **_extract_lines(plan),
        "train": f"{_duration(two.hours)} for {two.steps} steps, the {bound} decides",
        "  in RAM": f"{_duration(two.hours_in_memory)} if samples stay in RAM after the first epoch (--in-memory), "
        f"{in_memory} then",
        "  a step": f"{two.compute_s * 1e3:.0f} ms forward and backward, {two.optimizer_s * 1e3:.0f} ms optimizer",
        "  moments": _bus_line(plan) if two.bus_s else None,
        "  a batch": [
            f"{two.read_s * 1e3:.0f} ms from disk ({_disk_is(plan, plan.machine.read_bytes_s)})",
            f"{two.copy_s * 1e3:.0f} ms over the bus ({_bus_is(plan)})",
        ],
        "instead of": _loop_lines(plan),
    }


def _extract_lines(plan: "Plan") -> output.Lines:
    """Time of stage one, the place of the VLM's weights, and the memory taken; or that it does not fit."""
    one, machine = plan.extract, plan.machine
    if one.hours is None or one.memory is None:
        return {"extract": "does not fit, see below", "  weights": f"{one.weights_bytes / 2**30:.1f} GiB"}
    return {
        "extract": f"{_least(plan)}{_duration(one.hours)}",
        "  a sample": [
            f"{one.prefill_s * 1e3:.0f} ms VLM",
            f"{one.reading_s * 1e3:.0f} ms decoding ({machine.disk_is} {machine.cores} cores)",
            f"{one.write_s * 1e3:.0f} ms durable write ({_disk_is(plan, machine.write_bytes_s)})",
            *(["generating rollouts is not counted"] if plan.rollouts else []),
        ],
        "  weights": _weights_lines(plan, one.memory),
    }


def _loop_lines(plan: "Plan") -> list[str]:
    """Time of training with the VLM in every step, and when the cache is paid back."""
    loop, paid = plan.loop, "from disk never: it delivers samples no faster than the VLM makes them"
    every_step = f"the VLM in every step: {_least(plan)}{_duration(loop.hours)}"
    lines = [f"{every_step} and {loop.memory_bytes / 2**30:.0f} GiB of GPU memory"]
    if loop.cached_hours is None or loop.cached_memory_bytes is None:
        return [*lines, "both stages: stage one does not fit"]
    if loop.break_even_epochs is not None:
        paid = f"after {loop.break_even_epochs:.1f} epochs from disk"
    uncounted = ", without generating rollouts" if plan.rollouts else ""
    return [
        *lines,
        f"both stages: {_least(plan)}{_duration(loop.cached_hours)}, {loop.cached_memory_bytes / 2**30:.0f} GiB and "
        f"{plan.store_bytes / 1e9:.0f} GB of disk",
        f"the cache is paid back {paid}, after {loop.break_even_in_memory:.1f} from RAM{uncounted}",
    ]


def _least(plan: "Plan") -> str:
    """Before a time without the generation of rollouts."""
    return "at least " if plan.rollouts else ""


def _disk_is(plan: "Plan", rate: float) -> str:
    return f"{plan.machine.disk_is} {rate / 1e9:.2f} GB/s"


def _longest(seconds: Mapping[str, float]) -> str:
    return max(seconds, key=seconds.__getitem__)


def _bus_is(plan: "Plan") -> str:
    how = "probed" if plan.machine.gpu_is == "probed" else "assumed"
    return f"{how} {plan.machine.bus_bytes_s / 1e9:.0f} GB/s each way"


def _bus_line(plan: "Plan") -> str:
    """Time that the optimizer's state in RAM spends on the bus."""
    two = plan.train
    moved = f"{two.bus_s * 1e3:.0f} ms in and out ({_bus_is(plan)}) beside other work"
    return f"{moved}, {two.step_s * 1e3:.0f} ms a step in all"


def _weights_lines(plan: "Plan", memory: "PrefillPlan") -> list[str]:
    """Place of the VLM's weights, and the memory of stage one."""
    sizes = f"{memory.device_bytes / 2**30:.1f} GiB of GPU memory, {memory.host_bytes / 2**30:.1f} GiB of RAM"
    if memory.home == "gpu":
        return [f"on the GPU, {memory.rows} samples at a time", sizes]
    where, rate = "in RAM", _bus_is(plan)
    if memory.home == "files":
        where, rate = "in the files", _disk_is(plan, plan.machine.read_bytes_s)
    groups = f"groups of {memory.group}, {memory.rows} in a layer at a time"
    return [f"{where}, {plan.extract.bus_s * 1e3:.0f} ms a sample to arrive ({rate})", groups, sizes]


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
