"""`alpacache extract`: stage one."""

from collections.abc import Mapping

import typer

from alpacache.extraction.config import ExtractConfig
from alpacache.progress import ignore_note
from alpacache.torchrun import this_process

from . import output
from .options import from_config


@from_config(
    ExtractConfig,
    panels={
        "Samples": "split split_by clips samples cameras blank frames t0 views seed shard retry_quarantined",
        "Model and prompt": "vlm vlm_dtype camera_names frame_numbers reasoning rollouts route route_file route_tokens",
        "Store": "codec codec_from layers hidden_states force",
        "Machine": "memory_budget weights batch_size workers writers compile device deterministic",
    },
)
def extract(config: ExtractConfig, json: bool) -> None:
    """Stage one: run the frozen VLM once per sample and cache its KV. Run again to go on; it skips committed samples.

    Example: `alpacache extract folder:my_drives --model nvidia/Alpamayo-R1-10B --store cache/train --split train`

    Pilot: add `--samples 10`.
    """
    process = this_process()
    with output.show_progress("extract", quiet=process.rank > 0) as on_progress:
        from alpacache.extraction.extract import extract as run

        tell = output.note if process.rank == 0 else ignore_note
        report = run(config, on_progress=on_progress, on_note=tell)
    lines = {
        "store": report.store,
        "extracted": f"{report.extracted} of {report.selected} samples, {report.already_there} were there already",
        "speed": f"{report.samples_per_s:.2f} samples/s, {report.bytes_written / 1e9:.3f} GB in {report.seconds:.1f} s",
        "the VLM waited": f"{report.read_wait:.0%} of the time for samples, {report.write_wait:.0%} for the disk",
        "all workers": f"{report.committed} of {report.wanted} samples are in the store",
        "quarantined": output.reason_lines(
            (name, report.kinds[name], reason) for name, reason in report.quarantined.items()
        ),
    }
    if report.routes:
        lines["routes"] = _routes_line(report.routes)
    if process.rank == 0:  # for all of torchrun's
        output.print_result(report, "extract", lines, as_json=json)
    if report.quarantined and not report.committed:
        output.say(
            f"WARNING: {report.store} holds no sample of this selection: all {len(report.quarantined)} are refused. "
            "Mend what the reasons name, then run the same command with --retry-quarantined."
        )
    if report.quarantined and process.world_size == 1:
        raise typer.Exit(output.QUARANTINED)
    if report.quarantined:  # torchrun ends all processes when one does not exit with 0
        refused = f"process {process.rank} refused {len(report.quarantined)} samples"
        output.note(f"{refused}; `alpacache info {config.store}` lists them.")


def _routes_line(routes: Mapping[str, int]) -> str:
    """Count the samples read that have a route, by command."""
    total, without = sum(routes.values()), routes.get("", 0)
    kinds = ", ".join(
        f"{'no command' if command == 'none' else command} {count}" for command, count in routes.items() if command
    )
    return f"{total - without} of {total} samples have one" + (f": {kinds}" if kinds else "")
