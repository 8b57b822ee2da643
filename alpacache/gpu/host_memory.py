"""Page-locked host memory for copies to and from a GPU, no larger than asked for.

PyTorch's pinned allocator rounds every request up to a power of two, which would waste up to half of a cache in RAM. So
ordinary page-aligned memory is registered with CUDA instead. Samples that stay page-locked in RAM reach a GPU at
54 GB/s, those from the page cache at 36 to 42 (H100, docs/decisions/0011).
"""

import mmap
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from alpacache.errors import UsageError

Bytes = NDArray[np.uint8]

_SLAB_BYTES = 2**30
"""Size of a slab. Page-locking one stalls the caller while the kernel maps the pages, about 0.1 s."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group that hold its limit and use, and the line of `memory.stat` on file caches, which can be
dropped."""


def page_aligned(size_bytes: int) -> Bytes:
    """Zeroed bytes on pages of their own; a page takes memory when it is first written."""
    memory = mmap.mmap(-1, size_bytes)
    with suppress(OSError, AttributeError):  # only a hint: huge pages are quicker to lock
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def page_lock(memory: Bytes) -> None:
    """Page-lock memory, so that the GPU can copy by itself. Raises `UsageError` where the system refuses."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.size, 0))  # type: ignore[no-untyped-call]
    if code:
        raise UsageError(
            f"{memory.size:,} bytes of RAM could not be page-locked (CUDA error {code}); {available_bytes():,} are "
            "available. Lower --batch-size or --writers, leave --in-memory out, raise --memory-budget (moments that do "
            "not fit the GPU are kept in RAM), or give the container more memory."
        )


def page_unlock(memory: Bytes) -> None:
    """Undo `page_lock`; no copy from this memory may be under way."""
    torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)  # type: ignore[no-untyped-call]


def page_rounded(size_bytes: int) -> int:
    """Bytes of the whole pages that hold so many bytes."""
    return size_bytes + -size_bytes % mmap.PAGESIZE


def available_bytes() -> int:
    """RAM that the system, or the limit of a container, Slurm job or systemd unit, leaves without swapping or kills."""
    return max(0, min([_listed(_MEMINFO, "MemAvailable:") * 1024, *_left_in_cgroups()]))


def _left_in_cgroups() -> Iterator[int]:
    """Bytes that each memory limit of this process's control groups and of their parents leaves.

    A container may be told the host's path, of which it sees the end as its root; a folder that is not there limits
    nothing.
    """
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, (limit, used, cached) = (_CGROUP / "memory", _V1) if controllers else (_CGROUP, _V2)
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError, KeyError):  # no such file, or "max": no limit
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                yield left + _listed(folder / "memory.stat", cached)
            if folder == root:
                break


def _listed(path: Path, name: str) -> int:
    return int(dict(line.split()[:2] for line in path.read_text().splitlines())[name])


class Slabs:
    """Memory for many arrays that all stay, allocated as needed in slabs that are page-locked as wholes.

    `place` is safe in threads. Only `lock_new` and `unlock` call CUDA, so that their caller chooses when: a call from
    another thread would break a CUDA graph that is being captured.
    """

    def __init__(self, total_bytes: int) -> None:
        """`total_bytes`: size in whole pages of all that will be placed."""
        self._left = total_bytes
        self._slabs: list[Bytes] = []
        self._ends: list[int] = []
        self._locked = 0
        self._placing = threading.Lock()

    def place(self, size_bytes: int) -> Bytes:
        """Memory from the beginning of a page, never to be given back."""
        taken = page_rounded(size_bytes)
        with self._placing:
            for slab, end in enumerate(self._ends):
                if self._slabs[slab].size - end >= taken:
                    break
            else:
                slab, end = len(self._slabs), 0
                room = taken * max(1, _SLAB_BYTES // taken)  # whole arrays like this one, so that nothing is left over
                self._slabs.append(page_aligned(max(taken, min(self._left, room))))
                self._ends.append(0)
            self._ends[slab] = end + taken
            self._left -= taken
            return self._slabs[slab][end : end + size_bytes]

    def lock_new(self) -> None:
        """Page-lock the slabs that were made since the last call."""
        while self._locked < len(self._slabs):
            page_lock(self._slabs[self._locked])
            self._locked += 1

    def unlock(self) -> None:
        """Undo all page-locking; the memory stays and can be locked again."""
        while self._locked:
            self._locked -= 1
            page_unlock(self._slabs[self._locked])
