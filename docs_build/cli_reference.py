"""The tables of all commands and options, read off the command line itself.

`docs/reference/commands.md` ends with the marker; the tables take its place when the site is built, so that they are
never older than the code.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARKER = "<!-- every command and option -->"
_TABLE = ("| option | value | default | meaning |", "| --- | --- | --- | --- |")
_VALUES = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


def commands() -> dict[str, Any]:
    """Command objects by name; what `typer` builds of the functions in `cli/`."""
    import typer.main
    from alpacache_cli.main import app

    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def callbacks() -> dict[str, Callable[..., Any]]:
    """The function behind each command."""
    from alpacache_cli.main import app

    return {str(info.name): info.callback for info in app.registered_commands if info.callback is not None}


def page() -> str:
    """Markdown: the program's own options, then a section for each command."""
    import typer.main
    from alpacache_cli.main import app

    functions = callbacks()
    rows = _rows(typer.main.get_command(app), app.registered_callback.callback)
    own = ["### alpacache", "", "`alpacache [OPTIONS] COMMAND ...`", "", *_TABLE, *rows, "", ""]
    return "\n".join(own) + "\n".join(_section(name, command, functions[name]) for name, command in commands().items())


def option_names(command: Any) -> set[str]:
    """Every way to write each option of a command."""
    return {"-h", "--help"} | {
        name
        for parameter in command.params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


def _section(name: str, command: Any, function: Callable[..., Any]) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    usage = " ".join(["alpacache", name, *(parameter.name.upper() for parameter in arguments), "[OPTIONS]"])
    rows = list(_rows(command, function))
    lines = [f"### alpacache {name}", "", f"`{usage}`", "", inspect.cleandoc(command.help or ""), ""]
    lines += [*_TABLE, *rows, ""]
    return "\n".join(lines)


def _rows(command: Any, function: Callable[..., Any]) -> Iterator[str]:
    hints = typing.get_type_hints(function)
    for parameter in command.params:
        if parameter.name not in hints:  # help and shell completion, which are typer's own
            continue
        argument = parameter.param_type_name == "argument"
        names = [parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
        meaning, default = _meaning_and_default(parameter)
        shown = ", ".join(f"`{name}`" for name in names)
        yield f"| {shown} | {_value(hints[parameter.name], parameter)} | {default} | {meaning} |"


def _meaning_and_default(parameter: Any) -> tuple[str, str]:
    """Options of configs end their help with a default that is no plain value, or with `[required]`."""
    text = " ".join((parameter.help or "").split())
    stated = re.search(r"\s*\[(?:default: )?([^\[\]]+)\]$", text)
    if stated:
        return _cell(text[: stated.start()].strip()), _cell(stated.group(1))
    if parameter.required:
        return _cell(text), "required"
    if parameter.default is None or isinstance(parameter.default, bool):
        return _cell(text), "yes" if parameter.default else ""
    return _cell(text), f"`{parameter.default}`"


def _value(hint: Any, parameter: Any) -> str:
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if bool in kinds:
        return ""
    value = "PATH" if kinds[0] is Path else _VALUES.get(kinds[0], "TEXT")
    metavar = parameter.metavar() if callable(parameter.metavar) else parameter.metavar
    return _cell(metavar or value) + (", repeatable" if getattr(parameter, "multiple", False) else "")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def global_options() -> set[str]:
    """Options that stand before the command."""
    import typer.main
    from alpacache_cli.main import app

    return option_names(typer.main.get_command(app))
