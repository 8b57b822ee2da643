"""What the tests of the documentation read out of Markdown: fenced blocks, links, headings."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.code.strip().splitlines()[0]}"


def pages() -> list[Path]:
    """All Markdown that is documentation."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, *languages: str) -> list[Block]:
    """Blocks in these languages, or all."""
    found = [
        Block(page, match["language"], textwrap.dedent(match["code"])) for match in _FENCE.finditer(page.read_text())
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Targets that are no addresses."""
    return [target for target in _LINK.findall(prose(page)) if "://" not in target]


def headings(page: Path) -> list[tuple[int, str]]:
    """Level and text."""
    return [(len(marks), text) for marks, text in re.findall(r"^(#+) (.+)$", prose(page), re.M)]


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    names = (re.sub(r"[^\w\- ]", "", text.lower()).strip() for _, text in headings(page))
    return {name.replace(" ", "-") for name in names}
