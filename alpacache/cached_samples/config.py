"""Settings that choose among cached samples, which `train` and `eval` have in common."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from alpacache.config import Config, Written, expand_home, expect
from alpacache.sources.config import SplitBy

if TYPE_CHECKING:
    from alpacache.driving.splits import Split


def _entries(written: Any) -> tuple[str, ...]:
    from alpacache.cached_samples.sample_choice import check_entries, is_condition  # `--help` does without numpy

    entries = (written,) if isinstance(written, str) else tuple(written)
    check_entries(entries)
    return tuple(entry if is_condition(entry) else expand_home(entry) for entry in entries)


def check_weights_file(file: str | None) -> None:
    """Raise `UsageError` for weights of samples in a file that is no table by its name."""
    table = file is None or file.lower().endswith((".csv", ".parquet"))
    expect(table, "sample_weights", file, "a table, FILE.csv or FILE.parquet")


Chosen = Annotated[tuple[str, ...], Written(metavar="SAMPLES", read=_entries, repeatable=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceConfig(Config):
    """Choice among the samples of stores."""

    only: Chosen = field(default_factory=tuple)
    """Take only these samples: ids of samples or clips (with `*` and `?`), a file of ids (`.txt`, `.csv`, `.parquet`),
    or a condition such as `speed>5 and turn=sharp`; repeatable, what fits one of them is taken. Default: all."""
    exclude: Chosen = field(default_factory=tuple)
    """Leave these samples out, in the same words; repeatable."""
    split_by: SplitBy | None = None
    """`clip`, or `time:BLOCK_S[:GAP_S[:SEED]]` as in `extract`: `train` takes the training side of its stores and the
    held-out side of `val`, `eval` judges the held-out side. Default: all samples."""

    @property
    def split(self) -> "Split":
        """How samples are divided; None also where they are not, or by clip."""
        from alpacache.driving.splits import parse_split  # as above

        return None if self.split_by is None else parse_split(self.split_by)
