"""Differences between two nested JSON values, one line a key, for people who must find out which setting is off."""

from collections.abc import Mapping

from cache_store.document import canonical_json


def differences(expected: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """One line a differing key, dotted and sorted: `model.revision: expected "a", found "b"`.

    Compared as JSON, so a tuple equals a list; but `1`, `1.0` and `true` are three different values.
    """
    return _walk(expected, found, "")


def _walk(expected: Mapping[str, object], found: Mapping[str, object], prefix: str) -> list[str]:
    lines: list[str] = []
    for key in sorted(expected.keys() | found.keys()):
        name = f"{prefix}{key}"
        if key not in found:
            lines.append(f"{name}: expected {_show(expected[key])}, found nothing")
        elif key not in expected:
            lines.append(f"{name}: expected nothing, found {_show(found[key])}")
        else:
            one, other = expected[key], found[key]
            if isinstance(one, Mapping) and isinstance(other, Mapping):
                lines += _walk(one, other, f"{name}.")
            elif canonical_json(one) != canonical_json(other):
                lines.append(f"{name}: expected {_show(one)}, found {_show(other)}")
    return lines


def _show(value: object) -> str:
    text = canonical_json(value)
    return text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)"
