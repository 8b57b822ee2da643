"""Output of commands: progress and notes on stderr, one JSON object or tables on stdout."""

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO, cast

from alpacache import strict_json
from alpacache.errors import DataError
from alpacache.masking import masked, masked_values
from alpacache.progress import OnProgress, Progress, clock, ignore

_FORMAT = "%(levelname)s: %(message)s"
Verbosity = Literal["quiet", "normal", "verbose"]
FAILED, BAD_INPUT, QUARANTINED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes, beside 0: done."""
Lines = Mapping[str, str | Sequence[str] | None]
"""Label -> its text, several below each other, or None: not shown."""
_PLAIN_INTERVAL_S = 10.0
_FILE_WIDTH = 120
_SHORT = 24
"""Characters of a cell that is not folded."""
_AT_RIGHT = 40
"""Most characters of a cell that stands at the right, as numbers and intervals do."""
_GAP = 2
SHOWN = 12
"""Most rows of a table that may be long; JSON has all."""
_verbosity: Verbosity = "normal"


class UnfailingStream:
    """stderr whose reader may go, whose disk may be full: what cannot be written is lost, and nothing ends for it.

    Secrets in what libraries and Python itself write there are masked too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(masked(text))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Page(io.StringIO):
    """A text for stdout, with colours if that is a terminal."""

    def isatty(self) -> bool:
        return sys.stdout.isatty()


def guard_streams() -> None:
    """Make the standard streams safe to write to, whether or not somebody has closed them.

    A descriptor that is closed would be given to the next file that is opened, and what is meant for people, by
    libraries in C too, would be written into that.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
    if not isinstance(sys.stderr, UnfailingStream):
        sys.stderr = cast(TextIO, UnfailingStream(sys.stderr))


def shown(text: str) -> str:
    """A text as a terminal may have it, wherever it comes from: secrets masked, what is not printable escaped.

    Names in a store or a recording from elsewhere may hold sequences that move the cursor, set the title or turn the
    direction of writing. Newlines and tabs stay.
    """
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
        )
    return masked(text)


class _ShownFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def set_verbosity(verbosity: Verbosity) -> None:
    """Set how much stderr says, for the whole process. Results on stdout are the same.

    Libraries that come with bars of their own look at the environment when they are imported, which is later.
    """
    global _verbosity
    _verbosity = verbosity
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # ours tells the same
    if verbosity == "quiet":
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ShownFormatter(_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if verbosity == "verbose":
        for package in ("alpacache", "cache_store"):
            logging.getLogger(package).setLevel(logging.DEBUG)


def is_verbose() -> bool:
    """Tell whether errors are shown with their traceback."""
    return _verbosity == "verbose"


def print_json(value: Any) -> None:
    """Print one JSON object on stdout. Raises `DataError` where it cannot be written there: a program waits for it."""
    _write_result(strict_json.dumps(masked_values(strict_json.plain(value)), indent=1) + "\n", for_program=True)


def _write_result(text: str, *, for_program: bool) -> None:
    """Write a text to stdout. What is for people may be lost there: the work is done, and they are told on stderr."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # else Python tries again when it ends, and makes an exit code of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = f"the result could not be written to stdout ({error.strerror}); all else is done"
        if for_program:
            raise DataError(f"{message}.") from error
        if error.errno != errno.EPIPE:  # else its reader has seen enough
            say(f"WARNING: {message}.")


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


def more_lines(rows: Sequence[object]) -> list[str]:
    """Line below the first `SHOWN` rows of a table: how many more there are."""
    return [f"and {len(rows) - SHOWN} more; --json has all"] if len(rows) > SHOWN else []


def reason_lines(refused: Iterable[tuple[str, str, str]]) -> list[str]:
    """Count the refused, with the number and the first of each kind of reason; from (id, kind, message)."""
    of_kind: dict[str, list[str]] = {}
    for name, kind, message in refused:
        of_kind.setdefault(kind, []).append(f"{name}: {message}")
    listed = sorted(of_kind.items(), key=lambda item: -len(item[1]))
    return [
        str(sum(map(len, of_kind.values()))),
        *(f"{len(reasons)} {kind}, the first: {reasons[0]}" for kind, reasons in listed),
    ]


