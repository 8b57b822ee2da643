"""A process that is killed before its n-th system call that changes a disk, whichever library makes the call.

The kernel stops the process at these calls alone (a seccomp filter) and tells its tracer, so calls of C++ and Rust
count as Python's do and nothing else is slowed down. Linux on x86-64 only.
"""

import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable

# Calls by number. The descriptor or the flags of the first two groups say whether a file is meant.
_WRITES = {"write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296}
_OPENS = {"open": (2, 1), "openat": (257, 2)}
"""Number, and which argument holds the flags."""
_OTHERS = {
    "sendfile": 40,
    "fsync": 74,
    "fdatasync": 75,
    "truncate": 76,
    "ftruncate": 77,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "creat": 85,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "chmod": 90,
    "fchmod": 91,
    "mkdirat": 258,
    "unlinkat": 263,
    "renameat": 264,
    "linkat": 265,
    "symlinkat": 266,
    "fchmodat": 268,
    "fallocate": 285,
    "renameat2": 316,
    "copy_file_range": 326,
}
_TRACE, _ALLOW = 0x7FF00000, 0x7FFF0000
_ARCHITECTURE = 0xC000003E
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_TRACEME, _CONT, _SETOPTIONS = 0, 7, 0x4200
_OPTIONS = 0x100000 | 0x80 | 0x08 | 0x04 | 0x02  # kill when the tracer ends; seccomp, clone, vfork, fork
_SECCOMP_EVENT, _WALL = 7, 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def is_possible() -> bool:
    """Whether this machine is one whose calls are known here."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def run(body: Callable[[], None], *, kill_at: int | None = None) -> tuple[int, int | None]:
    """Run `body` in a forked process; returns its calls that change a disk, and its exit status, None if killed.

    `kill_at`: number of the call, from 1, before which the whole process is killed.
    """
    pid = os.fork()
    if not pid:
        try:
            _trace_me()
            body()
            os._exit(0)
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        finally:
            os._exit(99)
    os.waitpid(pid, 0)
    if _libc.ptrace(_SETOPTIONS, pid, None, _OPTIONS):
        raise OSError(ctypes.get_errno(), "this machine does not let processes be traced")
    _libc.ptrace(_CONT, pid, None, None)
    calls = 0
    while True:
        thread, status = os.waitpid(-1, _WALL)
        if not os.WIFSTOPPED(status):
            if thread == pid:
                return calls, None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            continue
        stop, event = os.WSTOPSIG(status), status >> 16
        if event == _SECCOMP_EVENT:
            calls += 1
            if calls == kill_at:
                os.kill(pid, signal.SIGKILL)
                continue
        passed = 0 if event or stop in (signal.SIGTRAP, signal.SIGSTOP) else stop
        _libc.ptrace(_CONT, thread, None, passed)


def _trace_me() -> None:
    if _libc.ptrace(_TRACEME, 0, None, None):
        os._exit(98)
    os.kill(os.getpid(), signal.SIGSTOP)
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _filter())
    buffer = ctypes.create_string_buffer(program, len(program))
    described = _Program(len(program) // 8, ctypes.addressof(buffer))
    no_new_privileges, set_seccomp, with_filter = 38, 22, 2
    _libc.prctl(no_new_privileges, 1, 0, 0, 0)
    if _libc.prctl(set_seccomp, with_filter, ctypes.byref(described), 0, 0):
        os._exit(98)


def _filter() -> list[tuple[int, int, int, int]]:
    """Berkeley packet filter: stop at calls that change a disk, let all others pass."""
    number, architecture = 0, 4
    program = [(_LOAD, 0, 0, architecture), (_EQUAL, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _ALLOW)]
    program.append((_LOAD, 0, 0, number))
    for call in _WRITES.values():  # not to stdin, stdout and stderr
        program += [(_EQUAL, 0, 4, call), (_LOAD, 0, 0, _argument(0)), (_GREATER, 0, 1, 2)]
        program += [(_RETURN, 0, 0, _TRACE), (_RETURN, 0, 0, _ALLOW)]
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for call, flags in _OPENS.values():
        program += [(_EQUAL, 0, 4, call), (_LOAD, 0, 0, _argument(flags)), (_ANY_BIT, 0, 1, changing)]
        program += [(_RETURN, 0, 0, _TRACE), (_RETURN, 0, 0, _ALLOW)]
    for call in _OTHERS.values():
        program += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _TRACE)]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _argument(number: int) -> int:
    """Offset of the low word of a call's argument."""
    return 16 + 8 * number
