"""`alpacache export`: a run as a complete checkpoint, and what a loader would refuse of one."""

from typing import TYPE_CHECKING

import typer

from alpacache import strict_json
from alpacache.exporting.config import ExportConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.exporting.check import CheckReport
    from alpacache.exporting.export import ExportReport


@from_config(ExportConfig)
def export(config: ExportConfig, json: bool) -> None:
    """Put a run's tensors back into the base model: a checkpoint in the public layout, adapters merged.

    Example: `alpacache export --model nvidia/Alpamayo-R1-10B --checkpoint runs/one --out export/one --check`

    With --check exit code 1 where a loader would refuse something. `alpacache export --out DIR --check` only looks.
    """
    report = checked = None
    if config.checkpoint is not None:
        with output.show_progress("export") as on_progress:
            from alpacache.exporting.export import export as run

            report = run(config, on_progress=on_progress)
        if report.existed:
            output.note(f"{config.out} holds this export already, whole; nothing was written.")
        if not json:
            _print_export(config, report)
    if config.check:
        with output.show_progress("check") as on_progress:
            from alpacache.exporting.check import check_export

            checked = check_export(config.out, base=config.model, run=config.checkpoint, on_progress=on_progress)
        if not json:
            _print_check(config, checked)
    if json and report is not None:
        found = {} if checked is None else {"check": checked}
        output.print_json(strict_json.plain(report) | found)
    elif json:
        output.print_json(checked)
    if checked is not None and not checked.ok:
        raise typer.Exit(output.FAILED)


def _print_export(config: ExportConfig, report: "ExportReport") -> None:
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
    output.print_lines(config.out, lines)


def _print_check(config: ExportConfig, report: "CheckReport") -> None:
    base = "not compared; name it with --model"
    if config.model is not None:
        base = f"{config.model}; {report.compared} tensors that were not trained compared with it"
    loaders = "train and eval; it holds the expert alone, the public classes need the VLM, too"
    lines = {
        "family": report.family,
        "for": loaders if report.expert_only else "train, eval, extract and the public classes",
        "tensors": f"{report.tensors} read",
        "base": base,
        "faults": str(len(report.faults)),
    }
    output.print_lines(f"check {config.out}", lines)
    rows = [[fault.file, fault.key, f"{fault.what} {fault.remedy}"] for fault in report.faults]
    output.print_table("what a loader would refuse", rows, heads=["file", "key", "fault"])
