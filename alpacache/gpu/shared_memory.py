"""Memory that the processes of one machine share, filled by one of them.

Neither the memory nor the socket by which it is handed on has a name in a file system (memfd and an abstract socket,
both Linux's), so that processes which are killed leave nothing behind.
"""

import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from alpacache.errors import UsageError
from alpacache.gpu.host_memory import Bytes

_PAUSE_S = 0.01
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group at the other end of a socket."""


def can_share() -> bool:
    """Tell whether this system has what sharing takes."""
    return hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")


class SharedBytes:
    """So many bytes that every process gets which asks for the same `name` while another one holds them.

    The first process fills them; the others wait until it has, and take its place if it fails or dies.
    """

    def __init__(self, name: str, size_bytes: int, fill: Callable[[Bytes], None]) -> None:
        """`fill` writes the bytes; what it raises is raised here, and the next process tries."""
        self._socket: socket.socket | None = None
        self.filled_here = False
        """True if this process filled them."""
        address = f"\0{name}-{os.getuid()}"
        while True:
            listener = socket.socket(socket.AF_UNIX)
            try:
                listener.bind(address)
            except OSError:
                listener.close()
                file = _received(address)
                if file is None:  # it ended before it was done, or has just begun
                    time.sleep(_PAUSE_S)
                    continue
                self.bytes = _mapped(file, size_bytes)
                return
            break
        self._socket = listener
        try:
            listener.listen(64)
            file = os.memfd_create(name)
            try:
                os.ftruncate(file, size_bytes)
                self.bytes = _mapped(os.dup(file), size_bytes)
                fill(self.bytes)
            except BaseException:
                os.close(file)
                raise
        except BaseException:
            listener.close()
            raise
        self.filled_here = True
        threading.Thread(target=_hand_out, args=(listener, file), name="share-memory", daemon=True).start()

    def close(self) -> None:
        """Hand the bytes to nobody else; who has them keeps them."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _mapped(file: int, size_bytes: int) -> Bytes:
    """The bytes of a file that is closed then. Raises `ValueError` if it has not as many."""
    try:
        memory = mmap.mmap(file, size_bytes)
    finally:
        os.close(file)
    with suppress(OSError, AttributeError):  # only a hint
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _received(address: str) -> int | None:
    """The file that is handed out there, as soon as it is filled; None if whoever filled it has ended."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(ConnectionError):
        connection.connect(address)
        _check_user(connection)
        _, files, _, _ = socket.recv_fds(connection, 1, 1)
        return files[0] if files else None
    return None


def _hand_out(listener: socket.socket, file: int) -> None:
    """Send the file to each process that comes, until the listener is shut down."""
    try:
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError, UsageError):
                _check_user(connection)
                socket.send_fds(connection, [b"."], [file])
    except OSError:
        pass
    finally:
        os.close(file)
        listener.close()


def _check_user(connection: socket.socket) -> None:
    """Raise `UsageError` unless the other end is a process of the same user."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user != os.getuid():
        raise UsageError(
            f"a process of another user (uid {user}) answers for the memory that this run's processes share. Start the "
            "run again, or take --weights files."
        )
