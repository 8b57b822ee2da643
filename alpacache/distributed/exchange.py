"""The two ways in which gradients and weights pass between processes: collective operations, and copies by the GPUs.

Both sum gradients to the same bits, and both enqueue on streams of their own, which `finish` waits for.
`docs/decisions/0009-gradient-sum.md` compares their speed: on two H200, 0.954 of ideal scaling by copies, 0.849 by
collectives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alpacache.distributed.peer_memory import PeerMemory
from alpacache.distributed.world import World

# Torch has renamed both; a torch built without torch.distributed has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))

BUCKET_BYTES = 2**26
"""Bytes transferred by one operation: half a layer of the released expert."""
_SLOTS = 2
"""Receive slots for each sender: while the gradients in one are added, the next arrive in the other."""


class CollectiveExchange:
    """Operations of torch.distributed, on any number of machines.

    All tensors of one call have the same dtype, and all processes make the same calls in the same order.
    """

    sharded_fraction = 2 / 3
    """Largest fraction of all elements that should be sharded: gathering all would take longer than the update it hides
    behind."""
    least_sharded = 0
    """Elements of the smallest parameter worth sharding."""
    gather_bucket_bytes = BUCKET_BYTES
    """Bytes of weights that are best gathered together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._underway: list[Any] = []

    def reduce_scatter(self, parameters: Sequence[Tensor]) -> None:
        """Begin to sum gradients; each process gets its shard of every sum."""
        with self._coalesced():
            for parameter in parameters:
                flat = _flat_gradient(parameter)
                _reduce_scatter(flat[shard_slice(len(flat), self._world)], flat)

    def all_reduce(self, parameters: Sequence[Tensor]) -> None:
        """Begin to sum gradients; each process gets all of every sum."""
        with self._coalesced():
            for parameter in parameters:
                dist.all_reduce(_flat_gradient(parameter))

    def all_gather(self, parameters: Sequence[Tensor]) -> None:
        """Begin to send this process's shards of the weights, whose update is enqueued, and to receive the others'."""
        with self._coalesced():
            for parameter in parameters:
                gather_shards(parameter.detach().view(-1), self._world)

    def finish(self) -> None:
        """Make the current stream wait for all that was begun."""
        for work in self._underway:
            work.wait()
        self._underway = []

    @contextmanager
    def _coalesced(self) -> Iterator[None]:
        with dist._coalescing_manager(async_ops=True) as work:  # type: ignore[attr-defined]  # FSDP and DTensor use it
            yield
        self._underway.append(work)


