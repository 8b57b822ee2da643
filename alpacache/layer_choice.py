"""A choice among the layers of the VLM, as people write it: `every:3`, `first:6`, or numbers counted from 0."""

from collections.abc import Sequence
from typing import Any

from alpacache.config import whole_number
from alpacache.errors import UsageError

EXPECTED = "every:3, first:6, or layer numbers from 0, rising, as in 0,6,12"
_MOST = 1024
"""More layers than any model has."""


def check_choice(written: Any) -> Any:
    """Return a text that is a choice among however many layers. Raises `ValueError` with what was expected."""
    try:
        chosen_layers(written, None)
    except (AttributeError, ValueError):
        raise ValueError(EXPECTED) from None
    return written


def chosen_layers(written: str, count: int | None) -> tuple[int, ...]:
    """The chosen ones of `count` layers, rising; None for any number of them.

    `every:3` is 0, 3, 6, ..., `first:6` is 0 to 5. Raises `ValueError` for what is no choice, `UsageError` for layers
    that there are not.
    """
    word, colon, text = written.partition(":")
    there = range(_MOST if count is None else count)
    if colon:
        number = whole_number(text)
        if word not in ("every", "first") or number < 1:
            raise ValueError(EXPECTED)
        if number > len(there):
            raise UsageError(f"layers is {written}; the VLM has {len(there)} layers, 0 to {len(there) - 1}.")
        return tuple(there[::number] if word == "every" else there[:number])
    layers = [whole_number(part.strip()) for part in written.split(",")]
    if layers != sorted(set(layers)):
        raise ValueError(EXPECTED)
    if lost := [layer for layer in layers if layer not in there]:
        raise UsageError(f"layers names {layers_text(lost)}; the VLM has layers 0 to {len(there) - 1}.")
    return tuple(layers)


def layers_to_run(stored: Sequence[int] | None, *, whole: bool) -> int | None:
    """Number of the VLM's layers, from the first, that it has to be run through for the stored ones; None: all.

    `whole`: more is wanted than keys and values, such as hidden states or texts.
    """
    return None if whole or stored is None else stored[-1] + 1


def spread_layers(count: int, held: Sequence[int]) -> tuple[int, ...]:
    """The layers that an expert of `count` layers attends to by default: evenly over those that are held.

    12 layers over 36 attend to 0, 3, 6, ...; where there are more layers than are held, neighbours share one.
    """
    return tuple(held[place * len(held) // count] for place in range(count))


def layers_text(layers: Sequence[int]) -> str:
    """Layers for people: a range where there is no gap."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
