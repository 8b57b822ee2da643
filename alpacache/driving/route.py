"""Routes: the navigation text that a sample's prompt may hold, what it commands, and its mirror image.

The texts come from data, so they are untrusted: a text may not hold the model's own tokens, which it would take for the
end of the prompt, nor be longer than an instruction.
"""

import math
import re
from typing import Any, Literal, TypeAlias, get_args

Command: TypeAlias = Literal["left", "right", "straight", "none"]
COMMANDS: tuple[Command, ...] = get_args(Command)
MOST_CHARACTERS = 200
"""Length of the longest text; public ones have about 40."""
_TOKEN = re.compile(r"<\||\|>|<\S+?>")
"""Special tokens, whole or in part, as models of this kind write them: `<|im_end|>`, `<i0>`, `<think>`."""
_BEGIN, _END = r"(?<![^\W\d_])", r"(?![^\W\d_])"
"""Word boundaries at which `_`, `-` and digits separate words as spaces do."""
_WAY = r"right(?![ _-]+of[ _-]+way)"
"""The side, and not what is given at a crossing."""
_DIRECTION = re.compile(rf"{_BEGIN}((?:turn|keep|bear|go)?)(left|{_WAY}|straight)((?:turn)?){_END}", re.IGNORECASE)
"""Also as labels write it: `turn_left`, `LEFT-TURN`, `turnleft`."""
_ONWARD = re.compile(rf"{_BEGIN}(?:continue|proceed|ahead|forward){_END}", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}


def check_route(text: Any) -> str | None:
    """A route as it goes into a prompt; None for no text (tables also have NaN for that), or one of spaces alone.

    Raises `ValueError` with what is wrong: no text, too long, control or invisible characters, the model's own tokens.
    """
    if text is None or (isinstance(text, float) and math.isnan(text)):
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
    """What a route in English commands: the first of the words left, right and straight decides.

    So a side wins over a neutral verb before it ("continue left onto Main Street"), unless straight is said first.
    Without any of the three, continue, proceed, ahead and forward are `straight`; other texts are `none`.
    """
    if route is None:
        return "none"
    if first := _DIRECTION.search(route):
        word = first[2].lower()
        return "left" if word == "left" else "right" if word == "right" else "straight"
    return "straight" if _ONWARD.search(route) else "none"


def swapped(route: str | None) -> str | None:
    """The route with left for right and right for left throughout; None if it commands neither."""
    if route is None or command_of(route) not in _OTHER:
        return None

    def other(found: re.Match[str]) -> str:
        before, side, behind = found.groups()
        word = _OTHER.get(side.lower(), side)
        return before + (word.upper() if side.isupper() else word.capitalize() if side[0].isupper() else word) + behind

    return _DIRECTION.sub(other, route)
