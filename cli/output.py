"""What commands show: progress and notes on stderr, one JSON object or tables on stdout."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from alpacache import strict_json
from alpacache.progress import OnProgress, Progress, clock, ignore

Verbosity = Literal["quiet", "normal", "verbose"]
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
    """Whether errors are shown with their traceback."""
    return _verbosity == "verbose"


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(strict_json.dumps(value, indent=1) + "\n")


def print_table(title: str, rows: Sequence[Sequence[str]], *, heads: Sequence[str] = ()) -> None:
    """Print a table on stdout; without heads the first column is a label. Data is never read as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=bool(heads), box=None, pad_edge=False)
    for column in range(max((len(row) for row in rows), default=len(heads))):
        label = column == 0
        table.add_column(
            heads[column] if heads else "",
            justify="left" if label or not heads else "right",
            style="dim" if label and not heads else None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
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
        yield _PlainLines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
        TextColumn("{task.fields[notes]}", style="cyan"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(title, total=None, visible=False, unit="", rate="", eta="-", notes="")

        def update(progress: Progress) -> None:
            bar.update(
                task,
                visible=True,
                total=progress.total,
                completed=progress.done,
                unit=progress.unit,
                rate=_rate(progress),
                eta=_eta(progress),
                notes=_notes(progress),
            )

        yield update


class _PlainLines:
    """Progress as plain lines, for logs."""

    def __init__(self, title: str) -> None:
        self._title, self._last = title, time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= _PLAIN_INTERVAL_S or progress.done == progress.total:
            self._last = now
            place = f"{progress.done}/{progress.total} {progress.unit}"
            parts = [place, _rate(progress), f"ETA {_eta(progress)}", _notes(progress)]
            sys.stderr.write(f"{self._title}: {', '.join(filter(None, parts))}\n")
            sys.stderr.flush()


def _rate(progress: Progress) -> str:
    return f"{progress.rate:.3g} {progress.unit}/s"


def _eta(progress: Progress) -> str:
    if progress.rate <= 0:
        return "-"
    return clock((progress.total - progress.done) / progress.rate)


def _notes(progress: Progress) -> str:
    return " ".join(f"{key} {value}" for key, value in progress.notes.items())


def note(text: str) -> None:
    """Print one line for a person on stderr, unless --quiet."""
    if _verbosity != "quiet":
        sys.stderr.write(f"note: {text}\n")
