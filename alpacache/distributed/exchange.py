"""The two ways in which gradients and weights pass between processes: collective operations, and copies by the GPUs.

Both sum gradients to the same bits, and both enqueue on streams of their own, whose end `finish` waits for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from alpacache.distributed.peer_memory import PeerMemory
from alpacache.distributed.world import World

# Torch has renamed both; a torch without processes has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))

TOGETHER_BYTES = 2**26
"""Of what is transferred by one operation: half a layer of the released expert."""
_PLACES = 2
"""Pieces of a gradient that may be underway to a process: while one is added, the next arrives."""


class Transfers(Protocol):
    """All tensors of a call have one dtype, and all processes make the same calls in the same order."""

    in_parts: float
    """The part of all elements that should be summed, updated and exchanged in parts."""
    least_part: int
    """Elements of the smallest parameter that is worth it."""
    exchanged_bytes: int
    """Of weights that are best exchanged together."""

    def sum_parts(self, parameters: Sequence[Tensor]) -> None:
        """Begin to sum gradients; a process gets its part of each."""
        ...

    def sum_whole(self, parameters: Sequence[Tensor]) -> None:
        """Begin to sum gradients."""
        ...

    def exchange(self, parameters: Sequence[Tensor]) -> None:
        """Begin to pass on this process's parts of the weights, whose update is enqueued, and get the others'."""
        ...

    def finish(self) -> None:
        """All that was begun is there, on the current stream."""
        ...


class Collectives:
    """Operations of torch.distributed, on any number of machines.

    With everything in parts the exchange would take longer than what it hides behind: so a third is not.
    """

    in_parts, least_part, exchanged_bytes = 2 / 3, 0, TOGETHER_BYTES

    def __init__(self, world: World) -> None:
        self._world = world
        self._underway: list[Any] = []

    def sum_parts(self, parameters: Sequence[Tensor]) -> None:
        with self._together():
            for parameter in parameters:
                flat = _gradient(parameter)
                _reduce_scatter(flat[even_part(len(flat), self._world)], flat)

    def sum_whole(self, parameters: Sequence[Tensor]) -> None:
        with self._together():
            for parameter in parameters:
                dist.all_reduce(_gradient(parameter))

    def exchange(self, parameters: Sequence[Tensor]) -> None:
        with self._together():
            for parameter in parameters:
                gather(parameter.detach().view(-1), self._world)

    def finish(self) -> None:
        for work in self._underway:
            work.wait()
        self._underway = []

    @contextmanager
    def _together(self) -> Iterator[None]:
        with dist._coalescing_manager(async_ops=True) as work:  # type: ignore[attr-defined]  # of FSDP and DTensor
            yield
        self._underway.append(work)


class Copies:
    """Each process writes into the others' memory: parts of gradients into places there, and updated weights at once.

    Nothing of an update needs a barrier but its end: it begins when the norm of all gradients is known, so no process
    reads weights any more.
    """

    in_parts, least_part, exchanged_bytes = 1.0, 2**16, 0

    def __init__(self, parameters: Sequence[Tensor], memory: PeerMemory, world: World) -> None:
        """`parameters`: those in parts. They keep their values and get memory that other processes can write to."""
        self._memory, self._world = memory, world
        self._whole = Collectives(world)
        self._others = [(world.rank + distance) % world.size for distance in range(1, world.size)]
        self._weights = _moved(parameters, memory, world)
        largest = max((parameter.nbytes for parameter in parameters), default=0)
        room = (TOGETHER_BYTES + largest) // world.size
        places = memory.empty(_PLACES * (world.size - 1) * room, torch.uint8)
        self._places = [one.view(_PLACES, world.size - 1, room) for one in places]
        """By rank `[place, sender, bytes]`; the sender counted on from the receiver."""
        cuda = world.device.type == "cuda"
        # Before the step's kernels, which fill the GPU: what is behind would be added when they have ended.
        self._copying, self._adding = (
            torch.cuda.Stream(world.device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._pieces = 0

    def sum_parts(self, parameters: Sequence[Tensor]) -> None:
        grads = [_gradient(parameter) for parameter in parameters]
        place = self._pieces % _PLACES
        self._pieces += 1
        self._begin()
        with torch.cuda.stream(self._copying):
            for rank in self._others:
                parts = [grad[even_part(len(grad), self._world, rank)] for grad in grads]
                sender = (self._world.rank - rank) % self._world.size - 1
                for part, there in zip(parts, _laid_out(parts, self._places[rank][place, sender]), strict=True):
                    there.copy_(part)
            _follow(self._copying, self._adding)  # the piece before is added, so all may write to its place behind this
            self._memory.barrier()
        _follow(self._adding, self._copying)
        with torch.cuda.stream(self._adding):
            own = [grad[even_part(len(grad), self._world)] for grad in grads]
            for sender in range(self._world.size - 1):
                torch._foreach_add_(own, _laid_out(own, self._places[self._world.rank][place, sender]))

    def sum_whole(self, parameters: Sequence[Tensor]) -> None:
        self._whole.sum_whole(parameters)

    def exchange(self, parameters: Sequence[Tensor]) -> None:
        self._begin()
        with torch.cuda.stream(self._copying):
            for parameter in parameters:
                weights = self._weights[parameter]
                part = even_part(parameter.numel(), self._world)
                for rank in self._others:
                    weights[rank][part].copy_(weights[self._world.rank][part])

    def finish(self) -> None:
        self._whole.finish()
        self._begin()
        _follow(self._copying, self._adding)
        with torch.cuda.stream(self._copying):
            self._memory.barrier()
        if self._copying is not None:
            torch.cuda.current_stream().wait_stream(self._copying)

    def _begin(self) -> None:
        """Both streams after the current one, without which neither would be part of what is being captured."""
        if self._copying is not None:
            current = torch.cuda.current_stream()
            _follow(self._copying, current)
            _follow(self._adding, current)


def gather(flat: Tensor, world: World) -> None:
    """Get the other processes' parts of a flat tensor whose own part is there."""
    _all_gather(flat, flat[even_part(len(flat), world)])


