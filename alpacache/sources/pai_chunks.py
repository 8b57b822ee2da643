"""Chunks of PhysicalAI-AV on disk: downloaded when a sample needs them, removed when others need the room.

A chunk is one archive of many clips, so clips that are read in order share downloads. Threads and processes may share
the directory: whoever reads a chunk holds a shared lock on its entry, and only chunks whose entry is not locked are
removed. An entry is a small file whose modification time is the chunk's last use. The kernel drops the locks of killed
processes.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from alpacache.errors import UsageError
from alpacache.sources.retry import with_retry

DIRECTORY, LIMIT = "ALPACACHE_PAI_CACHE", "ALPACACHE_PAI_CACHE_SIZE"
"""Environment variables: the directory that chunks are kept in, and how many bytes of them."""
DEFAULT_LIMIT = "64GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_POLL_S = 0.2


def cache_directory() -> Path:
    """`ALPACACHE_PAI_CACHE`, or `alpacache/pai` in the user's cache directory."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alpacache" / "pai"
    return Path(os.environ.get(DIRECTORY) or home).expanduser()


def limit_bytes() -> int:
    """`ALPACACHE_PAI_CACHE_SIZE`, such as `64GB`, in bytes; 0 means that no chunk is kept."""
    text = os.environ.get(LIMIT) or DEFAULT_LIMIT
    number = text.upper().rstrip("BKMGT ").strip()
    try:
        size = float(number) * _UNITS[text.upper()[len(number) :].strip()]
    except (ValueError, KeyError):
        size = -1.0
    if not 0 <= size < float("inf"):
        raise UsageError(f"{LIMIT} is {text!r}; expected a size such as 64GB, or 0 to keep no chunk.")
    return int(size)


class ChunkCache:
    """Chunks that a devkit interface downloads into its cache directory, at most `limit` bytes of them."""

    def __init__(self, interface: Any, directory: Path, limit: int) -> None:
        """`directory` is the interface's cache directory; entries and locks go to `directory/chunks`."""
        self._interface, self.limit = interface, limit
        self._entries = directory / "chunks"
        self._entries.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def hold(self, file: str, *, fetch: bool) -> Iterator[None]:
        """Keep a chunk, named by its path in the repository, from being removed.

        With `fetch` it is downloaded if need be, waiting for room while all others are in use; without, it is held only
        if it is there already. Raises `UsageError` if it alone is larger than the limit, `DataError` if the hub keeps
        failing.
        """
        entry = self._entry(file)
        if not fetch and not entry.exists():
            yield
            return
        with _locked(entry, fcntl.LOCK_SH):
            if fetch and self._path(file, self._interface.revision) is None:
                self._fetch(file, entry)
            os.utime(entry)
            yield

    def _entry(self, file: str) -> Path:
        return self._entries / f"{hashlib.sha256(f'{self._interface.revision}/{file}'.encode()).hexdigest()[:32]}.json"

    def _path(self, file: str, revision: str) -> Path | None:
        """The chunk's place in the hub's cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        interface = self._interface
        path = try_to_load_from_cache(
            interface.repo_id, file, cache_dir=interface.cache_dir, revision=revision, repo_type=interface.repo_type
        )
        return Path(path) if isinstance(path, str) else None

    def _fetch(self, file: str, entry: Path) -> None:
        """Download a chunk, unless another thread or process has just done so."""
        with _locked(entry.with_suffix(".fetch"), fcntl.LOCK_EX):
            if self._path(file, self._interface.revision) is not None:
                return
            entry.write_text("")  # nothing is granted yet
            hub, snapshot = self._interface.api, self._interface.repo_snapshot_info
            infos = with_retry(lambda: hub.get_paths_info(paths=[file], **snapshot), what=file)
            if not infos:
                raise FileNotFoundError(f"{self._interface.repo_id} has no file {file}")
            size = int(infos[0].size)
            if size > self.limit:
                most = f"{size:,} bytes, more than the {self.limit:,} that chunks may take"
                raise UsageError(f"{file} has {most}; set {LIMIT} higher, or to 0 to stream what is needed of each.")
            while not self._grant(file, entry, size):
                time.sleep(_POLL_S)
            with_retry(lambda: self._interface.download_file(file), what=file)

    def _grant(self, file: str, entry: Path, size: int) -> bool:
        """Remove the chunks longest unused until `size` fits, and take that room; False if too many are in use.

        A granted download counts with its full size from then on.
        """
        with _locked(self._entries / "room.lock", fcntl.LOCK_EX), ExitStack() as locks:
            used, idle = size, []
            for other in sorted(self._entries.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
                text = other.read_text() if other != entry else ""
                if not text:
                    continue
                noted = json.loads(text)
                path = self._path(**noted["chunk"])
                try:
                    locks.enter_context(_locked(other, fcntl.LOCK_EX | fcntl.LOCK_NB))
                except BlockingIOError:  # in use
                    used += noted["size"]
                    continue
                if path is not None:  # else a download that failed
                    idle.append((other, path))
                    used += noted["size"]
            if used - sum(path.stat().st_size for _, path in idle) > self.limit:
                return False
            for other, path in idle:
                if used <= self.limit:
                    break
                blob = path.resolve()  # in the hub's layout a chunk is a link to a blob
                used -= blob.stat().st_size
                path.unlink()
                blob.unlink(missing_ok=True)
                other.write_text("")
            entry.write_text(json.dumps({"chunk": {"file": file, "revision": self._interface.revision}, "size": size}))
            return True


@contextmanager
def _locked(file: Path, kind: int) -> Iterator[None]:
    with file.open("a") as handle:
        fcntl.flock(handle, kind)
        yield