def print_table(title: str, rows: Sequence[Sequence[str]], *, heads: Sequence[str] = ()) -> None:
    """Print a table on stdout, if it has rows; without heads the first column is a label. Data is never markup.

    Short cells of a table with heads, as numbers are, stay whole however narrow the terminal is; sentences begin at the
    left.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    cells = [[shown(cell).replace("\n", "\\n") for cell in row] for row in rows]
    names = heads or [""] * max(map(len, rows))
    columns = [[row[place] for row in cells if place < len(row)] for place in range(len(names))]
    console = Console()
    width = console.width if console.is_terminal else max(console.width, _FILE_WIDTH)
    fixed: list[int | None] = [None] * len(names)
    if (
        heads
        and sum(max(map(len, (head, *column))) + _GAP for head, column in zip(names, columns, strict=True))
        > width + _GAP
    ):
        least = [max(map(len, (*head.split(), *column))) for head, column in zip(names, columns, strict=True)]
        fixed = [length if length <= _SHORT else None for length in least]
        width = max(width, sum((length or _SHORT) + _GAP for length in fixed))
    table = Table(title=Text(shown(title)), title_justify="left", show_header=bool(heads), box=None, pad_edge=False)
    for place, head in enumerate(names):
        right, dim = place > 0 and heads and max(map(len, columns[place])) <= _AT_RIGHT, place == 0 and not heads
        justify: Literal["right", "left"] = "right" if right else "left"
        table.add_column(head, justify=justify, style="dim" if dim else None, overflow="fold", width=fixed[place])
    for row in cells:
        table.add_row(*map(Text, row))
    page = _Page()
    Console(width=width, file=page).print(table)
    lines = (line.rstrip(" ") for line in page.getvalue().splitlines(keepends=False))
    _write_result("".join(f"{line}\n" for line in lines), for_program=False)


def print_left_out(samples: Iterable[tuple[str, str]]) -> None:
    """Print which samples (id, reason) a command has left out, if it has."""
    print_table("left out, as they cannot be read", [*map(list, samples)], heads=["sample", "reason"])


@contextmanager
def show_progress(title: str, *, quiet: bool = False) -> Iterator[OnProgress]:
    """Show a bar with rate and ETA on stderr, and a spinner before the first progress; without a terminal, a plain line
    every ten seconds and at the end.

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
                parts = [*_texts(progress), " ".join(_notes(progress))]
                say(f"{title}: {', '.join(filter(None, parts))}")

        yield write_line
        return
    from rich.console import Console

    from .progress_bar import progress_bar

    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task(shown(title), total=None, texts={}, notes=[])

        def update(progress: Progress) -> None:
            done, rate, eta = _texts(progress)
            texts = {"done": done, "rate": rate, "eta": eta}
            total, notes = progress.total, _notes(progress)
            bar.update(task, total=total, completed=progress.done, texts=texts, notes=notes)

        yield update


def _texts(progress: Progress) -> tuple[str, str, str]:
    """Format progress: what is done, how fast, when the rest will be."""
    left = clock((progress.total - progress.done) / progress.rate) if progress.rate > 0 else "-"
    unit = progress.unit
    return f"{progress.done}/{progress.total} {unit}", f"{progress.rate:.3g} {unit}/s", f"ETA {left}"


def _notes(progress: Progress) -> list[str]:
    return [shown(f"{key} {text}") for key, text in progress.notes.items()]


def note(text: str) -> None:
    """Print one line for a person on stderr, unless --quiet."""
    if _verbosity != "quiet":
        sys.stderr.write(f"note: {shown(text)}\n")


def say(text: str) -> None:
    """Print a text for a person on stderr."""
    sys.stderr.write(shown(text) + "\n")
