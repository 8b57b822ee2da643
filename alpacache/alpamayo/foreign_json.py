"""JSON written by others: read within bounds and checked against a declared schema before any value is used.

A checkpoint is a download. Whatever stands in its JSON files ends in a `CheckpointError` of one line that names file
and key, or in values of the declared types and ranges.
"""

import json
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from alpacache.errors import CheckpointError

JSON_LIMIT_BYTES = 64 * 2**20
_SHOWN = 3
"""Wrong keys that one error spells out."""

Count = Annotated[int, Field(ge=1, le=1024)]
"""Layers, heads and other things that are made one by one."""
Width = Annotated[int, Field(ge=1, le=2**20)]
"""Channels, tokens of a vocabulary, positions."""
Pixels = Annotated[int, Field(ge=1, le=2**26)]
"""Area of an image."""
Fraction = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]

Value = TypeVar("Value")


class Schema(BaseModel):
    """Keys that this project reads of a JSON object; others may be there. Types are not converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB."""
    size = path.stat().st_size
    if size > JSON_LIMIT_BYTES:
        raise CheckpointError(f"{path} is {size} bytes; refusing to parse more than 64 MiB of JSON.")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `text`; `where` is what an error calls it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__}; expected a JSON object.")
    return value


def conform(schema: type[Value], value: object, where: object) -> Value:
    """`value` as the schema declares it. Raises one `CheckpointError` that names `where` and every key that is off."""
    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        told = "; ".join(map(_told, problems[:_SHOWN]))
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{where}: {told}{more}.") from None


def _told(problem: ErrorDetails) -> str:
    """`text_config.hidden_size: Input should be a valid integer, not 'abc'`; what is foreign is cut to one line."""
    key = ".".join(repr(part)[1:-1] if isinstance(part, str) else str(part) for part in problem["loc"])[:120]
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = re.sub(" or instance of _\\w+$", "", problem["msg"].removeprefix("Value error, "))
    shown = "" if problem["type"] == "value_error" else f", not {reprlib.repr(problem['input'])}"
    return f"{key or 'the file'}: {message}{shown}"
