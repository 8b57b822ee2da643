"""`alpacache export`: a run as a complete checkpoint."""

from alpacache.exporting.config import ExportConfig

from . import output
from .options import from_config


@from_config(ExportConfig)
def export(config: ExportConfig, json: bool) -> None:
    """Put a run's tensors back into the base model: a checkpoint in the public layout, adapters merged.

    Example: `alpacache export --model nvidia/Alpamayo-R1-10B --checkpoint runs/one --out export/one`
    """
    with output.show_progress("export") as on_progress:
        from alpacache.exporting.export import export as run

        report = run(config, on_progress=on_progress)
    if report.existed:
        output.note(f"{config.out} holds this export already, whole; nothing was written.")
    weights = "as they were after that step"
    if report.average is not None:
        weights = f"their average, decay {report.average:g} a step"
    elif report.had_average:
        weights += "; the run keeps an average, too (--ema)"
    written = f"{report.written_files} written ({report.written_bytes / 1e9:.2f} GB)"
    lines = {
        "checkpoint": f"{report.checkpoint}, step {report.step} ({report.trainable})",
        "weights": weights,
        "base": report.base + (f" at {report.base_revision}" if report.base_revision else ""),
        "tensors": f"{report.tensors}, of which {report.changed_tensors} trained",
        "files": f"{report.linked_files} linked, {written}",
        "holds": "the expert alone; the VLM is missing" if report.expert_only else "the complete model",
        "next": f"alpacache eval --store STORE --model {config.out} --out EVAL",
    }
    output.print_result(report, config.out, lines, as_json=json)
