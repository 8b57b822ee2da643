"""`alpacache plan`: what both stages will take, before they are begun."""

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from . import options, output

if TYPE_CHECKING:
    from alpacache.planning.plan import Plan

_SHOWN_BYTES = 10_000


def plan(
    samples: Annotated[int, typer.Option(help="How many samples: clips times t0s.")],
    views: options.Views = 1,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or directory; only configs and headers are read. [default: released sizes]"),
    ] = None,
    cameras: options.Cameras = None,
    frames: options.Frames = 4,
    picture: Annotated[str, typer.Option(help="Height and width of the recordings.")] = "1080x1920",
    codec: Annotated[str, typer.Option(help="How KV is stored: `bf16`, `int8`, `fp8`, `int5`, `int4`.")] = "bf16",
    hidden_states: Annotated[str, typer.Option(help="`last` or `none`.")] = "last",
    reasoning: Annotated[str, typer.Option(help="`none` or `rollout`.")] = "none",
    rollouts: Annotated[int, typer.Option(help="Reasoning texts a sample.")] = 6,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 8,
    draws: Annotated[int, typer.Option(help="Noise draws a sample and step.")] = 1,
    epochs: Annotated[float, typer.Option(help="Passes over the samples.")] = 3.0,
    trainable: Annotated[str, typer.Option(help="`all`, `head` or `lora`.")] = "all",
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    memory_budget: Annotated[
        str | None, typer.Option(help="Size of the card to stay within, such as `24GB`. [default: the GPU's]")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Where the store will be: for free space and --probe.")] = None,
    gpu: Annotated[
        str, typer.Option(help="`h100`, `h200`, `a100`, `l40s`, `a6000`, `5090`, `4090` or `3090`.")
    ] = "h100",
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure this disk, and this GPU if there is one, for up to 30 s.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Tokens, bytes, hours and GPU memory of both stages. Needs no GPU, no weights and, without --model, no network.

    Example: `alpacache plan --samples 1000 --codec int8 --epochs 10 --batch-size 4 --gpu 4090 --memory-budget 24GB`
    """
    from alpacache.planning.config import PlanConfig
    from alpacache.planning.plan import plan as run
    from cache_store import CodecName

    config = PlanConfig(
        samples=samples,
        views=views,
        model=model,
        cameras=options.camera_names(cameras),
        frames=frames,
        picture=options.height_and_width(picture),
        codec=options.one_of("codec", codec, get_args(CodecName)),  # type: ignore[arg-type]
        hidden_states=options.one_of("hidden-states", hidden_states, ("last", "none")),  # type: ignore[arg-type]
        reasoning=options.one_of("reasoning", reasoning, ("none", "rollout")),  # type: ignore[arg-type]
        rollouts=rollouts,
        batch_size=batch_size,
        draws=draws,
        epochs=epochs,
        trainable=options.one_of("trainable", trainable, ("all", "head", "lora")),  # type: ignore[arg-type]
        lora_rank=lora_rank,
        memory_budget=memory_budget,
        store=store,
        gpu=gpu,
        probe=probe,
    )
    found = run(config)
    if json:
        output.print_json(found)
        return
    output.print_table(found.model, _sample_rows(found))
    output.print_table("codecs", _codec_rows(found), heads=["codec", "KV MB", "sample MB", "store GB"])
    output.print_table(f"time on {found.machine.gpu.name} ({found.machine.gpu_is})", _time_rows(found))
    output.print_table("GPU memory of train", _memory_rows(found), heads=[_settings(found), "GiB"])
    output.print_table("what the numbers rest on", [["-", text] for text in found.notes])


def _sample_rows(found: "Plan") -> list[list[str]]:
    sizes = dict(found.bytes_by_field)
    tails = sum(sizes.pop(name) for name in list(sizes) if name.startswith("tail."))
    shown = {name: size for name, size in sizes.items() if size >= _SHOWN_BYTES}
    views = f" ({found.views} views of {found.samples // found.views})" if found.views > 1 else ""
    rows = [
        ["cameras", f"{', '.join(found.cameras)}; {found.frames} frames each"],
        ["tokens a sample", f"{found.tokens}, of which {found.images} images of {found.tokens_an_image}"],
        ["bytes a sample", f"{(sum(sizes.values()) + tails) / 1e6:.2f} MB ({found.codec})"],
        *[[f"  {name}", f"{size / 1e6:.3f} MB"] for name, size in shown.items()],
        *([[f"  {found.rollouts} rollouts", f"at most {tails / 1e6:.3f} MB"]] if tails else []),
        ["  other fields", f"{(sum(sizes.values()) - sum(shown.values())) / 1e6:.3f} MB"],
        ["store", f"{found.store_bytes / 1e9:.1f} GB for {found.samples} samples{views}"],
    ]
    if found.free_bytes is not None:
        rows.append(["free at --store", f"{found.free_bytes / 1e9:.1f} GB"])
    return rows


def _codec_rows(found: "Plan") -> list[list[str]]:
    return [
        [
            f"{codec} *" if codec == found.codec else codec,
            f"{found.kv_bytes_by_codec[codec] / 1e6:.1f}",
            f"{size / 1e6:.1f}",
            f"{size * found.samples / 1e9:.1f}",
        ]
        for codec, size in found.bytes_by_codec.items()
    ]


def _time_rows(found: "Plan") -> list[list[str]]:
    one, two, machine = found.extract, found.train, found.machine
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


def _settings(found: "Plan") -> str:
    plan = found.memory
    how = f"micro-batches of {plan.micro_batch}, {'with' if plan.checkpointing else 'no'} checkpointing"
    return f"{how}, draws {plan.draws}"


def _memory_rows(found: "Plan") -> list[list[str]]:
    rows = [[name, f"{size / 2**30:.2f}"] for name, size in found.memory.table()]
    return [*rows, ["allowed", f"{found.cap_bytes / 2**30:.2f}"]]
