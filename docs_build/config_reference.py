"""Tables of the configs' fields: name, type, default, and the docstring under the field.

`<!-- fields of TrainConfig -->` in a page stands for the table of that config.
"""

import dataclasses
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import alpacache
from alpacache.config import field_docs
from alpacache.sources.config import CheckConfig, PrepareConfig

_MARKER = re.compile(r"<!-- fields of (\w+) -->")
_HERE = {"CheckConfig": CheckConfig, "PrepareConfig": PrepareConfig}
"""Configs that have a command and no function of `alpacache`."""


def filled(markdown: str) -> str:
    """A page with its tables."""
    return _MARKER.sub(lambda match: table(match[1]), markdown)


def table(name: str) -> str:
    """Markdown: a row a field. Raises `AttributeError` for a config that is not there."""
    kind = _HERE.get(name) or getattr(alpacache, name)
    docs, hints = field_docs(kind), get_type_hints(kind, include_extras=True)
    rows = []
    for field in dataclasses.fields(kind):
        cells = (f"`{field.name}`", _type(hints[field.name]), _default(field), docs[field.name])
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _type(hint: Any) -> str:
    """`list of number`, or the choices; what a TOML file may hold."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inner if part is not NoneType)
    if origin is Literal:
        return ", ".join(f'`"{choice}"`' for choice in inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    names = {bool: "true, false", int: "integer", float: "number", str: "text"}
    return names.get(hint, "table of text")


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        return (
            ""
            if default is None
            else f"`{default!r}`".replace("'", '"').replace("True", "true").replace("False", "false")
        )
    return "required" if field.default_factory is dataclasses.MISSING else "`{}`"
