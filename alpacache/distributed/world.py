"""The processes of one training run: one a GPU, started by torchrun, or a single one.

Every process computes its share of each global batch. Gradients, losses and requests to stop are summed, so that all
processes decide alike. Only the first one writes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alpacache.errors import AlpacacheError, LostProcessError, ProcessGroupError, UsageError
from alpacache.gpu.device import enter, own_device
from alpacache.torchrun import this_process

_TIMEOUT = timedelta(minutes=30)
"""Limit of a collective: the other processes wait while the first one writes a checkpoint."""
_OTHER_ENDED = re.compile("connection (was likely )?(closed|reset)|broken pipe|remote process exit", re.IGNORECASE)
"""Texts of gloo, NCCL and torch's store where the process at the other end is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    def local_batch_size(self, batch_size: int) -> int:
        """Samples of a global batch for each process. Raises `UsageError` where they cannot be equal."""
        if batch_size % self.size:
            raise UsageError(
                f"batch_size is {batch_size}, over {self.size} processes; expected a multiple of {self.size}."
            )
        return batch_size // self.size

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes (plain data), by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all processes, in place; may be captured."""
        if self.size > 1:
            dist.all_reduce(tensor)


@contextmanager
def join_world(device: str | None) -> Iterator[World]:
    """Join the other processes where torchrun has started several, and leave them at the end.

    Raises `UsageError` where there are fewer GPUs than processes, `LostProcessError` where another process has died,
    `ProcessGroupError` where they cannot talk to each other for another reason.
    """
    rank, size, mine = this_process().rank, this_process().world_size, own_device(device)
    enter(mine)
    world = World(rank=rank, size=size, device=mine)
    if size == 1:
        yield world
        return
    # Its functions have the default group as a default argument. Imported later, as torch._dynamo does, they would keep
    # the group, and with it gloo's threads, beyond its end; now and then these abort the interpreter's exit.
    import torch.distributed.nn.functional  # noqa: F401

    try:
        if mine.type == "cpu":
            dist.init_process_group("gloo", timeout=_TIMEOUT)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = True  # else sums would wait for the end of the step, which fills the GPU
            dist.init_process_group("nccl", timeout=_TIMEOUT, device_id=mine, pg_options=options)
        yield world
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        raise _explained(error, f"process {rank} of {size}") from error
    dist.destroy_process_group()  # not after an error: it would wait for processes that wait for this one


def _explained(error: RuntimeError, process: str) -> AlpacacheError:
    """The error that tells what a failure of the backend means."""
    cause = str(error).partition("\nException raised from")[0].strip()
    if _OTHER_ENDED.search(cause):
        return LostProcessError(f"{process}: another process of the run has ended ({cause}).")
    if "out of memory" in cause.lower():
        remedy = (
            "NCCL takes GPU memory of its own, beside what was planned: leave it some with a smaller --memory-budget "
            "or --micro-batch, and see what else is on this GPU."
        )
    elif "timed out" in cause.lower() or "timeout" in cause.lower():
        remedy = "Another process did not come that far in time: see what each of them said last, and its machine."
    else:
        remedy = "See what the other processes say, and the network between machines; NCCL_DEBUG=WARN tells more."
    return ProcessGroupError(
        f"{process}: talking to the other processes failed: {cause}\n{remedy} Checkpoints are intact; run again with "
        "--resume."
    )