def even_part(count: int, world: World, rank: int | None = None) -> slice:
    """Which of so many elements are a process's, by default this one's."""
    each, rank = count // world.size, world.rank if rank is None else rank
    return slice(rank * each, (rank + 1) * each)


def gather_up(waiting: list[Tensor], parameter: Tensor, send: Callable[[list[Tensor]], None], least_bytes: int) -> None:
    """Add one to those that wait, and send them when they are enough: alone, most are too small for the link's rate.

    Only what has one dtype can be sent together.
    """
    if waiting and waiting[0].dtype != parameter.dtype:
        send_up(waiting, send)
    waiting.append(parameter)
    if sum(tensor.nbytes for tensor in waiting) >= least_bytes:
        send_up(waiting, send)


def send_up(waiting: list[Tensor], send: Callable[[list[Tensor]], None]) -> None:
    """Send those that wait, if there are any."""
    if waiting:
        send(list(waiting))
    waiting.clear()


@torch.no_grad()
def _moved(parameters: Sequence[Tensor], memory: PeerMemory, world: World) -> Mapping[Tensor, list[Tensor]]:
    """Every process's copy of each parameter, flat, by rank; this process's is the parameter from now on."""
    found = {}
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        same = [parameter for parameter in parameters if parameter.dtype == dtype]
        memories = memory.empty(sum(parameter.numel() for parameter in same), dtype)
        end = 0
        for parameter in same:
            start, end = end, end + parameter.numel()
            found[parameter] = [one[start:end] for one in memories]
            mine = found[parameter][world.rank].view(parameter.shape)
            parameter.data = mine.copy_(parameter)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # what they left is of sizes that nothing else has
    return found


def _laid_out(parts: Sequence[Tensor], room: Tensor) -> list[Tensor]:
    """Tensors like these, one after the other in bytes."""
    found, end = [], 0
    for part in parts:
        start, end = end, end + part.nbytes
        found.append(room[start:end].view(part.dtype))
    return found


def _follow(stream: torch.cuda.Stream | None, before: torch.cuda.Stream | None) -> None:
    """Let a stream begin what comes next after all that is enqueued on another; on a CPU there are none."""
    if stream is not None and before is not None:
        stream.wait_stream(before)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.view(-1)
