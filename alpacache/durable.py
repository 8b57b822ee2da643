"""Directories of results that appear under their name when all of them is there, and not before.

They are written beside the name and renamed. Where that cannot be (a mount point has a name of its own, a parent may
belong to another user), or where the directory is there already and something in it is replaced, the parts are moved
one by one: old ones go before new ones come, so that those of two are never there together, and a note of it lets the
next process undo what a killed one had begun. The note is sealed, and may only name the command's own files:
anything else that lies there stays, and ends the command.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from alpacache import strict_json
from alpacache.directory_lock import LOCK, DirectoryLock
from alpacache.errors import AlpacacheError, UsageError
from cache_store import CacheStoreError
from cache_store.document import SEAL_KEY, check_seal, seal_bytes
from cache_store.storage.local_files import FULL, flush, write_flushed

_CONTENT, _MOVING, _INSIDE, _PROBE = "content", "moving.json", ".writing", ".writing-probe"
RUN = "run.json"
"""Name of the file by which a directory is known as a training run's."""
_OWN = {_INSIDE, _PROBE, LOCK}
_OF_SYSTEMS = re.compile(
    r"lost\+found|\.nfs\w+|\.snapshots?|\.Trash(es|-\d+)|\.DS_Store|\.Spotlight-V100|\.fseventsd|\$RECYCLE\.BIN"
    r"|System Volume Information"
)
"""What file systems, network disks and desktops put into directories: one that holds nothing else is empty."""


def check_out(out: Path) -> None:
    """Refuse an --out that is no directory of a disk, in a store, or in another run. Raises `UsageError`."""
    if _is_address(str(out)):
        address = re.sub(":/+", "://", str(out), count=1)  # whole again, so that secrets in it are masked
        raise UsageError(f"--out {address} is no path; expected a directory on a disk.")
    _check_name(out.absolute())
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; expected a directory.")
    _check_parents(out)
    if _is_store(out):
        raise UsageError(f"--out {out}: {out} is a store; choose a directory outside of it.")
    _check_outside(out, "--out")


def check_file_out(out: Path) -> None:
    """Refuse an --out that no file can be made at, in a store, or in a run. Raises `UsageError`."""
    if _is_address(str(out)):
        address = re.sub(":/+", "://", str(out), count=1)  # as above
        raise UsageError(f"--out {address} is no path; expected a file on a disk.")
    _check_name(out.absolute())
    _check_outside(out, "--out")
    _check_parents(out)


def _check_parents(out: Path) -> None:
    place = next(place for place in out.absolute().parents if place.exists())
    if not place.is_dir():
        raise UsageError(f"--out {out} cannot be made: {place} is a file. Name another place.")


def check_store_place(store: str, *, what: str = "--store") -> None:
    """Refuse to begin a store inside another one or a run; one that is there already goes on. Raises `UsageError`."""
    if _is_address(store) and "://" not in store:
        address = re.sub(":/", "://", store, count=1)
        raise UsageError(f"{what} has one slash behind its scheme; write {address}, or ./ before a folder's name.")
    if "://" not in store and not _is_store(Path(store)):
        _check_outside(Path(store), what)


def _is_address(text: str) -> bool:
    """Tell whether a text is an address such as `s3://...`, also where making a path of it has taken one slash."""
    return re.match(r"[A-Za-z][\w.+-]*:/", text) is not None


def _check_name(out: Path) -> None:
    """Refuse what no directory can be made at: a name that is too long, links that lead nowhere; and the root."""
    if not out.name:
        raise UsageError(f"--out {out} is the root of all files; expected a directory of its own.")
    try:
        os.lstat(_beside(out))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"--out {out}: the name is too long for this disk; choose a shorter one.") from error
    for place in (out, *out.parents):
        if place.is_symlink() and not os.path.exists(place):  # noqa: PTH110  # of a ring of links, pathlib's raises
            raise UsageError(
                f"--out {out}: {place} is a symbolic link to {place.readlink()}, which is not there. Make that "
                "directory, or name another one."
            )


def _check_outside(path: Path, what: str) -> None:
    for place in path.absolute().parents:
        for kind, is_one in (("store", _is_store), ("run", _is_run)):
            if is_one(place):
                raise UsageError(f"{what} {path}: {place} is a {kind}; choose a directory outside of it.")


