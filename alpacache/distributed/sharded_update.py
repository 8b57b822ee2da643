"""One update by all processes of a run: gradients are summed, and most parameters updated in parts, each by a process.

Of a parameter in parts a process gets its part of the summed gradient alone, updates that part of the weights, and the
parts are exchanged while others are updated. This moves as many bytes as summing whole gradients, but half of them
after the backward, and what is in parts is updated once instead of by every process. All other parameters are summed
and updated as a whole by all of them. `docs/decisions/0009-gradient-sum.md` has the numbers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alpacache.distributed.exchange import (
    TOGETHER_BYTES,
    Collectives,
    Copies,
    Transfers,
    even_part,
    gather,
    gather_up,
    send_up,
)
from alpacache.distributed.peer_memory import PeerMemory
from alpacache.distributed.world import World
from alpacache.gpu.capture import TwoStreams

_PART_MULTIPLE = 1024
"""Elements: of whole programs of adamw8's kernel, and of whole groups."""


class SharedUpdate:
    """Begins to sum gradients while the backward goes on, and to exchange weights while the optimizer does.

    With one process it does nothing, and nothing is in parts.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, memory: PeerMemory | None = None) -> None:
        """With `memory`, processes write into each other's, and parameters in parts are moved there."""
        self.world = world
        self.parts = _parts(parameters, world, Collectives if memory is None else Copies)
        """Name of a parameter -> which of its elements, flattened, this process updates; all, where it has no entry."""
        self.is_last = True
        """Whether the next backward is the step's last: until then gradients only accumulate."""
        self._parameters = dict(parameters)
        self._part_of: dict[Tensor, slice] = {parameters[name]: part for name, part in self.parts.items()}
        self._transfers: Transfers = (
            Collectives(world) if memory is None else Copies(list(self._part_of), memory, world)
        )
        self._summable: list[Tensor] = []
        """Parameters in parts whose gradients are whole."""
        self._summable_whole: list[Tensor] = []
        self._updated: list[Tensor] = []
        self._streams = TwoStreams(world.device)
        if world.size > 1:
            for parameter in parameters.values():
                parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def finish_sum(self) -> None:
        """All sums are there on the current stream."""
        if self.world.size > 1:
            send_up(self._summable, self._transfers.sum_parts)
            send_up(self._summable_whole, self._transfers.sum_whole)
            self._transfers.finish()

    def squared_norm(self) -> Tensor:
        """This process's share of the squared norm of the gradient, float32: over all processes they add up to it."""
        whole: list[Tensor] = []
        parts: list[Tensor] = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                continue
            if (part := self._part_of.get(parameter)) is None:
                whole.append(parameter.grad)
            else:
                parts.append(_flat(parameter.grad)[part])
        found = [self._squares(grads) / count for grads, count in ((whole, self.world.size), (parts, 1)) if grads]
        return torch.stack(found).sum()

    def _squares(self, grads: list[Tensor]) -> Tensor:
        halves = [grads[::2], grads[1::2]] if self.world.device.type == "cuda" and len(grads) > 1 else [grads]
        found = []
        with self._streams():
            for place, half in enumerate(halves):
                with self._streams.turn(place):
                    found.append(torch.stack(torch._foreach_norm(half, 2, torch.float32)).square().sum())
        return torch.stack(found).sum()

    def updated(self, name: str) -> None:
        """This process has enqueued its update of a parameter on the current stream: exchange it."""
        if name in self.parts:
            transfers = self._transfers
            gather_up(self._updated, self._parameters[name], transfers.exchange, transfers.exchanged_bytes)

    def finish_update(self) -> None:
        """All weights are there on the current stream."""
        if self.world.size > 1:
            send_up(self._updated, self._transfers.exchange)
            self._transfers.finish()

    def complete(self, state: Mapping[str, Tensor]) -> None:
        """Exchange an optimizer's state, `<key>.<parameter name>`, of which each process has only kept its part up.

        Every process has to call it.
        """
        for name, tensor in state.items():
            parameter = name.partition(".")[2]
            if parameter not in self.parts or not tensor.ndim:
                continue
            whole = tensor.shape == self._parameters[parameter].shape
            for row in [tensor] if whole else tensor:  # of what groups of elements have there are several rows
                gather(_flat(row), self.world)

    def _take(self, parameter: Tensor) -> None:
        if not self.is_last or parameter.grad is None:
            return
        if parameter in self._part_of:
            gather_up(self._summable, parameter, self._transfers.sum_parts, TOGETHER_BYTES)
        else:
            gather_up(self._summable_whole, parameter, self._transfers.sum_whole, TOGETHER_BYTES)


def _parts(
    parameters: Mapping[str, nn.Parameter], world: World, transfers: type[Collectives | Copies]
) -> dict[str, slice]:
    parts: dict[str, slice] = {}
    seen = in_parts = 0
    for name, parameter in parameters.items():
        count = parameter.numel()
        seen += count
        even = count % (_PART_MULTIPLE * world.size) == 0 and count >= transfers.least_part
        if world.size > 1 and even and in_parts + count <= transfers.in_parts * seen:
            parts[name] = even_part(count, world)
            in_parts += count
    return parts


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1)
