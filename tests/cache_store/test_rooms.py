"""The order of the store's rooms: each imports only those below it, and the basics import no room."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cache_store"
BASICS = {"errors", "document", "checksum", "concurrency", "rereading"}
MAY_IMPORT = {
    "basics": set(),
    "kv": set(),
    "storage": set(),
    "format": {"storage"},
    "samples": {"format", "storage"},  # writer, reader, sample_read, prefetcher
    "upkeep": {"samples", "format", "storage"},
}


def room_of(parts: tuple[str, ...]) -> str:
    if len(parts) > 1 or parts[0] in MAY_IMPORT:
        return parts[0]
    return "basics" if parts[0] in BASICS else "samples"


def rooms_imported_by(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cache_store":
            inside = tuple(node.module.split(".")[1:])
            rooms |= {room_of(inside or (alias.name,)) for alias in node.names}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room) -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    own = [path for path in paths if room_of(path.relative_to(PACKAGE).with_suffix("").parts) == room]
    assert own
    for path in own:
        assert rooms_imported_by(path) <= {room, "basics"} | MAY_IMPORT[room], path
