"""Paths that were predicted for a film so far, in a folder beside it: a film that was stopped goes on with them.

The folder goes when the film is there. What is in it is of one model and one recording; a note says which.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.directory_lock import DirectoryLock
from alpacache.durable import names_in
from alpacache.errors import UsageError
from alpacache.regular_file import read_regular, regular_size
from cache_store.storage.local_files import write_flushed

_log = logging.getLogger(__name__)
_SUFFIX, _NOTE = "paths", "settings.json"
"""Ending of the folder's name, and the file in it that says which film the paths are for."""
_NAME = re.compile(r"\d+\.(npz|new)|\.?settings\.json(\.new)?")
_NOTE_KEYS = frozenset({"cameras", "clip", "first_us", "flow_steps", "models", "paths", "seed"})


@contextmanager
def kept_beside(out: Path, settings: Mapping[str, Any], *, shape: tuple[int, ...]) -> Iterator["KeptPaths"]:
    """Open the folder beside a film that keeps its predicted paths, for this process alone.

    Paths of other settings are dropped. Raises `UsageError` for a folder of something else, or in use.
    """
    folder = out.with_name(f"{out.name}.{_SUFFIX}")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} is no folder that a film keeps its paths in; move it away.")
    with DirectoryLock(folder, remedy="Wait until it is done, or choose another --out."):
        kept = KeptPaths(folder, settings["models"], shape)
        kept.begin(settings)
        yield kept
    with suppress(OSError):
        folder.rmdir()


class KeptPaths:
    """Paths by moment and label, each moment in a file."""

    def __init__(self, folder: Path, labels: Sequence[str], shape: tuple[int, ...]) -> None:
        self._folder, self._labels, self._shape = folder, set(labels), shape

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Go on with what is there if it is of these settings, else begin anew."""
        note, text = self._folder / _NOTE, strict_json.dumps(settings, indent=1)
        names = [name for name in names_in(self._folder) if name != f".{_NOTE}.new"]  # of one killed at its beginning
        if names and self._noted(note, names) != strict_json.loads(text):
            self.remove()
        write_flushed(note, text.encode())

    def _noted(self, note: Path, names: Sequence[str]) -> Any:
        """Settings of what is there. Raises `UsageError` unless all of it is what a film keeps."""
        foreign = next((name for name in names if not _NAME.fullmatch(name)), None)
        before = None
        with suppress(OSError, ValueError):
            before = strict_json.loads(read_regular(note, limit_bytes=2**20))
        if not (isinstance(before, dict) and before.keys() >= _NOTE_KEYS):
            foreign = foreign or names[0]
        if foreign is not None:
            raise UsageError(f"{self._folder} holds {foreign}, which no film keeps there; move it away.")
        return before

    def read(self, t0_us: int) -> dict[str, NDArray[np.float32]] | None:
        """Paths by label; None where there are none, or what is there is damaged: they are predicted again."""
        file = self._file(t0_us)
        try:
            regular_size(file)
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
                paths = {label: kept[label] for label in kept.files}
        except FileNotFoundError:
            return None
        except Exception as error:  # of a damaged file NumPy and zipfile raise anything
            _log.warning("%s cannot be read (%s) and is predicted again.", file, error)
            return None
        whole = paths.keys() == self._labels and all(
            one.dtype == np.float32 and one.shape == self._shape and bool(np.isfinite(one).all())
            for one in paths.values()
        )
        return paths if whole else None

    def write(self, t0_us: int, paths: Mapping[str, NDArray[np.float32]]) -> None:
        file = self._file(t0_us)
        draft = file.with_suffix(".new")
        with draft.open("wb") as opened:
            np.savez(opened, **paths)  # type: ignore[arg-type]
        draft.replace(file)

    def remove(self) -> None:
        """Remove all that is kept."""
        for name in names_in(self._folder):
            if _NAME.fullmatch(name):
                (self._folder / name).unlink()

    def _file(self, t0_us: int) -> Path:
        return self._folder / f"{t0_us}.npz"
