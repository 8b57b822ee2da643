"""`alpacache export`: a run as a complete checkpoint."""

from typing import Annotated

import typer

from . import options, output


def export(
    model: options.Model,
    checkpoint: Annotated[
        str, typer.Option(help="Run directory (its best checkpoint, else its last) or a checkpoint.")
    ],
    out: Annotated[str, typer.Option(help="Directory to write; must not exist or be empty.")],
    ema: options.Ema = False,
    expert_only: Annotated[
        bool, typer.Option("--expert-only", help="Leave out the VLM: enough for `train` and `eval`.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Put a run's tensors back into the base model: a checkpoint in the public layout, adapters merged.

    Example: `alpacache export --model nvidia/Alpamayo-R1-10B --checkpoint runs/one --out export/one`
    """
    from alpacache.exporting.export import ExportConfig

    config = ExportConfig(model=model, checkpoint=checkpoint, out=out, ema=ema, expert_only=expert_only)
    with output.show_progress("export") as on_progress:
        from alpacache.exporting.export import export as run

        report = run(config, on_progress=on_progress)
    if json:
        output.print_json(report)
        return
    revision = f" at {report.base_revision}" if report.base_revision else ""
    rows = [
        ["checkpoint", f"{report.checkpoint}, step {report.step} ({report.trainable})"],
        ["base", report.base + revision],
        ["tensors", f"{report.tensors}, of which {report.changed_tensors} trained"],
        [
            "files",
            f"{report.linked_files} linked, {report.written_files} written ({report.written_bytes / 1e9:.2f} GB)",
        ],
        ["holds", "the expert alone; the VLM is missing" if report.expert_only else "the complete model"],
        ["next", f"alpacache eval --store STORE --model {out} --out EVAL"],
    ]
    output.print_table(out, rows)
