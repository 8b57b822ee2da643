"""`alpacache extract`: stage one."""

from typing import Annotated, get_args

import typer

from . import options, output

QUARANTINED = 3


def extract(
    source: options.Source,
    model: options.Model,
    store: Annotated[str, typer.Option(help="Directory or s3://BUCKET/PREFIX of the store; created if absent.")],
    split: options.Split = "all",
    samples: options.Samples = None,
    cameras: options.Cameras = None,
    frames: options.Frames = 4,
    t0: options.T0 = "5.1",
    views: options.Views = 1,
    seed: Annotated[int, typer.Option(help="Of the changes that views make.")] = 0,
    vlm: Annotated[
        str | None, typer.Option(help="Directory or hub id whose VLM weights replace the model's own.")
    ] = None,
    camera_names: Annotated[
        bool | None,
        typer.Option(help="Name cameras in the prompt. Default: as the model was trained (1.5 yes, R1 no)."),
    ] = None,
    frame_numbers: Annotated[
        bool | None, typer.Option(help="Number frames in the prompt. Default: as the model was trained.")
    ] = None,
    codec: Annotated[
        str, typer.Option(help="How KV is stored: `bf16` (lossless), `int8` (half the size), `fp8`, `int5`, `int4`.")
    ] = "bf16",
    hidden_states: Annotated[str, typer.Option(help="`last` keeps the last hidden states, `none` does not.")] = "last",
    reasoning: Annotated[
        str, typer.Option(help="`rollout` adds sampled reasoning texts with their KV, for `eval`; `none` does not.")
    ] = "none",
    rollouts: Annotated[int, typer.Option(help="Reasoning texts a sample.")] = 6,
    shard: Annotated[str, typer.Option(help="I/N, counted from 0: this worker's share of the samples.")] = "0/1",
    deterministic: Annotated[
        bool, typer.Option(help="Same bytes on every run on one GPU model, a little slower.")
    ] = False,
    retry_quarantined: Annotated[bool, typer.Option(help="Try samples again that failed before.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin even if the disk has no room for all of it.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Samples through the VLM at a time. Default: on a GPU what has 32 images, on a CPU 1."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Samples read and preprocessed at a time ahead of the model, by a process each beside a GPU."
        ),
    ] = None,
    writers: Annotated[int, typer.Option(help="Threads that write behind it; each holds a sample in RAM.")] = 6,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Stage one: run the frozen VLM once a sample and cache its KV. Run again to go on; committed samples are skipped.

    Example: `alpacache extract folder:my_drives --model nvidia/Alpamayo-R1-10B --store cache/train --split train`

    Pilot: add `--samples 10`.
    """
    from alpacache.extraction.config import ExtractConfig
    from alpacache.torchrun import this_process
    from cache_store import CodecName

    config = ExtractConfig(
        source=source,
        model=model,
        store=store,
        split=options.one_of("split", split, ("train", "val", "all")),  # type: ignore[arg-type]
        samples=samples,
        cameras=options.camera_names(cameras),
        frames=frames,
        t0=t0,
        views=views,
        seed=seed,
        vlm=vlm,
        camera_names=camera_names,
        frame_numbers=frame_numbers,
        codec=options.one_of("codec", codec, get_args(CodecName)),  # type: ignore[arg-type]
        hidden_states=options.one_of("hidden-states", hidden_states, ("last", "none")),  # type: ignore[arg-type]
        reasoning=options.one_of("reasoning", reasoning, ("none", "rollout")),  # type: ignore[arg-type]
        rollouts=rollouts,
        shard=options.shard(shard),
        deterministic=deterministic,
        retry_quarantined=retry_quarantined,
        force=force,
        batch_size=batch_size,
        workers=workers,
        writers=writers,
        device=device,
    )
    process = this_process()
    with output.show_progress("extract", quiet=process.rank > 0) as on_progress:
        from alpacache.extraction.extract import extract as run

        report = run(config, on_progress=on_progress)
    if process.rank > 0:
        pass  # the first process reports, for all of torchrun's
    elif json:
        output.print_json(report)
    else:
        rows = [
            ["store", report.store],
            [
                "extracted",
                f"{report.extracted} of {report.selected} samples, {report.already_there} were there already",
            ],
            [
                "speed",
                f"{report.samples_per_s:.2f} samples/s, {report.bytes_written / 1e9:.3f} GB in {report.seconds:.1f} s",
            ],
            ["the VLM waited", f"{report.read_wait:.0%} of the time for samples, {report.write_wait:.0%} for the disk"],
            ["all workers", f"{report.committed} of {report.wanted} samples are in the store"],
            ["quarantined", str(len(report.quarantined))],
        ]
        rows += [["", f"{sample_id}: {reason}"] for sample_id, reason in report.quarantined.items()]
        output.print_table("extract", rows)
    if report.quarantined and process.world_size == 1:
        raise typer.Exit(QUARANTINED)
    if report.quarantined:  # torchrun ends all processes when one does not exit with 0
        output.note(
            f"process {process.rank} refused {len(report.quarantined)} samples; "
            f"`alpacache info {config.store}` lists them."
        )
