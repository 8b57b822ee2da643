"""Directories of results that appear under their name when all of them is there, and not before.

They are written beside the name and renamed. Where that cannot be (a mount point has a name of its own, a parent may
belong to another user), or where the directory is there already and something in it is replaced, the parts are moved
one by one: old ones go before new ones come, so that those of two are never there together, and a note of it lets the
next process undo what a killed one had begun.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from alpacache.directory_lock import LOCK, DirectoryLock
from alpacache.errors import UsageError
from cache_store.storage.local_files import flush, write_flushed

_CONTENT, _MOVING, _INSIDE, _PROBE = "content", "moving.json", ".writing", ".writing-probe"
_NOT_COUNTED = {_INSIDE, _PROBE, LOCK, "lost+found"}


def check_out(out: Path) -> None:
    """Refuse an --out that is no directory of a disk, or in a store. Raises `UsageError`."""
    if re.match(r"\w+:/", str(out)):
        raise UsageError(f"--out {out} is no path; expected a directory on a disk.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; expected a directory.")
    for place in (out, *out.absolute().parents):
        with suppress(OSError):
            if b'"cache_store"' in (place / "zarr.json").read_bytes():
                raise UsageError(f"--out {out}: {place} is a store; choose a directory outside of it.")


def names_in(out: Path) -> list[str]:
    """Sorted names in a directory, without what file systems and killed processes leave there; none if it is absent."""
    return sorted({path.name for path in out.iterdir()} - _NOT_COUNTED) if out.is_dir() else []


def take_back(out: Path) -> None:
    """Remove what a process had begun to move to `out` when it was killed. Raises `UsageError` if it still runs."""
    for work in (_beside(out), out / _INSIDE):
        if (work / _MOVING).is_file():
            with _alone(work):
                _take_back(work, out)


@contextmanager
def appearing(out: Path, *, replaces: Sequence[str] = (), last: Sequence[str] = ()) -> Iterator[Path]:
    """A directory to write, whose files get their names under `out` when the body ends well.

    Args:
        replaces: names in `out` that go when the new ones come.
        last: names without which the others mean nothing: they come last, in this order, and go first, in the opposite.

    Raises `UsageError` where another process is writing to `out`.
    """
    out = out.absolute()
    work = _work_place(out)
    content = work / _CONTENT
    try:
        with _alone(work):
            try:
                _take_back(work, out)
                shutil.rmtree(content, ignore_errors=True)
                content.mkdir()
                yield content
                for place in (*content.rglob("*"), content):
                    flush(place)
                _publish(content, out, replaces, last)
            finally:
                shutil.rmtree(content, ignore_errors=True)
    finally:
        with suppress(OSError):
            work.rmdir()


def _publish(content: Path, out: Path, replaces: Sequence[str], last: Sequence[str]) -> None:
    if not out.exists() or not names_in(out):
        try:
            content.rename(out)
            flush(out.parent)
            return
        except OSError:
            if not out.is_dir():
                raise
    work, new = content.parent, sorted(path.name for path in content.iterdir())
    names = [*(name for name in new if name not in last), *(name for name in last if name in new)]
    old = [*reversed(last), *replaces]
    write_flushed(work / _MOVING, json.dumps([*old, *(name for name in names if name not in old)]).encode())
    try:
        _remove(out, old)
        for name in names:
            (content / name).rename(out / name)
        flush(out)
    except OSError:
        _take_back(work, out)
        raise
    (work / _MOVING).unlink()


def _take_back(work: Path, out: Path) -> None:
    note = work / _MOVING
    if note.is_file():
        _remove(out, json.loads(note.read_bytes()))
        note.unlink()


def _remove(out: Path, names: Sequence[str]) -> None:
    for name in names:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    flush(out)


def _alone(work: Path) -> DirectoryLock:
    return DirectoryLock(work, remedy="Wait until it is done, or choose another --out.")


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.writing")


def _work_place(out: Path) -> Path:
    """Beside `out`, or in it where nothing can be moved from there."""
    beside, inside = _beside(out), out / _INSIDE
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return beside
    probe = out / _PROBE
    try:
        beside.mkdir(exist_ok=True)
        (beside / _PROBE).touch()
        (beside / _PROBE).rename(probe)
        probe.unlink()
    except OSError:
        with suppress(OSError):
            (beside / _PROBE).unlink(missing_ok=True)
            beside.rmdir()
        return inside
    return beside
