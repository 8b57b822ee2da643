"""Differences between two nested JSON values, one line per key, for people who look for the setting that is off."""

from collections.abc import Mapping

from cache_store.document import canonical_json


def differences(expected: Mapping[str, object], actual: Mapping[str, object], prefix: str = "") -> list[str]:
    """List the differing keys, dotted and sorted: `model.revision: expected "a", found "b"`.

    Values are compared as JSON, so a tuple equals a list; but `1`, `1.0` and `true` are three different values.
    """
    lines: list[str] = []
    for key in sorted(expected.keys() | actual.keys()):
        wanted, got = expected.get(key), actual.get(key)
        if isinstance(wanted, Mapping) and isinstance(got, Mapping):
            lines += differences(wanted, got, f"{prefix}{key}.")
            continue
        texts = [canonical_json(mapping[key]) if key in mapping else "nothing" for mapping in (expected, actual)]
        if texts[0] != texts[1]:
            shown = [text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)" for text in texts]
            lines.append(f"{prefix}{key}: expected {shown[0]}, found {shown[1]}")
    return lines
