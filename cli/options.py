"""Options of a command, made from its config: the field's name, type, default and docstring are all there is to say.

A command is written as a function of a config and `json`. Its config has the defaults, over them what the file of
`--config` says, and over that what was typed.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from alpacache.config import PLACE, Config, expand_home, field_docs, number, read_toml, whole_number, written_as
from alpacache.errors import UsageError
from alpacache.hub import check_model

from . import output

C = TypeVar("C", bound=Config)

_WIDEST_METAVAR = 18
"""Characters; wider ones would leave the help of a group less than half of 80 columns."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
_CONFIG_FILE = typer.Option(metavar=PLACE, help="TOML file with any of the settings; options given here win.")
_ARGUMENTS = ("source", "kind", "input")
"""Settings without `--`."""
_NUMBERS: Mapping[Any, tuple[str, Callable[[str], float]]] = {int: ("INTEGER", whole_number), float: ("FLOAT", number)}
_SINGULAR = {"stores": "store", "exclude": "except"}
"""Fields whose option, which is repeated, is named otherwise."""


def plain_switches(params: list[Any]) -> list[Any]:
    """The options, of which switches have no type in the help: newer versions of Typer call it `<bool>`."""
    for option in params:
        if getattr(option, "is_flag", False):
            option.display_type_rich = lambda ctx: None
    return params


class Command(TyperCommand):
    """A command as `alpacache` shows it."""

    def get_params(self, ctx: Any) -> list[Any]:
        return plain_switches(super().get_params(ctx))


class ConfigCommand(Command):
    """A command with all settings of a config as options; `ctx.obj` becomes those that were typed."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        metavars: Mapping[str, Callable[[], str]] = self.callback.metavars  # type: ignore[union-attr]
        for option in params:
            if option.metavar is None and option.name in metavars:
                option.metavar = metavars[option.name]()
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the options in columns that leave their texts room on 80 columns."""
        self.get_params(ctx)
        options = self.params
        self.params = [_narrow(option) for option in options]
        super().format_help(ctx, formatter)
        self.params = options

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _warn_of_dropped(self.params, args)
        rest = super().parse_args(ctx, args)
        sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
        ctx.obj = {
            name: ctx.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"
        }
        if "config" not in ctx.obj and not ctx.resilient_parsing:  # as for shell completion
            assert self.callback is not None
            _refuse_missing(self.callback.kind, ctx.obj)  # type: ignore[attr-defined]
        return rest


