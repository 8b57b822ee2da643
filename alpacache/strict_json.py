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


def loads(text: bytes | str, *, most_keys: int | None = None) -> Any:
    """Like `json.loads`; raises `ValueError` for whatever readers take differently, and for deep nesting.

    That is NaN, infinities and numbers beyond a double, a key that an object has twice, bytes that are not UTF-8;
    and objects of more than `most_keys`.
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
        if most_keys is not None and len(pairs) > most_keys:
            raise ValueError(f"an object of {len(pairs)} keys, expected at most {most_keys}")
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"it has the key {twice[:80]!r} {counts[twice]} times in one object; keep the right one")
        return found

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # json itself would guess, and take UTF-16
        return json.loads(text, parse_constant=refuse, parse_float=number, parse_int=whole, object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
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
