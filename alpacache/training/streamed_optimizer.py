"""Optimizer state in page-locked RAM that visits the GPU once a step, while the next step's forward goes on.

A step touches the state once, so a bus has the length of a step to bring it in and take it out again. Clipping wants
the norm of all gradients first; so the update of a layer waits until just before its forward in the next step, and the
states of later layers arrive and those of earlier ones leave meanwhile. While the backward runs, the first groups are
in their places already. Every number is what it would be with the state on the GPU: the same kernels in the same order
of steps.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alpacache.planning.workload import STATE_PLACES
from alpacache.training.optimizers import StepOptimizer, Updated, check_fits, ignore_name
from alpacache.training.state_in_ram import Make, StateInRam, layer_of


class StreamedOptimizer:
    """An optimizer of which some layers' state is in RAM.

    `step` updates what stays on the GPU and notes the scalars. The rest is updated by `before_layer`, between `begin`
    and `end` of the next step, or by `settle`. Until then its gradients stay where they are.
    """

    def __init__(
        self, make: Make, parameters: Mapping[str, nn.Parameter], layers: Sequence[int], *, keep_gradients: bool
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
        resident = {name: parameter for name, parameter in parameters.items() if name not in streamed}
        self._resident = make(resident) if resident else None
        self._in_ram = StateInRam(make, streamed)
        self._scalars: tuple[Tensor, Tensor, Tensor] | None = None
        """lr, scale and skip of the updates that wait; None before the first step."""
        self._waits = self._open = False
        self._next = 0
        """Group that is updated next."""
        self._kept: dict[nn.Parameter, Tensor] = {}
        """Gradients in memory of their own, of the parameters that get one."""
        self._homes: dict[nn.Parameter, Tensor] = {}
        """Memory for those gradients, taken in one piece before activations are scattered around it."""
        if keep_gradients:
            self._homes = {parameter: torch.empty_like(parameter) for parameter in streamed.values()}
            for parameter in self._homes:
                parameter.register_post_accumulate_grad_hook(self._keep)  # type: ignore[no-untyped-call]
        self._in_ram.fill()

    def begin(self) -> None:
        """Begin a step: its forward may be enqueued, with `before_layer` before each layer."""
        for parameter, gradient in self._kept.items():
            parameter.grad = gradient
        self._next, self._open = 0, True
        self._in_ram.begin()

    def before_layer(self, layer: int) -> None:
        """Enqueue what updates up to this layer are still to be made; outside of a step there are none."""
        groups = self._in_ram.groups
        while self._open and self._next < len(groups) and groups[self._next].layer <= layer:
            coming = self._next + STATE_PLACES
            if coming >= len(groups):
                coming = self._next % STATE_PLACES  # one of the first, for the next step
            self._in_ram.update(self._next, self._apply, then=coming)
            self._next += 1

    def end(self) -> None:
        """End a step: the current stream waits for all copies."""
        self.before_layer(self._in_ram.groups[-1].layer)
        self._open = False
        self._in_ram.end()

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
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def tensors(self) -> dict[str, Tensor]:
        """The state as if it were all on the GPU, of which the streamed part lies in RAM; valid after `settle`."""
        return ({} if self._resident is None else self._resident.tensors()) | self._in_ram.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        check_fits(self.tensors(), tensors)  # all of it, before a part is changed
        if self._resident is not None:
            self._resident.load_tensors(tensors)
        self._in_ram.load_tensors(tensors)
        self._in_ram.fill()

    def _apply(self, optimizer: StepOptimizer) -> None:
        if self._scalars is not None:
            lr, scale, skip = self._scalars
            with torch.autocast(self._device.type, enabled=False):
                optimizer.step(lr=lr, scale=scale, skip=skip)

    def _keep(self, parameter: Tensor) -> None:
        """Move a gradient to its own memory."""
        assert isinstance(parameter, nn.Parameter)
        gradient = parameter.grad
        assert gradient is not None
        kept = self._kept[parameter] = self._homes[parameter]
        if gradient is not kept:  # a further micro-batch is added where the first one lies
            kept.copy_(gradient)
            parameter.grad = kept