def check_results_out(out: Path, *, what: str, names: Sequence[str], main: str, keys: Collection[str]) -> None:
    """Refuse a directory that cannot be written to, or where files of something else have the names of results.

    Takes back what a killed process had begun to put there. Raises `UsageError`.

    Args:
        what: what these results are called, as in "evaluation".
        names: all names of such results.
        main: the JSON file among them, which tells that they are: it has the `keys`.
    """
    check_out(out)
    if _is_run(out) or _is_model(out):
        kind = "run" if _is_run(out) else "model"
        raise UsageError(f"--out {out} is a {kind}; choose another directory for the {what}.")
    take_back(out, names)
    taken = [name for name in names if name in names_in(out)]
    if taken and not _has_keys(out / main, keys):
        raise UsageError(
            f"--out {out} holds {', '.join(taken)}, but no whole {what}; nothing is written over. Name another "
            "directory, or remove what is there."
        )
    place = next(place for place in (out, *out.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"--out {out}: nothing can be written there ({why}); name another directory.") from error


def names_in(out: Path) -> list[str]:
    """Sorted names in a directory, without what file systems and killed processes leave there; none if it is absent."""
    return sorted(path.name for path in out.iterdir() if _counts(path.name)) if out.is_dir() else []


def _counts(name: str) -> bool:
    return name not in _OWN and not _OF_SYSTEMS.fullmatch(name)


def has_marks(run: Path) -> bool:
    """Tell whether a directory has a `run.json` of ours, damaged or not."""
    return (run / RUN).is_file() and SEAL_KEY.encode() in (run / RUN).read_bytes()


def take_back(out: Path, names: Collection[str] | None = None) -> None:
    """Remove what a process had begun to move to `out` when it was killed; `names` as in `appearing`.

    Raises `UsageError` if it still runs, or if the note of what it moved is not one of ours.
    """
    for work in (_beside(out), out / _INSIDE):
        if os.path.lexists(work / _MOVING) or os.path.lexists(work / _CONTENT):
            _refuse_link(work)
            with _alone(work):
                _take_back(work, out, names)
            with suppress(OSError):
                work.rmdir()


@contextmanager
def appearing(
    out: Path, *, replaces: Sequence[str] = (), last: Sequence[str] = (), names: Collection[str] | None = None
) -> Iterator[Path]:
    """A directory to write, whose files get their names under `out` when the body ends well.

    Args:
        replaces: names in `out` that go when the new ones come.
        last: names without which the others mean nothing: they come last, in this order, and go first, in the opposite.
        names: all names that the command gives; what a killed one had moved is looked for under no others. None: any.

    Raises `UsageError` where another process is writing to `out`, or something else lies where it is written first.
    """
    out = out.absolute()
    work = _work_place(out)
    _refuse_link(work)
    content = work / _CONTENT
    try:
        with naming(out), _alone(work):
            _take_back(work, out, names)
            try:
                _note(work, ())
                content.mkdir()
                yield content
                for place in (*content.rglob("*"), content):
                    flush(place)
                _publish(content, out, replaces, last)
            finally:
                _take_back(work, out, names)
    finally:
        with suppress(OSError):
            work.rmdir()


@contextmanager
def naming(out: Path) -> Iterator[None]:
    """Give the error of a full disk the directory that was written to: writing to an open file raises it without."""
    try:
        yield
    except (AlpacacheError, CacheStoreError):  # ours say more themselves
        raise
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(out)) from error
        raise


def _publish(content: Path, out: Path, replaces: Sequence[str], last: Sequence[str]) -> None:
    if not out.exists():
        content.rename(out)
        flush(out.parent)
        return
    # A directory that is there keeps its mode and owner, and may be somebody's working directory.
    new = sorted(path.name for path in content.iterdir())
    names = [*(name for name in new if name not in last), *(name for name in last if name in new)]
    old = [*reversed(last), *replaces]
    _note(content.parent, [*old, *(name for name in names if name not in old)])
    _remove(out, old)
    for name in names:
        (content / name).rename(out / name)
    flush(out)
    content.rmdir()
    (content.parent / _MOVING).unlink()


def _note(work: Path, moves: Sequence[str]) -> None:
    """Say what is removed or moved; that the note is there says whose the content is."""
    write_flushed(work / _MOVING, seal_bytes(json.dumps({"moves": list(moves)}).encode()))


def _take_back(work: Path, out: Path, names: Collection[str] | None) -> None:
    note, content = work / _MOVING, work / _CONTENT
    if not os.path.lexists(note):
        if os.path.lexists(content):
            raise _foreign(content, f"{_MOVING} is not beside it")
        return
    if (moves := _moves(note, names)) and out.is_dir():
        _remove(out, moves)
    shutil.rmtree(content, ignore_errors=True)
    note.unlink()


def _moves(note: Path, names: Collection[str] | None) -> list[str]:
    """Names listed in a note. Raises `UsageError` unless all are plain names and among `names`."""
    try:
        if note.is_symlink() or not note.is_file():
            raise ValueError("it is no regular file")
        data = note.read_bytes()
        check_seal(data, note.name)
        moves = strict_json.loads(data)["moves"]
        if not isinstance(moves, list):
            raise ValueError("its moves are no list")
        for name in moves:
            known = _counts(name) if names is None else name in names
            if not known or name in ("", ".", "..") or set(name) & {"/", "\0"}:
                raise ValueError(f"{name!r} is no name of a file that this command writes")
    except (ValueError, LookupError, TypeError) as error:
        raise _foreign(note, str(error)) from error
    return moves


def _foreign(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"{path} is damaged, or not of this command ({reason}). Nothing was removed; move {path.parent} away and run "
        "the same command again."
    )


def _refuse_link(work: Path) -> None:
    if work.is_symlink():
        raise _foreign(work / _MOVING, f"{work.name} is a link")


def _is_store(place: Path) -> bool:
    root = place / "zarr.json"
    with suppress(OSError):
        return root.is_file() and b'"cache_store"' in root.read_bytes()
    return False


def _is_run(place: Path) -> bool:
    with suppress(OSError):
        return has_marks(place) or any(place.glob("checkpoints/step-*/state.json"))
    return False


def _is_model(place: Path) -> bool:
    return (place / "config.json").is_file() and any(place.glob("*.safetensors*"))


def _has_keys(path: Path, keys: Collection[str]) -> bool:
    try:
        document = strict_json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.keys() >= set(keys)


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
    """Folder for drafts: beside `out`, or in it where nothing can be moved from there."""
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
