"""The licence of a checkpoint, in the words of its own files: it differs between releases and has changed."""

import json
import re
from contextlib import suppress

from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.errors import CheckpointError

CARD = "README.md"
LICENCE_FILES = tuple(
    "".join(f"[{letter.upper()}{letter.lower()}]" if letter.isalpha() else letter for letter in stem + suffix)
    for stem in ("license", "licence", "copying")
    for suffix in ("", ".txt", ".md")
)
"""Patterns of the names that a licence file goes by, in either case."""
_MOST_CHARACTERS = 2**16
_LONGEST_NAME = 300
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*)")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*")
_ON_LICENCE = re.compile(
    r"[\W\d_]*licen[cs](?:e|es|ing)(?:\W*|\W+(?:terms|information|agreement|notice|and|of|use)\b.*)", re.IGNORECASE
)
"""Headings such as `License`, `7. Licence` and `License/Terms of Use:`; not `License plates`."""


def licence_of(card: str | None, licence: tuple[str, str] | None) -> list[str]:
    """Lines of front matter on the licence, or none.

    They are those of the card; else they quote what it says under a heading, or the title of the licence file.

    Args:
        licence: name and text of the licence file.
    """
    lines, said = licence_lines(card or ""), _said_under_heading(card or "")
    if lines or not (licence or said):
        return lines
    name, text = licence or ("", "")
    title = next((line.strip(" \t#*=-") for line in text.splitlines() if line.strip(" \t#*=-")), name)
    lines = ["license: other", f"license_name: {json.dumps(_shortened(said or title))}"]
    return [*lines, f"license_link: {name}"] if licence else lines


def licence_lines(card: str) -> list[str]:
    """Lines of the `license...` entries of a card's front matter, as they stand there."""
    text = card.removeprefix("\ufeff").replace("\r\n", "\n")
    front = re.match(r"\A---[ \t]*\n(.*?)\n---[ \t]*(\n|\Z)", text, re.DOTALL)
    lines, taken = [], False
    for line in front[1].split("\n") if front else ():
        taken = line.startswith("license") if line[:1] not in ("", " ", "\t", "-") else taken
        if taken and line.strip():
            lines.append(line.rstrip())
    return lines


def _said_under_heading(card: str) -> str:
    """The first paragraph under the card's heading on the licence, in one line; empty without one."""
    paragraph: list[str] = []
    before, fenced, here = "", False, False
    for line in card.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        heading = None if fenced else _HEADING.fullmatch(line)
        if here and (heading or (paragraph and not line.strip())):
            break
        if heading or (not fenced and _UNDERLINE.fullmatch(line)):
            here = here or bool(_ON_LICENCE.fullmatch(heading[1] if heading else before))
        elif here and line.strip():
            paragraph.append(line.strip())
        before = line
    return " ".join(paragraph)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def told_licence(checkpoint: Checkpoint) -> str:
    """The licence in one line, as the checkpoint's own files have it; empty if they have none or are not to be had."""
    card, licence = None, None
    with suppress(CheckpointError, OSError):  # nothing else depends on it
        card = card_of(checkpoint)
    if not licence_lines(card or ""):
        with suppress(CheckpointError, OSError):
            licence = licence_file_of(checkpoint)
    return "; ".join(line.strip() for line in licence_of(card, licence))


def card_of(checkpoint: Checkpoint) -> str | None:
    """The start of the checkpoint's README.md; None without one.

    Raises `CheckpointError` if it is a link out of the checkpoint.
    """
    found = _first_text(checkpoint, CARD)
    return found[1] if found else None


def licence_file_of(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Name and start of the checkpoint's licence file; None without one.

    Raises `CheckpointError` if it is a link out of the checkpoint.
    """
    return _first_text(checkpoint, *LICENCE_FILES)


def _first_text(checkpoint: Checkpoint, *patterns: str) -> tuple[str, str] | None:
    for name, path in sorted(checkpoint.files(*patterns).items(), key=lambda one: ("copying" in one[0].lower(), one)):
        with path.open(errors="replace") as file:
            return name, file.read(_MOST_CHARACTERS)
    return None
