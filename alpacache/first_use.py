"""Names of a package that are imported when they are first asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def on_first_use(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """What a package's `__getattr__` returns, given the modules that its names live in. Raises `AttributeError`."""
    if name in homes:
        return getattr(import_module(homes[name]), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
