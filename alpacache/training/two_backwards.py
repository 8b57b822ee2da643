"""Two backwards a step, so that no layer's gradient has to be kept.

Clipping wants the norm of all gradients before the first update. So they are made twice: by a first backward, which
squares and sums each layer's and forgets them, and by a second one, which updates each layer as soon as its gradients
are there. They never lie in memory together: of the released expert, 4.2 GiB are free for optimizer state. What state
has no room all the same lies in RAM, and comes and goes beside the second backward. Every number is what it would be
with gradients that are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alpacache.gpu.squares import PartialSums, SquareSum, total
from alpacache.planning.workload import STATE_PLACES
from alpacache.training.optimizers import StepOptimizer, Updated, check_fits, ignore_name
from alpacache.training.state_in_ram import Make, StateInRam, layer_of


class TwoBackwards:
    """An optimizer that takes the gradients of layers while a backward makes them.

    A step is `begin`; a backward within `summing`, which keeps the graph; `squared_norm`; a backward to `in_layers`
    within `updating`; `step`, which updates what is in no layer; `end`.
    """

    def __init__(self, make: Make, parameters: Mapping[str, nn.Parameter], streamed_layers: Sequence[int]) -> None:
        """`make` makes the optimizer of some of the parameters; state of `streamed_layers` is in RAM."""
        self._parameters = parameters
        self._device = next(iter(parameters.values())).device
        layers: dict[int, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if (layer := layer_of(name)) is not None:
                layers.setdefault(layer, {})[name] = parameter
        self._layers = layers
        self.in_layers = [parameter for layer in layers.values() for parameter in layer.values()]
        """Parameters whose gradients are made twice."""
        rest = {name: parameter for name, parameter in parameters.items() if layer_of(name) is None}
        self._rest = make(rest) if rest else None
        self._resident = {layer: make(own) for layer, own in layers.items() if layer not in streamed_layers}
        streamed = {name: p for layer in streamed_layers for name, p in layers.get(layer, {}).items()}
        self._in_ram = StateInRam(make, streamed, last_layer_first=True) if streamed else None
        self._next = 0
        """Group in RAM that is updated next."""
        self._of_layer = {layer: SquareSum(self._device) for layer in layers}
        self._of_rest = SquareSum(self._device)
        self._sums: dict[nn.Parameter, PartialSums] = {}
        self._missing: dict[int, int] = {}
        """Gradients that a backward has still to make, by layer; empty outside of one."""
        self._scalars: tuple[Tensor, Tensor, Tensor] | None = None
        """lr, scale and skip within `updating`."""
        self._stream: torch.cuda.Stream | None = None
        for layer, own in layers.items():
            for parameter in own.values():
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, layer=layer: self._count(layer)
                )

    def begin(self) -> None:
        """Begin a step: the first state comes from RAM."""
        self._next = 0
        if self._in_ram is not None:
            self._in_ram.begin()
            for number in range(min(STATE_PLACES, len(self._in_ram.groups))):
                self._in_ram.fetch(number)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Within it, a backward's gradients of layers become sums of their squares."""
        self._sums = {}
        with self._backward():
            yield

    @contextmanager
    def updating(self, *, lr: Tensor, scale: Tensor, skip: Tensor) -> Iterator[None]:
        """Within it, a backward's gradients of layers become updates, as `StepOptimizer` has them."""
        self._scalars = lr, scale, skip
        try:
            with self._backward():
                yield
        finally:
            self._scalars = None

    def squared_norm(self) -> Tensor:
        """Squared norm of all gradients, float32, to the bit that of `SquareSum`."""
        there = {p: p.grad for p in self._parameters.values() if p not in self._sums and p.grad is not None}
        sums = self._sums | dict(zip(there, self._of_rest.of_each(list(there.values())), strict=True))
        return total(sums[parameter] for parameter in self._parameters.values() if parameter in sums)

    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor, updated: Updated = ignore_name) -> None:
        """Update what is in no layer."""
        if self._rest is not None:
            self._rest.step(lr=lr, scale=scale, skip=skip, updated=updated)

    def end(self) -> None:
        """End a step: the current stream waits for all copies."""
        if self._in_ram is not None:
            self._in_ram.end()

    def settle(self) -> None:
        """Wait for updates and copies: weights and state are those of the step."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def tensors(self) -> dict[str, Tensor]:
        """The state as if it were all on the GPU, of which the streamed part lies in RAM; valid after `settle`."""
        own = [optimizer.tensors() for optimizer in self._on_gpu()]
        tensors = {name: tensor for some in own for name, tensor in some.items()}
        return tensors if self._in_ram is None else tensors | self._in_ram.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.settle()
        check_fits(self.tensors(), tensors)  # all of it, before a part is changed
        for optimizer in self._on_gpu():
            optimizer.load_tensors(tensors)
        if self._in_ram is not None:
            self._in_ram.load_tensors(tensors)

    def _on_gpu(self) -> list[StepOptimizer]:
        return [*([] if self._rest is None else [self._rest]), *self._resident.values()]

    @contextmanager
    def _backward(self) -> Iterator[None]:
        self._missing = {layer: len(own) for layer, own in self._layers.items()}
        self._stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            yield
            for layer in sorted(self._missing, reverse=True):  # some parameter had no part in the loss
                self._take(layer)
        finally:
            self._missing = {}

    def _count(self, layer: int) -> None:
        """Count a gradient that was made."""
        if self._missing:
            self._missing[layer] -= 1
            if not self._missing[layer]:
                self._take(layer)

    @torch.no_grad()
    def _take(self, layer: int) -> None:
        """Sum the squares of a layer's gradients, or update it with them; then they are no more."""
        del self._missing[layer]
        own = list(self._layers[layer].values())
        with self._on_stream():
            if self._scalars is None:
                grads = {parameter: parameter.grad for parameter in own if parameter.grad is not None}
                if grads:
                    self._sums |= zip(grads, self._of_layer[layer].of_each(list(grads.values())), strict=True)
            elif layer in self._resident:
                self._apply(self._resident[layer])
            else:
                self._update_from_ram(layer)
        for parameter in own:
            parameter.grad = None

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Go on in the stream that the backward was called in, from whichever autograd accumulates in."""
        if self._stream is None:
            yield
            return
        if (current := torch.cuda.current_stream(self._device)) != self._stream:
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield

    def _update_from_ram(self, layer: int) -> None:
        """Update groups down to this layer: of layers above it, all gradients are there."""
        assert self._in_ram is not None
        groups = self._in_ram.groups
        while self._next < len(groups) and groups[self._next].layer >= layer:
            coming = self._next + STATE_PLACES
            self._in_ram.update(self._next, self._apply, then=coming if coming < len(groups) else None)
            self._next += 1

    def _apply(self, optimizer: StepOptimizer) -> None:
        assert self._scalars is not None
        lr, scale, skip = self._scalars
        with torch.autocast(self._device.type, enabled=False):
            optimizer.step(lr=lr, scale=scale, skip=skip)
