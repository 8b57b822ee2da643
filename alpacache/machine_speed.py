"""A few seconds of measuring the machine at hand: the disk under a store, and the GPU."""

import errno
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alpacache.errors import UsageError
from alpacache.gpus import Gpu
from cache_store.local_files import free_bytes
from cache_store.storage import is_uri

_BLOCK_BYTES = 2**24
_FILE_BYTES, _LEAST_BYTES = 2**28, 2**20
_SYNC_BYTES = 2**26
"""Forced to the medium at a time, so that a slow one is noticed before the page cache has taken all."""
_READERS = 4
_LIMIT_S = 8.0
"""Of writing, and again of reading: a slow medium is measured with less than the whole file."""
_MATRIX = 8192
_MATMUL_SHARE = 0.7
_COPY_SHARE = 0.9
"""What a large product and a large copy are assumed to reach of the data sheet: rates are given as a data sheet would,
because that is what times are scaled by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """Bytes a second of one large file: written by one thread, read by four."""

    write_bytes_s: float
    """Until it is on the medium."""
    read_bytes_s: float
    """After the page cache was told to forget it; a file system without a medium reads from RAM all the same."""
    file_bytes: int


def existing_folder(path: Path | str) -> Path:
    """The folder itself, or the nearest one above it that is there. Raises `UsageError` for object storage."""
    if is_uri(path):
        raise UsageError(f"{path} is object storage, whose room and speed are not known here; leave --store out.")
    folder = Path(path).expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def disk_speed(path: Path | str) -> DiskSpeed:
    """Write, force to the medium and read back a temporary file at the path, which is always removed again.

    It has 256 MB, or a tenth of what is free. Raises `OSError` where nothing can be written.
    """
    folder = existing_folder(path)
    size = min(_FILE_BYTES, free_bytes(folder) // 10)
    if size < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    block = np.random.default_rng(0).integers(0, 256, min(_BLOCK_BYTES, size), np.uint8)
    with tempfile.TemporaryFile(dir=folder, prefix=".alpacache-probe-", buffering=0) as file:
        descriptor = file.fileno()
        started, written = time.perf_counter(), 0
        while written < size and time.perf_counter() - started < _LIMIT_S:
            written += os.write(descriptor, block.data)
            if written % _SYNC_BYTES == 0:
                os.fsync(descriptor)
        os.fsync(descriptor)
        write_s = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()

        def read_block(start: int) -> int:
            return 0 if time.perf_counter() - started > _LIMIT_S else len(os.pread(descriptor, _BLOCK_BYTES, start))

        with ThreadPoolExecutor(_READERS, "read") as pool:
            read = sum(pool.map(read_block, range(0, written, _BLOCK_BYTES)))
        read_s = time.perf_counter() - started
    return DiskSpeed(write_bytes_s=written / write_s, read_bytes_s=read / max(read_s, 1e-9), file_bytes=written)


def gpu_speed(number: int = 0) -> Gpu:
    """Rates of products of bfloat16 matrices and of copies in memory. Needs CUDA."""
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

    found = torch.cuda.get_device_properties(device)
    return Gpu(
        name=found.name,
        tflops=2 * _MATRIX**3 / best_seconds("product") / 1e12 / _MATMUL_SHARE,
        memory_gb_s=2 * left.nbytes / best_seconds("copy") / 1e9 / _COPY_SHARE,
        memory_gb=found.total_memory / 2**30,
    )
