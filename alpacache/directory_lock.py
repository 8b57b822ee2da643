"""A directory's one owner: of all processes that would write there, on one machine or on several, one may.

The kernel's lock on the file `lock` ends with its process, however that ends. Some network disks keep such locks to one
machine or do not have them. So the file also says who holds it, and its holder writes it anew every few seconds: an
owner on another machine lives as long as the file changes, one on this machine as long as its process does.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from alpacache import strict_json
from alpacache.errors import DataError, UsageError

_log = logging.getLogger(__name__)
LOCK = "lock"
"""Name of the file."""
_LIMIT_BYTES = 4096
"""More than a lock's file ever has."""
_BEAT_S = 3.0
_WATCH_S = 10.0
"""Longest silence of an owner on another machine: more than a beat and a network disk's attribute cache."""


class DirectoryLock:
    """Held while entered; a directory that is not there is made, and removed again if nothing was put there.

    Raises `UsageError` on entering where another process holds it, or something else has the name of its file.
    """

    def __init__(self, directory: Path, *, remedy: str, take_over: bool = False) -> None:
        """`remedy`: what a user can do about another owner. `take_over`: do not mind one."""
        self._directory, self._path = directory, directory / LOCK
        self._remedy, self._takes_over = remedy, take_over
        self._file = -1
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        self._left, self._beat = threading.Event(), threading.Thread(target=self._write_beats, daemon=True)

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._takes_over:
            with suppress(FileNotFoundError):
                os.close(self._open_own(os.O_RDONLY))
                self._path.unlink()  # whoever holds it finds that out with `check`
        self._file, locked = self._open()
        try:
            owner = _read(self._file)
            if locked is False or (owner and self._is_alive(owner, locked=locked)):
                raise UsageError(f"{self._directory} is being written by {_named(owner)}. {self._remedy}")
            self._write(0)
            self._beat.start()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._beat.join()
        with suppress(OSError):
            if self._is_ours():
                self._path.unlink()
            for path in self._made:
                path.rmdir()
        os.close(self._file)
        self._file = -1

    def check(self) -> None:
        """Raise `DataError` if another process has taken over; nothing may be written then."""
        if not self._is_ours():
            raise DataError(
                f"{self._directory} is no longer this process's: another one has taken over, or {self._path.name} was "
                "removed. This process ends without writing there."
            )

    def _open(self) -> tuple[int, bool | None]:
        """The file and whether it could be locked; None where the file system has no locks."""
        while True:
            file = self._open_own(os.O_RDWR | os.O_CREAT)
            locked: bool | None = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked = False
            except OSError:
                locked = None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), self._path.lstat()):
                    return file, locked
            os.close(file)  # its owner has just left and removed it

    def _open_own(self, flags: int) -> int:
        """Open the file. Raises `UsageError` where it is not a lock's: then it is neither written nor removed."""
        try:
            file = os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a directory, a socket
                raise self._foreign() from error
            raise
        if not _is_lock(file):
            os.close(file)
            raise self._foreign()
        return file

    def _foreign(self) -> UsageError:
        return UsageError(
            f"{self._path} is not the lock that alpacache writes under this name, and is left as it is. Move it away, "
            "or choose another --out."
        )

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self._path.lstat())
        except OSError:
            return False

    def _is_alive(self, owner: Mapping[str, Any], *, locked: bool | None) -> bool:
        """Tell whether the process that a lock's file names still runs, as far as can be told from here."""
        if owner.get("place") == _place():
            return locked is None and owner.get("started") == _started(owner.get("pid"))
        _log.warning(
            "%s was left by %s; waiting %.0f s whether that still writes there.",
            self._directory,
            _named(owner),
            _WATCH_S,
        )
        end = time.monotonic() + _WATCH_S
        while time.monotonic() < end:
            time.sleep(_WATCH_S / 10)
            file = self._open_own(os.O_RDONLY)  # opened anew, a network disk looks at its server
            try:
                if _read(file) != owner:
                    return True
            finally:
                os.close(file)
        return False

    def _write(self, beat: int) -> None:
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "place": _place()}
        text = json.dumps(mine | {"beat": beat}).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)

    def _write_beats(self) -> None:
        beat = 0
        while not self._left.wait(_BEAT_S):
            beat += 1
            with suppress(OSError):  # a full disk is met by who writes what counts
                self._write(beat)


def _is_lock(file: int) -> bool:
    """Tell whether an open file is a lock's: it names an owner, perhaps half written, or is still empty."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LIMIT_BYTES:
        return False
    text = os.pread(file, _LIMIT_BYTES, 0).strip(b"\0")  # zeros are what a crash of the machine may leave
    return not text or (text.startswith(b'{"host": ') and b'"place": ' in text)


def _read(file: int) -> dict[str, Any]:
    """Read the owner from a lock's file; nothing where none is named, or one is just being written."""
    with suppress(ValueError):
        owner = strict_json.loads(os.pread(file, _LIMIT_BYTES, 0))
        return owner if isinstance(owner, dict) else {}
    return {}


def _named(owner: Mapping[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if owner.keys() >= {"pid", "host"} else "another process"


def _place() -> str:
    """Scope of this process's number: the host, since it was started, and the container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: object) -> str | None:
    """Time at which a process began, in the kernel's ticks; None if there is none. Numbers of processes come again."""
    with suppress(OSError, IndexError, ValueError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None
