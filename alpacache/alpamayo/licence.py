"""The licence of a checkpoint, in the words of its own files: it differs between releases and has changed."""

import json
import re

from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.errors import CheckpointError

CARD, LICENCE = "README.md", "LICENSE"
_MOST_CHARACTERS = 2**16


def licence_of(card: str | None, licence: str | None) -> list[str]:
    """Lines of front matter on the licence: those of the card, else the title of the licence file; or none."""
    lines = licence_lines(card or "")
    if licence is None or lines:
        return lines
    title = next((line.strip() for line in licence.splitlines() if line.strip()), LICENCE)
    return ["license: other", f"license_name: {json.dumps(title)}", f"license_link: {LICENCE}"]


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


def told_licence(checkpoint: Checkpoint) -> str:
    """The licence in one line, as the checkpoint's own files have it; empty if they have none or are not to be had."""
    return "; ".join(line.strip() for line in licence_of(_text(checkpoint, CARD), _text(checkpoint, LICENCE)))


def _text(checkpoint: Checkpoint, name: str) -> str | None:
    try:
        with checkpoint.file(name).open(errors="replace") as file:
            return file.read(_MOST_CHARACTERS)
    except (CheckpointError, OSError):  # nothing else depends on it
        return None
