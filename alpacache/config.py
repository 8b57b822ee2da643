"""Base of all configs: every value is checked when a config is made, wherever it comes from; and TOML.

A config is a frozen dataclass whose annotations hold each value's range and how people write it. The command line makes
its options of them, so a setting is stated once. pydantic does the checking; it is loaded with the first config that is
made, as `alpacache --help` only looks at the fields.
"""

import ast
import dataclasses
import difflib
import inspect
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from alpacache.errors import UsageError
from alpacache.masking import masked_values
from alpacache.regular_file import read_regular

C = TypeVar("C", bound="Config")

_LARGEST_BYTES = 2**20
"""Largest config file that is read."""
MOST = 2**31 - 1
"""No count comes near; products of those beyond it would leave 64 bits."""
Count = Annotated[int, Ge(1), Le(MOST)]
"""Number that costs nothing by being large: steps, samples, intervals."""
BatchSize = Annotated[int, Ge(1), Le(65_536)]
Repeats = Annotated[int, Ge(1), Le(1024)]
"""Views, rollouts, paths, noise draws: each multiplies what a sample costs."""
Rank = Annotated[int, Ge(1), Le(4096)]
"""Rank of adapters; wider than the expert's layers they would be of no use."""
Threads = Annotated[int, Ge(1), Le(256)]
Seed = Annotated[int, Ge(0), Lt(2**63)]
Epochs = Annotated[float, Gt(0), Le(1e6)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """How people write a value that is not a plain number, word or switch, in TOML and on the command line."""

    metavar: str | Callable[[], str]
    """A function where it takes imports to know."""
    read: Callable[[Any], Any]
    """From a text, a tuple of texts or a table of texts to the value; returns what it cannot read, to be refused.

    Raises `UsageError`, or `ValueError` with what was expected.
    """
    expected: str = ""
    """Words for a value of other parts or of another number of them."""
    separator: str = ","
    """Between the parts of a value in one text."""
    repeatable: bool = False
    """Each part is an option of its own on the command line."""


def parts(
    item: Callable[[str], Any], metavar: str, *, expected: str, separator: str = ",", words: Sequence[str] = ()
) -> Written:
    """Values in one text with a separator, but for words that mean something as a whole."""

    def read(written: Any) -> Any:
        if written in words:
            return written
        texts = written.split(separator) if isinstance(written, str) else written
        try:
            return tuple(item(text.strip()) for text in texts)
        except UsageError:
            raise
        except ValueError:
            raise ValueError(expected) from None

    return Written(metavar=metavar, read=read, expected=expected, separator=separator)


def whole_number(text: str) -> int:
    """A whole number as TOML and people write it; Python also takes `1_0`, and the digits of every script.

    Raises `ValueError` for anything else.
    """
    return int(_ascii_number(text))


def number(text: str) -> float:
    """Like `whole_number`, for a float."""
    return float(_ascii_number(text))


def _ascii_number(text: str) -> str:
    if "_" in text or not text.isascii():
        raise ValueError(f"{text!r} is no number in plain digits")
    return text


def expand_home(written: Any) -> Any:
    """Paths with `~` for the home directory, also behind a source's kind (`folder:~/drives`), and tuples of them."""
    if not isinstance(written, str):
        return tuple(map(expand_home, written))
    if not written or "\0" in written or not is_unicode(written):
        raise ValueError("a path or name in valid Unicode")
    kind, colon, path = written.partition(":")
    if not (kind.isalpha() and path.startswith("~")):
        kind, colon, path = "", "", written
    path = os.path.expanduser(path)  # noqa: PTH111  # what is no path stays as it is
    if path.startswith("~"):
        raise ValueError(f"the name of a user behind the ~, or ./{path} for what is named so")
    return kind + colon + path


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8: bytes of an argument that are not UTF-8 become lone surrogates."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


PLACE = "PATH"
"""What stands for a path in help texts."""
Place = Annotated[str, Written(metavar=PLACE, read=expand_home)]
"""A directory, an s3:// address or a hub id."""
Name = Annotated[str, MinLen(1)]  # with a bound, pydantic refuses what is no valid Unicode


class Config:
    """Base of the configs. Subclasses are frozen dataclasses; a value out of its range is a `UsageError`."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, (written, check, has_parts) in _checks(type(self)).items():  # type: ignore[arg-type]
            given = value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, os.PathLike):
                value = os.fspath(value)
            # TOML and the command line have text, or a list or a table of texts, for a value of several parts.
            texts = value if isinstance(value, tuple) else value.values() if isinstance(value, Mapping) else (value,)
            try:
                is_text = isinstance(value, str) or (has_parts and all(isinstance(text, str) for text in texts))
                if written is not None and is_text:
                    value = written.read(value)
                value = check(value)
            except UsageError:
                raise
            except ValueError as error:
                of_parts = written.expected if written else ""
                is_single = isinstance(value, tuple) and len(value) == 1
                raise UsageError(_sentence(name, given, error, of_parts, is_single=is_single)) from None
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Raise `UsageError` for values that do not go with each other."""


def expect(good: bool, name: str, value: object, expected: str) -> None:
    """Raise `UsageError` in the words of all configs unless `good`."""
    if not good:
        raise UsageError(f"{name} is {shortened(str(value))}; expected {expected}.")


def shortened(text: str) -> str:
    """A text for a message, whose end is left out where it is long."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def written_as(hint: Any) -> Written | None:
    """How values of a field's type are written, if that is not as a plain number, word or switch."""
    if isinstance(hint, Written):
        return hint
    inner = () if get_origin(hint) is tuple else get_args(hint)
    return next((written for part in inner if (written := written_as(part))), None)


def field_docs(kind: type[Config]) -> Mapping[str, str]:
    """The docstring under each field of a config, base classes' included, as one line."""
    docs: dict[str, str] = {}
    for part in reversed(kind.__mro__[: kind.__mro__.index(Config)]):
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(part))).body[0].body  # type: ignore[attr-defined]
        for field, after in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(field.target, ast.Name):
                docs[field.target.id] = " ".join(ast.literal_eval(after.value).split())
    return docs


