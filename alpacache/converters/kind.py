"""Kinds of recordings, as the registry knows them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Contents of an input, as `--list` shows them."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    command: str
    """A command that converts it, as far as that can be told."""
    notes: Sequence[str] = ()
    """Notes that a person should read before running it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of recording."""

    name: str
    reads: str
    """Description of an input of this kind, in a few words."""
    drives: Callable[..., Iterator[LoggedDrive | Dropped]]
    """`drives(place, **options)` yields the drives of an input, each when it is asked for, always in the same order.

    Raises `UsageError` for an input or options that cannot be of this kind, naming the remedy. A drive that cannot be
    used, beside others that can, is yielded as `Dropped`.
    """
    takes: Sequence[str] = ()
    """Settings of `ConvertConfig`, beyond those of every kind, that `drives` has as keywords."""
    list_input: Callable[[Path], Listing] | None = None
    """Function behind `--list`; None if there is nothing to choose from."""
    hub: bool = False
    """An input may be the id of a data set on the hub."""
    extra: str | None = None
    """The extra that it needs."""
    modules: Sequence[str] = ()
    """Modules that come with that extra."""

    def check_libraries(self) -> None:
        """Raise `UsageError` where a library of the kind is not installed."""
        if self.extra is not None:
            check_installed(self.modules, self.name, extra=self.extra)


def check_installed(modules: Sequence[str], what: str, *, extra: str) -> None:
    """Raise `UsageError` where one of the modules that `what` is read with is not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        remedy = f"Install with: pip install 'alpacache[{extra}]'"
        raise UsageError(f"{what}: {', '.join(missing)} {verb} needed and not installed. {remedy}")
