"""Optimizer state in page-locked RAM, which visits the GPU in groups, each way on a stream of its own.

The state comes in groups of at most the largest parameter's size, through a few places that they fill in turn: while
one is updated, one leaves and one arrives.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alpacache.gpu.host_memory import page_aligned, page_lock, page_rounded, page_unlock
from alpacache.planning.workload import STATE_PLACES
from alpacache.training.optimizers import StepOptimizer, copy_into

_ALIGNED = 256
"""Bytes that every tensor in a group begins at a multiple of."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")

Make = Callable[[Mapping[str, nn.Parameter]], StepOptimizer]
"""Makes the optimizer of some parameters."""


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter belongs to, by its name in checkpoints."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def spread(layers: int, count: int) -> list[int]:
    """The `count` of so many layers whose state is streamed: evenly spread, the last one among them."""
    return [layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateGroup:
    """Parameters of one layer whose state travels together."""

    layer: int
    parameters: Mapping[str, nn.Parameter]
    optimizer: StepOptimizer
    """Works on the place that the group has on the GPU."""
    host: Tensor
    """The state in RAM, bytes."""
    place: Tensor
    """Offset on the GPU while it is there, bytes; other groups use the same place at other times."""
    tensors: Mapping[str, Tensor]
    """Views of `host`, by the optimizer's names."""


class StateInRam:
    """State of the parameters of some layers; a step updates each group once, in their order."""

    def __init__(self, make: Make, parameters: Mapping[str, nn.Parameter], *, last_layer_first: bool = False) -> None:
        """`parameters` are of layers; groups come by layer from the first one on, or from the last one back."""
        self._device = next(iter(parameters.values())).device
        self._cuda = self._device.type == "cuda"
        self.groups = self._make_groups(make, _grouped(parameters, last_layer_first=last_layer_first))
        if self._cuda:
            self._into, self._out = (torch.cuda.Stream(self._device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._arrived: dict[int, torch.cuda.Event] = {}

    def begin(self) -> None:
        """Begin a step: copies wait for what is enqueued, and what was fetched before has arrived."""
        self._arrived = {}
        if self._cuda:
            current = torch.cuda.current_stream(self._device)
            self._into.wait_stream(current)
            self._out.wait_stream(current)

    def fetch(self, number: int) -> None:
        """Enqueue a group's copy to its place, behind the copy out of whichever group is there."""
        group = self.groups[number]
        if not self._cuda:
            group.place.copy_(group.host)
            return
        self._into.wait_stream(self._out)
        with torch.cuda.stream(self._into):
            group.place.copy_(group.host, non_blocking=True)
            self._arrived[number] = self._into.record_event()

    def update(self, number: int, apply: Callable[[StepOptimizer], None], *, then: int | None) -> None:
        """Enqueue a group's update for when it has arrived, and its way out; then the group `then`, if any, comes.

        The group's gradients are given up.
        """
        group = self.groups[number]
        if (arrived := self._arrived.get(number)) is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        apply(group.optimizer)
        for parameter in group.parameters.values():
            parameter.grad = None
        if self._cuda:
            self._out.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._out):
                group.host.copy_(group.place, non_blocking=True)
        else:
            group.host.copy_(group.place)
        if then is not None:
            self.fetch(then)

    def end(self) -> None:
        """End a step: the current stream waits for all copies."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._into)
            torch.cuda.current_stream(self._device).wait_stream(self._out)

    def fill(self) -> None:
        """Bring the first groups in."""
        for group in self.groups[:STATE_PLACES]:
            group.place.copy_(group.host)

    def tensors(self) -> dict[str, Tensor]:
        """The state, in RAM but for the number of steps; valid when all copies have ended."""
        tensors: dict[str, Tensor] = {}
        for group in self.groups:
            tensors.update(group.optimizer.tensors())
            tensors.update(group.tensors)
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state into the live one when all copies have ended.

        Raises `DataError`, with nothing changed, if it does not fit.
        """
        copy_into(self.tensors(), tensors)
        for group in self.groups:  # the number of steps, which all have under one name
            for name, live in group.optimizer.tensors().items():
                if name not in group.tensors:
                    live.copy_(tensors[name])

    def _make_groups(self, make: Make, grouped: Iterable[tuple[int, Mapping[str, nn.Parameter]]]) -> list[StateGroup]:
        made = []
        for layer, parameters in grouped:
            optimizer = make(parameters)
            arrays = {name: tensor for name, tensor in optimizer.tensors().items() if tensor.ndim}
            host = self._in_ram(sum(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in arrays.values()))
            views = _views(host, arrays)
            for name, tensor in arrays.items():
                views[name].copy_(tensor)
                tensor.set_(tensor.new_empty(0))  # type: ignore[call-overload]  # its memory is free for the next group
            made.append((layer, parameters, optimizer, arrays, host, views))
        size = max(len(host) for *_, host, _ in made)
        places = torch.empty(min(STATE_PLACES, len(made)), size, dtype=torch.uint8, device=self._device)
        groups = []
        for number, (layer, parameters, optimizer, arrays, host, views) in enumerate(made):
            place = places[number % STATE_PLACES, : len(host)]
            there = _views(place, views)
            for name, tensor in arrays.items():
                tensor.set_(there[name])  # type: ignore[call-overload]
            group = StateGroup(
                layer=layer, parameters=parameters, optimizer=optimizer, host=host, place=place, tensors=views
            )
            groups.append(group)
        return groups

    def _in_ram(self, size_bytes: int) -> Tensor:
        """Bytes in RAM, page-locked where there is a GPU, as long as this state lives."""
        memory = page_aligned(page_rounded(size_bytes))
        if self._cuda:
            page_lock(memory)
            weakref.finalize(self, page_unlock, memory).atexit = False
        return torch.from_numpy(memory)[:size_bytes]


def _grouped(
    parameters: Mapping[str, nn.Parameter], *, last_layer_first: bool
) -> list[tuple[int, dict[str, nn.Parameter]]]:
    """Layer and parameters of each group, in the order of layers; none has more elements than the largest parameter."""
    most = max(parameter.numel() for parameter in parameters.values())
    groups: list[tuple[int, dict[str, nn.Parameter]]] = []
    room = 0
    for layer, count, name in sorted((layer_of(name) or 0, each.numel(), name) for name, each in parameters.items()):
        if not groups or groups[-1][0] != layer or count > room:
            groups.append((layer, {}))
            room = most
        groups[-1][1][name] = parameters[name]
        room -= count
    return groups[::-1] if last_layer_first else groups


def _views(memory: Tensor, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like `arrays`, one after the other in these bytes."""
    views, at = {}, 0
    for name, tensor in arrays.items():
        views[name] = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        at += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return views