def read_toml(path: Path, kind: type[Config]) -> dict[str, Any]:
    """Values of a config file by field, not yet checked; `-` and `_` are the same. Raises `UsageError`."""
    try:
        raw = tomllib.loads(read_regular(path, limit_bytes=_LARGEST_BYTES).decode())
    except OSError as error:  # opening a pipe would wait for its other end
        raise UsageError(f"config file {path} cannot be read: {error.strerror or error}.") from error
    except RecursionError:
        raise UsageError(f"config file {path} is not valid TOML: it is nested too deeply.") from None
    except ValueError as error:
        raise UsageError(f"config file {path} is not valid TOML: {error}.") from error
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}."
            raise UsageError(f"{path}: unknown key {key!r}{hint}")
        if name in values:
            raise UsageError(f"{path}: {name!r} is given twice, as {name!r} and with `-`; leave one of the two.")
        values[name] = value
    return values


def to_toml(config: Config, *, mask: bool = False) -> str:
    """A config as TOML that `read_toml` reads back; None is left out. `mask` masks secrets in its texts."""
    import tomli_w

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    values = {name: value for name, value in values.items() if value is not None}
    return tomli_w.dumps(masked_values(values) if mask else values)


@cache
def _checks(kind: type) -> Mapping[str, tuple[Written | None, Callable[[Any], Any], bool]]:
    """For each field: how it is written, what returns a value or raises pydantic's error, and whether it has parts."""
    from pydantic import ConfigDict, TypeAdapter

    rules = ConfigDict(strict=True, allow_inf_nan=False)
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    return {
        name: (written_as(hint), TypeAdapter(hint, config=rules).validate_python, _has_parts(hint))
        for name, hint in hints.items()
        if name in names
    }


def _has_parts(hint: Any) -> bool:
    """Tell whether a tuple or a mapping is among what a field takes."""
    kind = get_origin(hint) or hint
    if isinstance(kind, type) and issubclass(kind, (tuple, Mapping)):
        return True
    inner = get_args(hint)[:1] if kind is Annotated else get_args(hint) if kind in (Union, UnionType) else ()
    return any(map(_has_parts, inner))


_SHOWN = 200
"""Characters of a refused value that are shown."""
_WORDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a table",
    "tuple_type": "a list",
    "string_unicode": "text in valid Unicode",
    "missing": "more of them",
    "too_short": "at least {min_length} of them",
    "too_long": "{max_length} of them",
    "string_too_short": "text",
    "literal_error": "{expected}",
}


_RANGES = frozenset({"greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number"})


def _sentence(name: str, value: Any, error: ValueError, of_parts: str, *, is_single: bool) -> str:
    """`NAME is VALUE; expected ...`, from pydantic's error or one that says in its text what was expected.

    `of_parts` is said to a value of several parts that is none of its forms; of one that is, only the range that it is
    out of. `is_single`: it has one part, so that there is no "each".
    """
    from pydantic import ValidationError

    expected = [str(error)]
    if isinstance(error, ValidationError):
        problems = error.errors(include_url=False)
        if of_parts:
            problems = [problem for problem in problems if problem["type"] in _RANGES]
        expected = [] if problems else [of_parts]
        for problem in problems:
            words = _WORDS.get(problem["type"], problem["msg"]).format(**_plain(problem.get("ctx", {})))
            part = problem["type"] != "missing" and any(isinstance(step, int) for step in problem["loc"])
            expected.append(f"each {words}" if part and not is_single else words)
    shown = str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, date) else repr(value)
    return f"{name} is {shortened(shown)}; expected {' or '.join(dict.fromkeys(expected))}."


def _plain(bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds of a range without the `.0` of whole numbers."""
    return {
        key: int(value) if isinstance(value, float) and value == int(value) else value for key, value in bounds.items()
    }
