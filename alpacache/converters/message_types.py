"""Message definitions of a log, looked through before rosbags makes code of them.

rosbags writes Python from a definition and runs it. Its grammar lets names, numbers and texts through and nothing else;
here that does not rest on one version's grammar: what it has understood is held against a short list of forms. Nor may
a definition cost more than its messages do: sizes and nesting that would keep the parser busy for ever are refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from alpacache.errors import SourceError

_MAX_BYTES = 2**20
_MOST_LINES = 50_000
"""Values that a message has by its definition alone, each of which becomes a line of code."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_]*(/[A-Za-z][A-Za-z0-9_]*)*")
_NUMBERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"float32", "float64", "float128"}
_TEXTS = ("string", "wstring")
_BASIC = frozenset({"bool", "byte", "char", "octet", "wchar", *_TEXTS, *_NUMBERS})
_IDL_WORDS = re.compile(r'"(?:\\"|[^"])*"|//[^\n]*|/[*](?:[^*]|[*](?!/))*[*]/')
"""Texts and comments, as rosbags takes them."""
_DEEPEST = {"(": 1, "<": 2}
"""The parser tries each level several times, so time grows by a power of it."""
_BETWEEN = "=" * 80 + "\n"


def message_types(name: str, definition: str, encoding: str) -> dict[str, Any]:
    """The types that a definition of `name` consists of, as rosbags understands them.

    `encoding` is `ros1msg`, `ros2msg` or `ros2idl`. Raises `SourceError` for what is none, or is not taken.
    """
    from rosbags.typesys import get_types_from_idl, get_types_from_msg

    try:
        if len(definition) > _MAX_BYTES:
            raise ValueError(f"it has {len(definition):,} characters; at most {_MAX_BYTES:,} are read")
        types: dict[str, Any] = {}
        if encoding == "ros2idl":
            _check_nesting(definition)
            for text in definition.split(_BETWEEN):
                if text.strip():
                    types |= get_types_from_idl(text.split("\n", 1)[1] if text.startswith("IDL: ") else text)
        else:
            types = get_types_from_msg(definition, full_name(name))
        for one in types:
            _check_plain(one, *types[one])
        _check_lines(types)
    except Exception as error:  # whatever the library's parser makes of somebody's text
        raise SourceError(f"the definition of {name[:120]} cannot be read ({str(error)[:500]}).") from error
    return types


def full_name(name: str) -> str:
    """`package/msg/Name` of `package/Name`."""
    return name if "/msg/" in name else name.replace("/", "/msg/")


def _check_nesting(definition: str) -> None:
    code = _IDL_WORDS.sub(" ", definition)
    if "<<" in code:
        raise ValueError("<< is not read")
    depth = dict.fromkeys(_DEEPEST, 0)
    for sign in code:
        if sign in depth:
            depth[sign] += 1
            if depth[sign] > _DEEPEST[sign]:
                raise ValueError(f"{sign} within {sign} more than {_DEEPEST[sign]} deep is not read")
        elif sign in ")>":
            opening = "(" if sign == ")" else "<"
            depth[opening] = max(0, depth[opening] - 1)


def _check_plain(name: str, constants: Any, fields: Any) -> None:
    """Raise `ValueError` unless a type is made of plain names, sizes and values."""
    plain = _TYPE.fullmatch(name) is not None
    for constant, kind, value in constants:
        plain &= _NAME.fullmatch(constant) is not None and kind in _BASIC and type(value) in (bool, int, float, str)
    for field, described in fields:
        plain &= _NAME.fullmatch(field) is not None and _is_plain(described)
    if not plain:
        raise ValueError(f"{name[:120]!r} has parts that are no names, numbers or texts")


def _is_plain(described: Any) -> bool:
    kind, what = described
    if int(kind) == 1:  # basic: its name, and the bound of a text
        return what[0] in _BASIC and type(what[1]) is int
    if int(kind) == 2:  # another type
        return _TYPE.fullmatch(what) is not None
    inner, size = what  # array or sequence
    return int(inner[0]) in (1, 2) and _is_plain(inner) and type(size) is int and size >= 0


def _check_lines(types: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a type holds itself, or more texts and messages than are written out in code."""
    counted: dict[str, int] = {}

    def lines(name: str, within: tuple[str, ...]) -> int:
        if name in within:
            raise ValueError(f"{name} holds itself")
        if name not in counted and name in types:
            counted[name] = 1 + sum(of_field(described, (*within, name)) for _, described in types[name][1])
            if counted[name] > _MOST_LINES:
                raise ValueError(f"a message of {name} has more than {_MOST_LINES:,} parts")
        return counted.get(name, 1)

    def of_field(described: Any, within: tuple[str, ...]) -> int:
        kind, what = described
        if int(kind) == 1:
            return 1
        if int(kind) == 2:
            return lines(what, within)
        inner, size = what
        times = size if int(kind) == 3 else 1  # a sequence's are as many as the message has bytes for
        if int(inner[0]) == 1:
            return times if inner[1][0] in _TEXTS else 1
        return times * lines(inner[1], within)

    for name in types:
        lines(name, ())
