"""`alpacache codecs`: bytes of each codec, and what it does to the expert."""

from typing import TYPE_CHECKING

from alpacache.extraction.config import CodecsConfig

from . import output
from .options import from_config

if TYPE_CHECKING:
    from alpacache.extraction.codec_errors import CodecErrors


@from_config(CodecsConfig)
def codecs(config: CodecsConfig, json: bool) -> None:
    """Try all codecs on a few of your own samples: bytes, and what each does to the expert. Nothing is written.

    INPUT is what `extract` reads, or a store of --codec bf16. Errors are against bfloat16 on the same noise and times,
    beside those of rounding to bfloat16 once more. `extract --codec auto:2%` chooses by the same measure.

    Example: `alpacache codecs folder:my_drives --model nvidia/Alpamayo-R1-10B`

    Of a store: `alpacache codecs cache/pilot --model nvidia/Alpamayo-R1-10B --codecs int8,transform:2.2`
    """
    with output.show_progress("codecs") as on_progress:
        from alpacache.extraction.compare_codecs import compare_codecs

        report = compare_codecs(config, on_progress=on_progress)
    if json:
        output.print_json(report)
        return
    title = (
        f"{report.model} on {report.judged_on} samples of {report.input}, {report.draws} draws each; "
        f"learnt from {'the same' if report.learnt_from == report.judged_on else report.learnt_from}"
    )
    heads = ["codec", "KV MB", "bits", "velocity", "worst sample", "loss", "gradient", "cosine", "tables MB"]
    rows = [["bfloat16 again", *_cells(report.rounding), ""]]
    for one in report.codecs:
        if one.errors is not None:
            rows.append([one.codec, *_cells(one.errors), f"{one.tables_bytes / 1e6:.1f}" if one.tables_bytes else ""])
    output.print_table(title, rows, heads=heads)
    output.print_table("cannot be", [[one.codec, one.refused] for one in report.codecs if one.refused is not None])


def _cells(errors: "CodecErrors") -> list[str]:
    gradient = "-" if errors.gradient is None else f"{errors.gradient:.2%}"
    cosine = "-" if errors.gradient_cosine is None else f"{errors.gradient_cosine:.5f}"
    return [
        f"{errors.bytes_a_sample / 1e6:.3g}",
        f"{errors.bits:.2f}",
        f"{errors.velocity:.2%}",
        f"{errors.worst_velocity:.2%}",
        f"{errors.loss_change:+.2%}",
        gradient,
        cosine,
    ]