class CopyExchange(CollectiveExchange):
    """Each process writes into the others' memory: shards of gradients into receive slots, updated weights in place.

    The update needs no barrier but the one at its end: it begins when the norm of all gradients is known, and by then
    no process reads weights any more.
    """

    sharded_fraction, least_sharded, gather_bucket_bytes = 1.0, 2**16, 0

    def __init__(self, parameters: Sequence[Tensor], memory: PeerMemory, world: World) -> None:
        """`parameters`: the sharded ones. They keep their values and move to memory that other processes can write."""
        super().__init__(world)
        self._memory = memory
        self._others = [(world.rank + distance) % world.size for distance in range(1, world.size)]
        self._weights = _move_to_peer_memory(parameters, memory, world)
        largest = max((parameter.nbytes for parameter in parameters), default=0)
        slot_bytes = (BUCKET_BYTES + largest) // world.size
        buffers = memory.empty(_SLOTS * (world.size - 1) * slot_bytes, torch.uint8)
        self._slots = [buffer.view(_SLOTS, world.size - 1, slot_bytes) for buffer in buffers]
        """Buffers by rank, `[slot, sender, bytes]`; senders are counted on from the receiver."""
        cuda = world.device.type == "cuda"
        # Of high priority: behind the step's kernels, which fill the GPU, sums would only be added at its end.
        self._copying, self._adding = (
            torch.cuda.Stream(world.device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._buckets_sent = 0

    def reduce_scatter(self, parameters: Sequence[Tensor]) -> None:
        grads = [_flat_gradient(parameter) for parameter in parameters]
        slot = self._buckets_sent % _SLOTS
        self._buckets_sent += 1
        self._follow_current_stream()
        with torch.cuda.stream(self._copying):
            for rank in self._others:
                shards = [grad[shard_slice(len(grad), self._world, rank)] for grad in grads]
                sender = (self._world.rank - rank) % self._world.size - 1
                for shard, there in zip(shards, _views_like(shards, self._slots[rank][slot, sender]), strict=True):
                    there.copy_(shard)
            # The bucket before is added by then, so behind the barrier all may write to its slot.
            _follow(self._copying, self._adding)
            self._memory.barrier()
        _follow(self._adding, self._copying)
        with torch.cuda.stream(self._adding):
            own = [grad[shard_slice(len(grad), self._world)] for grad in grads]
            for sender in range(self._world.size - 1):
                torch._foreach_add_(own, _views_like(own, self._slots[self._world.rank][slot, sender]))

    def all_gather(self, parameters: Sequence[Tensor]) -> None:
        self._follow_current_stream()
        with torch.cuda.stream(self._copying):
            for parameter in parameters:
                weights = self._weights[parameter]
                shard = shard_slice(parameter.numel(), self._world)
                for rank in self._others:
                    weights[rank][shard].copy_(weights[self._world.rank][shard])

    def finish(self) -> None:
        super().finish()
        self._follow_current_stream()
        _follow(self._copying, self._adding)
        with torch.cuda.stream(self._copying):
            self._memory.barrier()
        if self._copying is not None:
            torch.cuda.current_stream().wait_stream(self._copying)

    def _follow_current_stream(self) -> None:
        """Put both streams behind the current one; otherwise neither would be part of a graph being captured."""
        if self._copying is not None:
            current = torch.cuda.current_stream()
            _follow(self._copying, current)
            _follow(self._adding, current)


class Bucket:
    """Tensors of one dtype that wait to be sent together: alone, most are too small for the link's full rate."""

    def __init__(self, send: Callable[[list[Tensor]], None], least_bytes: int) -> None:
        self._send, self._least_bytes = send, least_bytes
        self._waiting: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        """Add a tensor, and send all as soon as they are enough."""
        if self._waiting and self._waiting[0].dtype != tensor.dtype:
            self.flush()
        self._waiting.append(tensor)
        if sum(waiting.nbytes for waiting in self._waiting) >= self._least_bytes:
            self.flush()

    def flush(self) -> None:
        """Send the tensors that wait, if there are any."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._send(waiting)


def gather_shards(flat: Tensor, world: World) -> None:
    """Receive the other processes' shards of a flat tensor whose own shard is there."""
    _all_gather(flat, flat[shard_slice(len(flat), world)])


def shard_slice(count: int, world: World, rank: int | None = None) -> slice:
    """The elements, of `count`, that belong to a process, by default this one."""
    each, rank = count // world.size, world.rank if rank is None else rank
    return slice(rank * each, (rank + 1) * each)


@torch.no_grad()
def _move_to_peer_memory(
    parameters: Sequence[Tensor], memory: PeerMemory, world: World
) -> Mapping[Tensor, list[Tensor]]:
    """Every process's copy of each parameter, flat, by rank; this process's is the parameter's storage from now on."""
    copies = {}
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        same = [parameter for parameter in parameters if parameter.dtype == dtype]
        sizes = [parameter.numel() for parameter in same]
        by_rank = [torch.split(buffer, sizes) for buffer in memory.empty(sum(sizes), dtype)]
        for parameter, *flat in zip(same, *by_rank, strict=True):
            copies[parameter] = flat
            parameter.data = flat[world.rank].view(parameter.shape).copy_(parameter)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # return the freed blocks: no later allocation has their sizes
    return copies


def _views_like(tensors: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
    """Views of a byte buffer with these tensors' dtypes and sizes, one after the other."""
    sizes = [tensor.nbytes for tensor in tensors]
    parts = torch.split(buffer[: sum(sizes)], sizes)
    return [part.view(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def _follow(stream: torch.cuda.Stream | None, before: torch.cuda.Stream | None) -> None:
    """Let a stream wait for all that is enqueued on another; on a CPU there are none."""
    if stream is not None and before is not None:
        stream.wait_stream(before)


def _flat_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.view(-1)
