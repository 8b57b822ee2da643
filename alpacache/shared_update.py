"""One update by all processes of a run: gradients are summed, and most parameters updated in parts, each by a process.

Of two thirds of the parameters a process gets its part of the summed gradient alone (reduce-scatter), updates that part
of the weights, and the parts are exchanged (all-gather) while others are updated. This moves as many bytes as summing
whole gradients (all-reduce), but half of them after the backward, whose kernels any transfer slows down, and what is in
parts is updated once instead of by every process. The last third is summed and updated as a whole by all of them: in
that time the exchange ends. `docs/decisions/0009-gradient-sum.md` has the numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alpacache.two_streams import TwoStreams
from alpacache.world import World

_IN_PARTS = 2 / 3
"""Of all elements."""
_PART_MULTIPLE = 1024
"""Elements: of whole programs of adamw8's kernel, and of whole groups."""
_TOGETHER_BYTES = 2**26
"""Of what is transferred by one operation: half a layer of the released expert."""

# Torch has renamed both; a torch without processes has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class SharedUpdate:
    """Begins to sum gradients while the backward goes on, and to exchange weights while the optimizer does.

    With one process it does nothing, and nothing is in parts.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        self.world = world
        self.parts = _parts(parameters, world)
        """Name of a parameter -> which of its elements, flattened, this process updates; all, where it has no entry."""
        self.is_last = True
        """Whether the next backward is the step's last: until then gradients only accumulate."""
        self._parameters = dict(parameters)
        self._part_of: dict[Tensor, slice] = {parameters[name]: part for name, part in self.parts.items()}
        self._summable: list[Tensor] = []
        """Their gradients are whole."""
        self._updated: list[Tensor] = []
        self._underway: list[Any] = []
        self._streams = TwoStreams(world.device)
        if world.size > 1:
            for parameter in parameters.values():
                parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def finish_sum(self) -> None:
        """All sums are there on the current stream."""
        self._sum()
        self._wait()

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
        """This process has enqueued its update of a parameter: exchange it, together with others."""
        if name in self.parts:
            _gather_up(self._updated, self._parameters[name], self._exchange)

    def finish_update(self) -> None:
        """All weights are there on the current stream."""
        self._exchange()
        self._wait()

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
                flat = _flat(row)
                _all_gather(flat, flat[_even_part(len(flat), self.world)])

    def _take(self, parameter: Tensor) -> None:
        if self.is_last and parameter.grad is not None:
            _gather_up(self._summable, parameter, self._sum)

    def _sum(self) -> None:
        parts = [parameter for parameter in self._summable if parameter in self._part_of]
        whole = [parameter for parameter in self._summable if parameter not in self._part_of]
        self._summable.clear()
        if parts:
            with self._together():
                for parameter in parts:
                    flat = _flat(_gradient(parameter))
                    _reduce_scatter(flat[self._part_of[parameter]], flat)
        if whole:
            with self._together():
                for parameter in whole:
                    dist.all_reduce(_gradient(parameter))

    def _exchange(self) -> None:
        if not self._updated:
            return
        with self._together():
            for parameter in self._updated:
                flat = _flat(parameter.detach())
                _all_gather(flat, flat[self._part_of[parameter]])
        self._updated.clear()

    @contextmanager
    def _together(self) -> Iterator[None]:
        with dist._coalescing_manager(async_ops=True) as work:  # type: ignore[attr-defined]  # of FSDP and DTensor
            yield
        self._underway.append(work)

    def _wait(self) -> None:
        for work in self._underway:
            work.wait()
        self._underway = []


def _parts(parameters: Mapping[str, nn.Parameter], world: World) -> dict[str, slice]:
    parts: dict[str, slice] = {}
    seen = in_parts = 0
    for name, parameter in parameters.items():
        count = parameter.numel()
        seen += count
        if world.size > 1 and count % (_PART_MULTIPLE * world.size) == 0 and in_parts + count <= _IN_PARTS * seen:
            parts[name] = _even_part(count, world)
            in_parts += count
    return parts


def _even_part(count: int, world: World) -> slice:
    each = count // world.size
    return slice(world.rank * each, (world.rank + 1) * each)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _gather_up(waiting: list[Tensor], parameter: Tensor, send: Callable[[], None]) -> None:
    """Add one to those that wait, and send them when they are enough: alone, most are too small for the link's rate.

    Only what has one dtype can be sent together.
    """
    if waiting and waiting[0].dtype != parameter.dtype:
        send()
    waiting.append(parameter)
    if sum(tensor.nbytes for tensor in waiting) >= _TOGETHER_BYTES:
        send()
