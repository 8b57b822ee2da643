"""Files written by others: read within bounds and checked against a declared schema before any value is used.

A checkpoint is a download. Whatever stands in its JSON files and in the headers of its safetensors files ends in a
`CheckpointError` of one line that names file and key, or in values of the declared types and ranges.
"""

import math
import os
import re
import reprlib
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from alpacache import strict_json
from alpacache.errors import CheckpointError
from alpacache.regular_file import LFS_POINTER

JSON_LIMIT_BYTES = 16 * 2**20
"""Largest file or header that is parsed here: objects may take twenty times as much. Real ones have at most 1 MB."""
_MOST_KEYS = 100_000
"""Most keys of one JSON object: validation may keep a kilobyte of error for each."""
_SHOWN = 3
"""Wrong keys that one error spells out."""
_METADATA = "__metadata__"
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16},
    **{"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
"""Bits of one element, by safetensors' name of the dtype."""

Count = Annotated[int, Field(ge=1, le=1024)]
"""Layers, heads and other things that are made one by one."""
Width = Annotated[int, Field(ge=1, le=2**20)]
"""Channels, tokens of a vocabulary, positions."""
Pixels = Annotated[int, Field(ge=1, le=2**26)]
"""Area of an image."""
Fraction = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
_Size = Annotated[int, Field(ge=0, lt=2**63)]

Value = TypeVar("Value")


class Schema(BaseModel):
    """Keys that this project reads of a JSON object; others may be there. Types are not converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Entry(Schema):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=64)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


class _Metadata(Schema):
    """The one key of a header that is no tensor."""

    metadata: Annotated[dict[str, str], Field(alias=_METADATA)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor of a checkpoint, read from its shard's header."""

    shard: str
    """Name of the file."""
    dtype: str
    """The format's name, such as `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the shard file."""
    nbytes: int


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A foreign file, opened, and its size in bytes.

    Raises `CheckpointError` for what cannot be read, is no regular file, or is the pointer that git-lfs leaves for one.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise CheckpointError(f"{path} is no regular file; expected a file of a checkpoint.")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a git-lfs pointer in place of the file; run `git lfs pull` in its repository, or fetch "
                    "the checkpoint with `hf download`."
                )
            file.seek(0)
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 16 MiB."""
    with opened(path) as (file, size):
        if size > JSON_LIMIT_BYTES:
            raise CheckpointError(f"{path} is {size} bytes; refusing to parse more than 16 MiB of JSON.")
        return _parsed(file.read(size), path)


_JSON_WORDS: Mapping[type, str] = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_DAMAGED = " The header is damaged; fetch the file again."


def _parsed(text: bytes, where: object) -> dict[str, Any]:
    try:
        value = strict_json.loads(text, most_keys=_MOST_KEYS)
    except ValueError as error:
        told = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{where} is not valid JSON ({told}); fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds {_JSON_WORDS[type(value)]}; expected a JSON object. Fetch it again.")
    return value


def conform(schema: type[Value], value: object, where: object, *, remedy: str = "") -> Value:
    """`value` as the schema declares it. Raises one `CheckpointError` that names `where` and every key that is off.

    `remedy` ends its message.
    """
    try:
        checked: Value = _adapter(schema).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = error.errors(include_url=False)
        told = "; ".join(map(_told, problems[:_SHOWN]))
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{where}: {told}{more}.{remedy}") from None
    return checked


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _told(problem: ErrorDetails) -> str:
    """`text_config.hidden_size: expected a valid integer, not 'abc'`; what is foreign is cut to one line."""
    key = ".".join(repr(part)[1:-1] if isinstance(part, str) else str(part) for part in problem["loc"])[:120]
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = re.sub(" or instance of \\w+$", "", problem["msg"].removeprefix("Value error, "))
    message = message.replace("Input should be", "expected").replace("dictionary", "JSON object")
    shown = "" if problem["type"] == "value_error" else f", not {reprlib.repr(problem['input'])}"
    return f"{key or 'the file'}: {message}{shown}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name; none of their data is read.

    Raises `CheckpointError` unless every entry fits its shape and dtype, and all of them fill the file's data without
    overlap or gap, as the format demands.
    """
    with opened(path) as (file, size):
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path} is not a safetensors file, or it is truncated; fetch it again.")
        if length > JSON_LIMIT_BYTES:
            raise CheckpointError(
                f"the header of {path} is {length} bytes; refusing to parse more than 16 MiB of JSON."
            )
        header = _parsed(file.read(length), f"the header of {path}")
    return check_header(header, path, data_start=8 + length, data_bytes=size - 8 - length)


def check_header(
    header: Mapping[str, object], where: Path | str, *, data_start: int = 0, data_bytes: int | None = None
) -> dict[str, TensorInfo]:
    """The tensors that a parsed header declares.

    Args:
        where: the file, as errors name it; its last part is the shard's name.
        data_start: first byte of the data in the file.
        data_bytes: what follows the header; None where the file is not at hand.
    """
    conform(_Metadata, {_METADATA: header.get(_METADATA, {})}, where, remedy=_DAMAGED)
    entries: dict[str, _Entry] = {}
    for name in header:  # one by one: the first that is off ends it, not a million errors
        if name != _METADATA:
            entries |= conform(dict[str, _Entry], {name: header[name]}, where, remedy=_DAMAGED)
    tensors, end, damage = {}, 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        end_before, (begin, end) = end, entry.data_offsets
        if entry.dtype not in _BITS:
            raise CheckpointError(
                f"{where}: {name!r} has the unknown dtype {entry.dtype!r}; expected {', '.join(_BITS)}."
            )
        if begin != end_before or math.prod(entry.shape) * _BITS[entry.dtype] != 8 * (end - begin):
            damage = f"has a damaged header: {name!r} is {entry.dtype} {entry.shape} at bytes {begin} to {end}, "
            damage += f"after a tensor that ends at {end_before}"
        elif data_bytes is not None and end > data_bytes:
            damage = f"is truncated: {name!r} ends at byte {data_start + end} of {data_start + data_bytes}"
        if damage:
            break
        tensors[name] = TensorInfo(
            shard=Path(where).name,
            dtype=entry.dtype,
            shape=tuple(entry.shape),
            offset=data_start + begin,
            nbytes=end - begin,
        )
    if not damage and data_bytes is not None and end < data_bytes:
        damage = f"has a damaged header: its tensors end at byte {data_start + end} of {data_start + data_bytes}"
    if damage:
        raise CheckpointError(f"{where} {damage}; fetch it again.")
    return tensors
