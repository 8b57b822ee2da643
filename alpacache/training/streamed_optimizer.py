"""Optimizer state that lies in page-locked RAM and visits the GPU once a step, layer by layer.

A step touches the state once, so a bus has the length of a step to bring it in and take it out again. Clipping wants
the norm of all gradients first; so the update of a layer waits until just before its forward in the next step, and the
states of later layers arrive and those of earlier ones leave meanwhile, each way on a stream of its own. Every number
is what it would be with the state on the GPU: the same kernels in the same order of steps.

The state comes in groups of at most the largest parameter's size, through a few places that they fill in turn. While
the backward runs, the places hold the first groups already.
"""

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alpacache.gpu.host_memory import page_aligned, page_lock, page_rounded, page_unlock
from alpacache.planning.workload import STATE_PLACES
from alpacache.training.optimizers import StepOptimizer, Updated, copy_into, ignore_name

_ALIGNED = 256
"""Bytes that every tensor in a group begins at a multiple of."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter belongs to, by its name in checkpoints."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def spread(layers: int, count: int) -> list[int]:
    """The `count` of so many layers whose state is streamed: evenly spread, the last one among them."""
    return [layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
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


class StreamedOptimizer:
    """An optimizer of which some layers' state is in RAM.

    `step` updates what stays on the GPU and notes the scalars. The rest is updated by `before_layer`, between `begin`
    and `end` of the next step, or by `settle`. Until then its gradients stay where they are.
    """

    def __init__(
        self,
        make: Callable[[Mapping[str, nn.Parameter]], StepOptimizer],
        parameters: Mapping[str, nn.Parameter],
        layers: Sequence[int],
        *,
        keep_gradients: bool,
    ) -> None:
        """`make` makes the optimizer of some of the parameters, `layers` are those whose state is in RAM.

        `keep_gradients`: move their gradients to memory of their own, as a captured graph needs that finds those of the
        step before where it will put its own. Else a gradient's memory is free again from its update on.
        """
        streamed = {name: parameter for name, parameter in parameters.items() if layer_of(name) in layers}
        if not streamed:
            raise ValueError(f"layers {list(layers)} have no trained parameter.")
        self.waiting = frozenset(streamed)
        """Names of the parameters that are updated in the course of the next step."""
        self._device = next(iter(streamed.values())).device
        self._cuda = self._device.type == "cuda"
        resident = {name: parameter for name, parameter in parameters.items() if name not in streamed}
        self._resident = make(resident) if resident else None
        self._groups = self._make_groups(make, streamed)
        if self._cuda:
            self._into, self._out = (torch.cuda.Stream(self._device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._scalars: tuple[Tensor, Tensor, Tensor] | None = None
        """lr, scale and skip of the updates that wait; None before the first step."""
        self._waits = self._open = False
        self._next = 0
        """Group that is updated next."""
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._kept: dict[nn.Parameter, Tensor] = {}
        """Gradients in memory of their own, of the parameters that get one."""
        self._homes: dict[nn.Parameter, Tensor] = {}
        """Memory for those gradients, taken in one piece before activations are scattered around it."""
        if keep_gradients:
            self._homes = {parameter: torch.empty_like(parameter) for parameter in streamed.values()}
            for parameter in self._homes:
                parameter.register_post_accumulate_grad_hook(self._keep)  # type: ignore[no-untyped-call]
        self._fill()

    def begin(self) -> None:
        """Begin a step: its forward may be enqueued, with `before_layer` before each layer."""
        for parameter, gradient in self._kept.items():
            parameter.grad = gradient
        self._arrived, self._next, self._open = {}, 0, True
        if self._cuda:
            current = torch.cuda.current_stream(self._device)
            self._into.wait_stream(current)
            self._out.wait_stream(current)

    def before_layer(self, layer: int) -> None:
        """Enqueue what updates up to this layer are still to be made; outside of a step there are none."""
        while self._open and self._next < len(self._groups) and self._groups[self._next].layer <= layer:
            self._update(self._next)
            self._next += 1

    def end(self) -> None:
        """End a step: the current stream waits for all copies."""
        self.before_layer(self._groups[-1].layer)
        self._open = False
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._into)
            torch.cuda.current_stream(self._device).wait_stream(self._out)

    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor, updated: Updated = ignore_name) -> None:
        """Apply a step to what stays on the GPU, as `StepOptimizer` has it; the rest gets it in the next one."""
        if self._resident is not None:
            self._resident.step(lr=lr, scale=scale, skip=skip, updated=updated)
        if self._scalars is None:
            self._scalars = (torch.empty_like(lr), torch.empty_like(scale), torch.empty_like(skip))
        for kept, value in zip(self._scalars, (lr, scale, skip), strict=True):
            kept.copy_(value)

    def stepped(self) -> None:
        """Note that a step was enqueued, by `step` or in a graph."""
        self._waits = True

    def settle(self) -> None:
        """Make all updates that wait, and wait for them and for the copies: weights and state are those of the step."""
        if self._waits and self._scalars is not None:
            self._waits = False
            self.begin()
            self.end()
            self._scalars[2].fill_(True)  # a graph makes the updates of the step before, whatever came between
        if self._cuda:
            torch.cuda.current_stream(self._device).synchronize()

    def tensors(self) -> dict[str, Tensor]:
        """The state as if it were all on the GPU, of which the streamed part lies in RAM; valid after `settle`."""
        tensors = {} if self._resident is None else self._resident.tensors()
        for group in self._groups:
            tensors.update(group.optimizer.tensors())
            tensors.update(group.tensors)
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        copy_into(self.tensors(), tensors)
        if self._resident is not None:
            self._resident.load_tensors(tensors)
        for group in self._groups:  # the number of steps, which all have under one name
            for name, live in group.optimizer.tensors().items():
                if name not in group.tensors:
                    live.copy_(tensors[name])
        self._fill()

    def _update(self, number: int) -> None:
        """Update a group when it has arrived; it leaves, and the next one comes in its place."""
        group = self._groups[number]
        if (arrived := self._arrived.get(number)) is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        if self._scalars is not None:
            lr, scale, skip = self._scalars
            with torch.autocast(self._device.type, enabled=False):
                group.optimizer.step(lr=lr, scale=scale, skip=skip)
        for parameter in group.parameters.values():
            parameter.grad = None
        coming = number + STATE_PLACES
        coming = coming if coming < len(self._groups) else number % STATE_PLACES  # one of the first, for the next step
        if not self._cuda:
            group.host.copy_(group.place)
            self._groups[coming].place.copy_(self._groups[coming].host)
            return
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            group.host.copy_(group.place, non_blocking=True)
        self._into.wait_stream(self._out)
        with torch.cuda.stream(self._into):
            self._groups[coming].place.copy_(self._groups[coming].host, non_blocking=True)
            self._arrived[coming] = self._into.record_event()

    def _fill(self) -> None:
        """Bring the first groups in, which every step finds in their places."""
        for group in self._groups[:STATE_PLACES]:
            group.place.copy_(group.host)

    def _keep(self, parameter: Tensor) -> None:
        """Move a gradient to its own memory."""
        assert isinstance(parameter, nn.Parameter)
        gradient = parameter.grad
        assert gradient is not None
        kept = self._kept[parameter] = self._homes[parameter]
        if gradient is not kept:  # a further micro-batch is added where the first one lies
            kept.copy_(gradient)
            parameter.grad = kept

    def _make_groups(
        self, make: Callable[[Mapping[str, nn.Parameter]], StepOptimizer], streamed: Mapping[str, nn.Parameter]
    ) -> list[_Group]:
        made = []
        for layer, parameters in _grouped(streamed):
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
            group = _Group(
                layer=layer, parameters=parameters, optimizer=optimizer, host=host, place=place, tensors=views
            )
            groups.append(group)
        return groups

    def _in_ram(self, size_bytes: int) -> Tensor:
        """Bytes in RAM, page-locked where there is a GPU, as long as this optimizer lives."""
        memory = page_aligned(page_rounded(size_bytes))
        if self._cuda:
            page_lock(memory)
            weakref.finalize(self, page_unlock, memory).atexit = False
        return torch.from_numpy(memory)[:size_bytes]


def _grouped(parameters: Mapping[str, nn.Parameter]) -> list[tuple[int, dict[str, nn.Parameter]]]:
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
    return groups


def _views(memory: Tensor, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like `arrays`, one after the other in these bytes."""
    views, at = {}, 0
    for name, tensor in arrays.items():
        views[name] = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        at += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return views