def from_config(
    kind: type[C],
    *,
    panels: Mapping[str, str] | None = None,
    alternatives: Sequence[str] = (),
    read_file: Callable[[Path, Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Callable[[C, bool], None]], Callable[..., None]]:
    """Make a command of a function of a config and whether JSON is wanted. Register it with `cls=ConfigCommand`.

    Args:
        panels: title of a group in the help -> names of its fields, in one text.
        alternatives: fields that exclude each other: one on the command line takes the place of all in the file.
        read_file: the file's values by field, where they depend on what was typed. Default: as they stand there.
    """
    panel_of = {name: title for title, names in (panels or {}).items() for name in names.split()}
    fields = sorted(dataclasses.fields(kind), key=lambda field: not _is_required(field))  # type: ignore[arg-type]
    assert panel_of.keys() <= {field.name for field in fields}

    def decorate(body: Callable[[C, bool], None]) -> Callable[..., None]:
        def command(ctx: typer.Context, config: Path | None, json: bool, **_: Any) -> None:
            values = {} if config is None else read_file(config, ctx.obj) if read_file else read_toml(config, kind)
            if any(name in ctx.obj for name in alternatives):
                values = {name: value for name, value in values.items() if name not in alternatives}
            values |= {name: value for name, value in ctx.obj.items() if name not in ("config", "json")}
            _refuse_missing(kind, values)
            settings = kind(**values)
            _refuse_out_of_reach(settings)
            body(settings, json)

        hints, docs = get_type_hints(kind, include_extras=True), field_docs(kind)
        settings = [
            _parameter(field, hints[field.name], docs[field.name], panel_of.get(field.name)) for field in fields
        ]
        rest = (_keyword("config", Annotated[Path | None, _CONFIG_FILE], None), _keyword("json", Json, False))
        parameters = [_keyword("ctx", typer.Context), *settings, *rest]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__, command.__name__ = body.__doc__, body.__name__
        command.kind = kind  # type: ignore[attr-defined]
        ways = {name: written.metavar for name, hint in hints.items() if (written := written_as(hint))}
        command.metavars = {name: metavar for name, metavar in ways.items() if callable(metavar)}  # type: ignore[attr-defined]
        return command

    return decorate


def _narrow(option: Any) -> Any:
    """Show a switch as `--x` where it is off by default, else as `--[no-]x`; and many choices before the text."""
    shown = copy.copy(option)
    if option.secondary_opts:
        shown.secondary_opts, shown.show_default = [], False
        if option.default is not False:
            shown.opts = [option.opts[0].replace("--", "--[no-]")]
        if option.default:
            shown.help = f"{option.help} [default: on]"
    elif len(option.metavar or "") > _WIDEST_METAVAR:
        shown.help, shown.metavar = f"{option.metavar.replace('|', ', ')}. {option.help}", option.name.upper()
    return shown


def place(text: str | None) -> str | None:
    """Callback of a path of a command without a config: expands `~`. Raises `UsageError` for an empty one."""
    try:
        return None if text is None else expand_home(text)
    except ValueError as error:
        raise UsageError(f"got {text!r}; expected {error}.") from None


def _refuse_missing(kind: type[Config], values: Mapping[str, Any]) -> None:
    """Raise `UsageError` where a setting without a default is not there."""
    names = [field.name for field in dataclasses.fields(kind) if _is_required(field)]  # type: ignore[arg-type]
    if missing := [_option_name(name) for name in names if name not in values]:
        raise UsageError(f"{', '.join(missing)} missing; give it as an option or in --config FILE.toml.")


def _warn_of_dropped(options: Sequence[Any], args: Sequence[str]) -> None:
    """Say which of several paths is meant where one is taken: the last, as of all options."""
    words = args[: args.index("--")] if "--" in args else args
    for option in options:
        if option.metavar != PLACE or option.multiple:
            continue
        given = []
        for place, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name in option.opts and (equals or place + 1 < len(words)):
                given.append(value if equals else words[place + 1])
        if len(set(given)) > 1:
            output.say(f"WARNING: {option.opts[0]} is given {len(given)} times; the last counts: {given[-1]}.")


def _refuse_out_of_reach(config: Config) -> None:
    """Raise `UsageError` for a model or source of the hub while that cannot be reached, before anything is loaded."""
    for name in ("model", "vlm"):
        if (model := getattr(config, name, None)) is not None:
            check_model(model)
    if (source := getattr(config, "source", None)) is not None:
        from alpacache.sources import check_reach

        check_reach(source)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _option_name(name: str) -> str:
    return name.upper() if name in _ARGUMENTS else f"--{_SINGULAR.get(name, name).replace('_', '-')}"


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _parameter(field: "dataclasses.Field[Any]", hint: Any, doc: str, panel: str | None) -> inspect.Parameter:
    """One field as a keyword of a function that Typer makes an option of."""
    written, default = written_as(hint), None if field.default is dataclasses.MISSING else field.default
    plain, metavar = _plain_type(hint)
    if written is not None:
        plain, metavar = (list[str] if written.repeatable else str), written.metavar
        if default is not None:
            default = written.separator.join(map(str, default)) if isinstance(default, tuple) else str(default)
    annotation = plain | None if default is None else plain
    reading: dict[str, Any] = {}
    if plain in _NUMBERS:
        word, read = _NUMBERS[plain]
        reading, metavar = {"parser": or_text(read)}, metavar or word
    text, _, stated = doc.partition(" Default: ")  # shown at the end, as Typer shows defaults
    end = f" [default: {stated.rstrip('.')}]" if stated else " [required]" if _is_required(field) else ""
    if field.name in _ARGUMENTS:
        return _keyword(field.name, Annotated[annotation, typer.Argument(help=text + end, show_default=False)], default)
    name = _option_name(field.name)
    names = (f"{name}/--no-{name[2:]}",) if plain is bool else (name,)
    shown = None if callable(metavar) else metavar  # else `get_params` asks for it
    reading["autocompletion"] = _completion(metavar)
    option = typer.Option(*names, help=text + end, metavar=shown, rich_help_panel=panel, **reading)
    return _keyword(field.name, Annotated[annotation, option], default)


def _completion(metavar: str | Callable[[], str] | None) -> Callable[[str], list[str]] | None:
    """Gives the shell the words that a value may be, of those that a metavar such as `none|source|TEXT` lists."""
    if metavar is None or (isinstance(metavar, str) and "|" not in metavar):
        return None

    def words(incomplete: str) -> list[str]:
        listed = (metavar() if callable(metavar) else metavar).split("|")
        return [word for word in listed if word == word.lower() and word.startswith(incomplete)]

    return words


def or_text(read: Callable[[str], float]) -> Callable[[Any], Any]:
    """Reads a number; what is none stays text, which the config refuses in the same words as in a file."""

    def parse(text: Any) -> Any:
        try:
            return read(text) if isinstance(text, str) else text
        except ValueError:
            return text

    return parse


def _plain_type(hint: Any) -> tuple[Any, str | Callable[[], str] | None]:
    """Return the type that Typer reads from the command line for a field's type, and how choices are shown."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plain_type(inner[0])
    if origin in (Union, UnionType):
        return _plain_type(next(part for part in inner if part is not NoneType))
    if origin is Literal:
        return type(inner[0]), "|".join(map(str, inner))
    return (hint if hint in (bool, int, float) else str), None
