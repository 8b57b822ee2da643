"""The three configs, one a stage. A TOML file may set any of their keys; unknown keys are errors."""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from alpacache.errors import UsageError

T = TypeVar("T")


def read_toml(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Keys of a config file, checked against a config's fields; `-` and `_` are the same."""
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"config file {path} is not valid TOML: {error}.") from error
    known = {item.name for item in dataclasses.fields(kind)}
    values = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}."
            raise UsageError(f"{path}: unknown key {key!r}{hint}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def to_toml(config: Any) -> str:
    """A config as TOML that `read_toml` reads back; None is left out."""
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is not None:
            lines.append(f"{item.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def make(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a config; a value of the wrong type is a `UsageError`, not a traceback."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise UsageError(f"{name} is {value!r}; expected {_describe(hints[name])}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"bad {kind.__name__}: {error}.") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that a config field declares; an int is good for a float."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind in (UnionType, Union):
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        kinds = parts[:1] * len(value) if isinstance(value, tuple) and parts[1:] == (...,) else parts
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is not None:
        return isinstance(value, kind)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        import json

        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(part)}" for key, part in value.items()) + "}"
    return repr(value)


def check_value(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise UsageError(f"{name} is {value}; expected {expected}.")
