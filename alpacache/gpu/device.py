"""The device that a stage runs on, and settings of the process that go with it."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from alpacache.errors import UsageError
from alpacache.torchrun import this_process

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of `mallopt`, from glibc's `malloc.h`."""


def resolve_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one. Raises `UsageError` for a device that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is unknown; expected cpu, cuda or cuda:N.") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"device {name!r} is not there: PyTorch sees {count} CUDA devices; choose another or cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; expected cpu, cuda or cuda:N.")
    return device


def enter(device: torch.device) -> None:
    """Make a GPU that was named by its number the current one, because Triton launches on no other."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def has_kernels(device: torch.device) -> bool:
    """Tell whether the Triton kernels can run there; elsewhere their references in PyTorch do."""
    return device.type == "cuda" and find_spec("triton") is not None


def limit_torch_to_one_thread() -> None:
    """Let tensor operations of this thread, one of a dozen that read beside a GPU, run without helper threads.

    A team of helpers for each reading thread would outnumber the cores. Where the CPU does the computing, wrap this in
    `restored_torch_threads`: matrix products of the whole process would be left with one thread.
    """
    torch.set_num_threads(1)


@contextmanager
def restored_torch_threads() -> Iterator[None]:
    """Restore PyTorch's number of threads at the end, whatever threads that began meanwhile have set."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed pictures for the next ones, where it has `mallopt`.

    By default it returns large blocks to the system, which clears every page of them again for each picture. Reading is
    4 to 10 % faster so on two cores (docs/decisions/0012).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            mallopt(parameter, value)


def own_device(device: str | None) -> torch.device:
    """The device asked for; of several processes each has the GPU of its number on this machine.

    Raises `UsageError` where there are fewer GPUs than processes.
    """
    mine, process = resolve_device(device), this_process()
    alone = mine.type == "cpu" or process.world_size == 1
    return mine if alone else resolve_device(f"cuda:{process.local_rank}")


def cap_memory(budget_bytes: int | None, device: torch.device, *, beside_bytes: int = 0) -> int:
    """Hold the allocator to a budget and return what it may take: no more than is free, all of it without a budget.

    `beside_bytes`: part of the budget that is taken already, and not by the allocator.
    """
    if not (os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")):
        # Lets any tensor reuse any freed page: 1 GiB less is reserved at full size (measured on an H100).
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    if budget_bytes is None:
        return free
    cap = budget_bytes - beside_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device.index or 0)
    return min(cap, free)
