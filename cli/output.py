"""Output of commands: progress and notes on stderr, one JSON object or tables on stdout."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from alpacache import strict_json
from alpacache.progress import OnProgress, Progress, clock, ignore

Verbosity = Literal["quiet", "normal", "verbose"]
FAILED, BAD_INPUT, QUARANTINED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes, beside 0: done."""
Lines = Mapping[str, str | Sequence[str] | None]
"""Label -> its text, several below each other, or None: not shown."""
_PLAIN_INTERVAL_S = 10.0
_FILE_WIDTH = 120
_verbosity: Verbosity = "normal"


def set_verbosity(verbosity: Verbosity) -> None:
    """Set how much stderr says, for the whole process. Results on stdout are the same.

    Libraries that come with bars of their own look at the environment when they are imported, which is later.
    """
    global _verbosity
    _verbosity = verbosity
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # ours tells the same
    if verbosity == "quiet":
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    if verbosity == "verbose":
        for package in ("alpacache", "cache_store"):
            logging.getLogger(package).setLevel(logging.DEBUG)


def is_verbose() -> bool:
    """Tell whether errors are shown with their traceback."""
    return _verbosity == "verbose"


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(strict_json.dumps(value, indent=1) + "\n")


def print_result(value: Any, title: str, lines: Lines, *, as_json: bool) -> None:
    """Print what a command returns: as one JSON object, or as a table of lines."""
    if as_json:
        print_json(value)
    else:
        print_lines(title, lines)


def print_lines(title: str, lines: Lines) -> None:
    """Print labels and what they say on stdout."""
    texts = {label: [text] if isinstance(text, str) else text or () for label, text in lines.items()}
    print_table(title, [["" if number else label, text] for label in texts for number, text in enumerate(texts[label])])


def reason_lines(refused: Iterable[tuple[str, str, str]]) -> list[str]:
    """How many were refused, and for each kind of reason their number and the first one; from (id, kind, message)."""
    of_kind: dict[str, list[str]] = {}
    for name, kind, message in refused:
        of_kind.setdefault(kind, []).append(f"{name}: {message}")
    listed = sorted(of_kind.items(), key=lambda item: -len(item[1]))
    return [
        str(sum(map(len, of_kind.values()))),
        *(f"{len(reasons)} {kind}, the first: {reasons[0]}" for kind, reasons in listed),
    ]


def print_table(title: str, rows: Sequence[Sequence[str]], *, heads: Sequence[str] = ()) -> None:
    """Print a table on stdout, if it has rows; without heads the first column is a label. Data is never markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=Text(title), title_justify="left", show_header=bool(heads), box=None, pad_edge=False)
    for column, head in enumerate(heads or [""] * max(map(len, rows))):
        right, dim = column > 0 and heads, column == 0 and not heads
        table.add_column(head, justify="right" if right else "left", style="dim" if dim else None, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    Console(width=console.width if console.is_terminal else max(console.width, _FILE_WIDTH)).print(table)


@contextmanager
def show_progress(title: str, *, quiet: bool = False) -> Iterator[OnProgress]:
    """Show a bar with rate and ETA on stderr; without a terminal, a plain line every ten seconds and at the end.

    Shows nothing with `quiet`, as where another process shows the progress of all.
    """
    if quiet or _verbosity == "quiet":
        yield ignore
        return
    if not sys.stderr.isatty():
        last = time.monotonic()

        def write_line(progress: Progress) -> None:
            nonlocal last
            if progress.done == progress.total or time.monotonic() - last >= _PLAIN_INTERVAL_S:
                last = time.monotonic()
                sys.stderr.write(f"{title}: {', '.join(filter(None, _texts(progress)))}\n")

        yield write_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    done, rate, eta, notes = (TextColumn(f"{{task.fields[texts][{number}]}}") for number in range(4))
    notes.style = "cyan"
    columns = (TextColumn("{task.description}"), BarColumn(), done, rate, TimeElapsedColumn(), eta, notes)
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, visible=False, texts=[""] * 4)
        yield lambda progress: bar.update(
            task, visible=True, total=progress.total, completed=progress.done, texts=_texts(progress)
        )


def _texts(progress: Progress) -> tuple[str, str, str, str]:
    """Format progress: what is done, how fast, when the rest will be, and notes."""
    left = clock((progress.total - progress.done) / progress.rate) if progress.rate > 0 else "-"
    unit, notes = progress.unit, " ".join(f"{key} {text}" for key, text in progress.notes.items())
    return f"{progress.done}/{progress.total} {unit}", f"{progress.rate:.3g} {unit}/s", f"ETA {left}", notes


def note(text: str) -> None:
    """Print one line for a person on stderr, unless --quiet."""
    if _verbosity != "quiet":
        sys.stderr.write(f"note: {text}\n")
