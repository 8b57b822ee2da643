"""Short measurements of this machine: the disk under a store, and the GPU."""

import errno
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alpacache.errors import UsageError
from alpacache.planning.gpus import Gpu
from cache_store.storage.local_files import free_bytes, write_new
from cache_store.storage.storage import is_uri

_FILE_BYTES = 2**24
"""Size of a probe file: about a chunk of a store."""
_PROBE_BYTES, _LEAST_BYTES = 2**29, 2**20
_AT_ONCE = 4
"""Files that are written at a time, as a sample's are."""
_READERS = 8
_LIMIT_S = 8.0
"""Longest time spent writing, and again reading: a slow medium is measured with fewer files."""
_MATRIX = 8192
_BUS_BYTES = 2**28
_MATMUL_SHARE = 0.8
_COPY_SHARE = 0.9
"""Parts of a data sheet's rates that a large product and a large copy are assumed to reach. Measured rates are divided
by them, because times are scaled by data sheets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """Throughput of files as large as a store's, several at a time."""

    write_bytes_s: float
    """Bytes a second, until they are on the medium."""
    read_bytes_s: float
    """Bytes a second, after the page cache was told to drop them. A file system without a medium reads from RAM."""
    probe_bytes: int


def existing_folder(path: Path | str) -> Path:
    """Return the folder, or the nearest existing one above it. Raises `UsageError` for object storage."""
    if is_uri(path):
        raise UsageError(f"{path} is object storage, whose room and speed are not known here; leave --store out.")
    folder = Path(path).expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def disk_speed(path: Path | str) -> DiskSpeed:
    """Write files as a store does, force them to the medium, read them back and remove them.

    They take 512 MB together, or a tenth of the free space. Raises `OSError` where nothing can be written.
    """
    folder = existing_folder(path)
    size = min(_PROBE_BYTES, free_bytes(folder) // 10)
    if size < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    data = np.random.default_rng(0).integers(0, 256, min(_FILE_BYTES, size // _AT_ONCE), np.uint8)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".alpacache-probe-") as place:
        files: list[Path] = []
        started = time.perf_counter()
        while (len(files) + _AT_ONCE) * len(data) <= size and time.perf_counter() - started < _LIMIT_S:
            more = [Path(place, str(len(files) + number)) for number in range(_AT_ONCE)]
            write_new(*((file, [data]) for file in more))
            files += more
        write_s = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):  # out of the page cache, so that the medium is read
            for file in files:
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()

        def read(file: Path) -> int:
            if time.perf_counter() - started > _LIMIT_S:
                return 0
            with file.open("rb", buffering=0) as opened:
                return opened.readinto(bytearray(len(data))) or 0

        with ThreadPoolExecutor(_READERS, "read") as pool:
            read_bytes = sum(pool.map(read, files))
        read_s = time.perf_counter() - started
    written = len(files) * len(data)
    return DiskSpeed(write_bytes_s=written / write_s, read_bytes_s=read_bytes / max(read_s, 1e-9), probe_bytes=written)


def gpu_speed(number: int = 0) -> Gpu:
    """Measure products of bfloat16 matrices and copies in memory, and return the rates that a data sheet would give."""
    import torch

    device = torch.device("cuda", number)
    left = torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device=device)
    right = torch.empty_like(left)

    def best_seconds(work: str) -> float:
        times: list[float] = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(8):
                torch.mm(left, left, out=right) if work == "product" else right.copy_(left)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 8e3)
        return min(times)

    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        name=properties.name,
        tflops=2 * _MATRIX**3 / best_seconds("product") / 1e12 / _MATMUL_SHARE,
        memory_gb_s=2 * left.nbytes / best_seconds("copy") / 1e9 / _COPY_SHARE,
        memory_gb=properties.total_memory / 2**30,
    )


def bus_speed(number: int = 0) -> float:
    """Bytes a second between page-locked RAM and a GPU, each way while as much goes the other way."""
    import torch

    device = torch.device("cuda", number)
    host = [torch.empty(_BUS_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(_BUS_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    into, out = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.cuda.stream(into):
            there[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(out):
            host[1].copy_(there[1], non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return _BUS_BYTES / min(times)
