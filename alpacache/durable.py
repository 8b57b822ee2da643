"""Files that are whole and on the medium, or not there under their name."""

import os
from pathlib import Path


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file beside its name, flush it, then rename it: a kill or a power loss leaves the old one or the new."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(data)
    flush(draft)
    draft.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the medium."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
