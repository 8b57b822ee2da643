"""The JSON documents of a store: written canonically, sealed with their own checksum, read with suspicion.

The seal is the CRC-32C of the file's bytes with the seal's own eight hex digits set to zeros, so that a reader in any
language can check every byte of the file without knowing how to write canonical JSON.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from cache_store.checksum import crc32c
from cache_store.errors import FormatError

MAX_DOCUMENT_BYTES = 16 * 2**20
"""Size limit for writing and reading: a hostile store must not fill the memory."""
SEAL_KEY = "document_crc32c"
_SEAL_OPENING = f'"{SEAL_KEY}":"'.encode()
_BLANK = b"00000000"


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_copy(value: object, what: str) -> Any:
    """The value as it comes back from JSON (tuples as lists), or a `ValueError` that says what cannot be stored."""
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be plain JSON without NaN or infinity: {error}.") from error


def to_bytes(document: dict[str, Any], what: str) -> bytes:
    """Canonical bytes, within the size limit that readers enforce."""
    data = canonical_json(document).encode()
    if len(data) > MAX_DOCUMENT_BYTES - 64:
        raise ValueError(f"{what} would take {len(data)} bytes of JSON; the limit is {MAX_DOCUMENT_BYTES}.")
    return data


def seal(document: dict[str, Any], what: str, *, opening: bytes = b"{") -> bytes:
    """Canonical bytes with the seal inserted right after `opening`, where readers find it first."""
    return seal_bytes(to_bytes(document, what), opening=opening)


def seal_bytes(data: bytes, *, opening: bytes = b"{") -> bytes:
    """JSON of any layout with the seal inserted right after `opening`, which it begins with."""
    assert data.startswith(opening)
    before, after = opening + _SEAL_OPENING, b'",' + data[len(opening) :]
    return before + b"%08x" % crc32c(before + _BLANK + after) + after


def check_seal(data: bytes, where: str) -> None:
    """Raise `FormatError` unless the bytes are those that were sealed."""
    if _SEAL_OPENING not in data:
        raise FormatError(f"{where} carries no checksum ({SEAL_KEY}); it is damaged or was changed by another tool.")
    at = data.index(_SEAL_OPENING) + len(_SEAL_OPENING)
    stored = data[at : at + 8]
    computed = b"%08x" % crc32c(data[:at] + _BLANK + data[at + 8 :])
    if stored != computed:
        both = f"(stored {stored.decode(errors='replace')}, computed {computed.decode()})"
        raise FormatError(f"{where} does not match its own checksum {both}: damaged, or changed by another tool.")


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object from untrusted bytes: no duplicate keys, no NaN, bounded depth."""
    try:
        document = json.loads(data, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not a valid JSON document: {str(error)[:200]}.") from error
    if not isinstance(document, dict):
        raise FormatError(f"{where} is not a JSON object.")
    return document


def take(document: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """`document[key]`, which must be exactly of this type (`True` is not an integer here)."""
    if key not in document:
        raise FormatError(f"{where} has no {key!r}.")
    if type(document[key]) is not kind:
        raise FormatError(f"{where}: {key!r} should be {kind.__name__}, got {type(document[key]).__name__}.")
    return document[key]


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object names the same key twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN, Infinity, or such as 1e999: none could be written again
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value
