"""A progress bar for terminals of any width: count and ETA stay whole, and what counts less makes room for them."""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from alpacache.progress import clock

_SHOWN = ("title", "bar", "done", "rate", "elapsed", "eta", "notes")
"""Parts from left to right."""
_KEPT = ("done", "eta", "title", "rate", "elapsed")
"""Parts with a width of their own, the last to go first."""
_BAR_WIDTHS = 10, 40
_GAP = 1


def fitting(texts: Mapping[str, str], notes: Sequence[str], width: int) -> tuple[dict[str, str], int]:
    """Choose what fits side by side into so many cells: parts, as many notes as go beside, and the bar's width or 0.

    `texts` has the parts that `_KEPT` names. None is cut: half a number would be another one.
    """
    parts, left = {}, width
    for name in _KEPT:
        if (needed := cell_len(texts[name]) + _GAP) <= left:
            parts[name], left = texts[name], left - needed
    least, most = _BAR_WIDTHS
    if left < least + _GAP:
        return parts, 0
    shown = next(
        text
        for count in range(len(notes), -1, -1)
        if cell_len(text := " ".join(notes[:count])) + _GAP <= left - least - _GAP or not count
    )
    return {**parts, "notes": shown}, min(most, left - _GAP - (cell_len(shown) + _GAP if shown else 0))


class _Line(ProgressColumn):
    """All of a task's line, a spinner until its total is known. Its fields: `texts` and `notes`, as `fitting` takes
    them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console, self._spinner = console, Spinner("dots")

    def render(self, task: Task) -> RenderableType:
        elapsed = clock(task.elapsed or 0.0)
        line = Table.grid(padding=(0, _GAP))
        if task.total is None:  # weights are read, and the first sample
            line.add_row(self._spinner, Text(f"{task.description} {elapsed}", no_wrap=True))
            return line
        texts = {"title": task.description, "elapsed": elapsed, **task.fields["texts"]}
        parts, bar = fitting(texts, task.fields["notes"], self._console.width)
        cells: list[RenderableType] = []
        for name in _SHOWN:
            if name == "bar" and bar:
                cells.append(ProgressBar(total=task.total, completed=task.completed, width=bar))
            elif parts.get(name):
                cells.append(Text(parts[name], style="cyan" if name == "notes" else "", no_wrap=True))
        line.add_row(*cells)
        return line


def progress_bar(console: Console) -> Progress:
    """A bar on a terminal, to be entered; `_Line` says what fields its tasks need."""
    return Progress(_Line(console), console=console)
