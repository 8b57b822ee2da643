"""JSON that every reader accepts: Python's own writes and reads `NaN` and `Infinity` where JSON has only `null`."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Like `json.dumps`, for whatever `plain` takes; without `indent` on one line."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def loads(text: bytes | str) -> Any:
    """Like `json.loads`; raises `ValueError` for NaN, infinities and numbers beyond a double, for a key that an object
    holds twice, and for deep nesting.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is beyond the range of numbers")
        return value

    def whole(digits: str) -> int:
        number(digits)
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"it has the key {twice[:80]!r} {counts[twice]} times in one object; keep the right one")
        return found

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number, parse_int=whole, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries with text keys, sequences as lists, what is not finite as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
