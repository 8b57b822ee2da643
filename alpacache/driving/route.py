"""Routes: the navigation text that a sample's prompt may hold, what it commands, and its mirror image.

The texts come from data, so they are untrusted: a text may not hold the model's own tokens, which it would take for the
end of the prompt, nor be longer than an instruction.
"""

import re
from typing import Any, Literal, TypeAlias, get_args

Command: TypeAlias = Literal["left", "right", "straight", "none"]
COMMANDS: tuple[Command, ...] = get_args(Command)
MOST_CHARACTERS = 200
"""Length of the longest text; public ones have about 40."""
_TOKEN = re.compile(r"<\||\|>|<\S+?>")
"""Special tokens, whole or in part, as models of this kind write them: `<|im_end|>`, `<i0>`, `<think>`."""
_FIRST = re.compile(r"\b(?:(left|right)|straight|continue|proceed)\b", re.IGNORECASE)
_AHEAD = re.compile(r"\b(?:ahead|forward)\b", re.IGNORECASE)
_SIDES = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}


def check_route(text: Any) -> str | None:
    """A route as it goes into a prompt; None for no text, or one of spaces alone.

    Raises `ValueError` with what is wrong: no text, too long, control or invisible characters, the model's own tokens.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"it is {type(text).__name__}, not text")
    if not text.strip(" "):
        return None
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MOST_CHARACTERS} are taken")
    if odd := [character for character in text if not character.isprintable()]:
        raise ValueError(f"it holds the control or invisible character U+{ord(odd[0]):04X}")
    if token := _TOKEN.search(text):
        raise ValueError(f"it holds {token[0]!r}, which the model may read as a token of its own")
    return text


def command_of(route: str | None) -> Command:
    """What a route commands: the first of the words left, right, straight, continue and proceed decides.

    `straight` for the last three, and for ahead and forward where none of the five is there; `none` for other texts.
    """
    if route is None:
        return "none"
    if first := _FIRST.search(route):
        side = (first[1] or "straight").lower()
        return "left" if side == "left" else "right" if side == "right" else "straight"
    return "straight" if _AHEAD.search(route) else "none"


def swapped(route: str | None) -> str | None:
    """The route with left for right and right for left throughout; None if it commands neither."""
    if route is None or command_of(route) not in _OTHER:
        return None

    def other(found: re.Match[str]) -> str:
        word = _OTHER[found[0].lower()]
        return word.upper() if found[0].isupper() else word.capitalize() if found[0][0].isupper() else word

    return _SIDES.sub(other, route)
