"""Memory on every GPU of a machine that all processes of a run can write to, through torch's symmetric memory.

The GPUs' copy engines then move data between them at the rate of the link, and the step's kernels keep all
multiprocessors.
"""

import os
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alpacache.distributed.world import World
from alpacache.torchrun import this_process


class PeerMemory:
    """Buffers on all GPUs; all processes make the same calls in the same order."""

    def __init__(self, world: World) -> None:
        # Copies need no multicast, and where it cannot be set up, allocation would fail.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._module: Any = import_module("torch.distributed._symmetric_memory")
        self._world = world
        self._handle: Any = None
        self.beside_bytes = 0
        """Bytes of this process's allocations here that torch's allocator does not count."""
        self.empty(1, torch.uint8)

    def empty(self, count: int, dtype: torch.dtype) -> list[Tensor]:
        """A `[count]` buffer on each process's device, by rank; this process may read and write all of them."""
        device = self._world.device
        before = torch.cuda.memory_reserved(device)
        mine = self._module.empty(count, dtype=dtype, device=device)
        self.beside_bytes += max(0, mine.nbytes - (torch.cuda.memory_reserved(device) - before))
        handle = self._module.rendezvous(mine, dist.group.WORLD)
        self._handle = self._handle or handle
        return [
            mine if rank == self._world.rank else handle.get_buffer(rank, (count,), dtype)
            for rank in range(self._world.size)
        ]

    def barrier(self) -> None:
        """Make the current stream wait until all processes' streams have come here; may be captured."""
        self._handle.barrier(channel=0)


def peer_memory(world: World) -> PeerMemory | None:
    """Peer memory, or None where GPUs cannot write to each other: on a CPU, on several machines, or by the driver.

    `NCCL_P2P_DISABLE=1` turns it off, as it does for NCCL. All processes get the same answer.
    """
    if world.size == 1 or world.device.type != "cuda":
        return None
    here = this_process().local_world_size
    others = [number for number in range(here) if number != world.device.index]
    possible = (
        here == world.size <= torch.cuda.device_count()
        and os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
        and all(torch.cuda.can_device_access_peer(world.device, number) for number in others)
    )
    if not all(world.all_gather(possible)):
        return None
    memory = None
    with suppress(ImportError, AttributeError, RuntimeError):  # torch lacks it, or the driver does not share memory
        memory = PeerMemory(world)
    return memory if all(world.all_gather(memory is not None)) else None
