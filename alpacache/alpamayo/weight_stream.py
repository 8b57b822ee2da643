"""Modules whose weights come from a `WeightHome` just before they are needed, while other modules compute.

A thread waits for the home, so that the one that launches kernels never does; on a GPU the copies go through a stream
of their own, and events keep weights and computation apart.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from alpacache.alpamayo.weight_homes import WeightHome
from alpacache.finite import is_finite


class WeightStream:
    """Fills modules with the home's units, in the order in which the modules are offered."""

    def __init__(self, home: WeightHome, device: torch.device, *, names: list[str]) -> None:
        """`names`: of the home's units, for errors."""
        self._home, self._device, self._names = home, device, names
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(1, "weights")
        self._offered: list[Future[tuple[nn.Module, torch.cuda.Event | None]]] = []
        self._flags: dict[str, Tensor] = {}
        """Flag by tensor: True if it is finite; for units that have come and were not asked yet."""
        self._filled = 0

    @property
    def offered(self) -> int:
        """Modules that are on their way."""
        return len(self._offered)

    def offer(self, module: nn.Module) -> None:
        """Let the next unit come into this module, once what was launched so far is done with it."""
        free = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self._offered.append(self._pool.submit(self._fill, module, free))

    def take(self) -> nn.Module:
        """The module that was offered first, filled, for work that is launched from now on."""
        module, ready = self._offered.pop(0).result()
        if ready is not None:
            torch.cuda.current_stream(self._device).wait_event(ready)
        return module

    @torch.inference_mode()
    def _fill(self, module: nn.Module, free: torch.cuda.Event | None) -> tuple[nn.Module, torch.cuda.Event | None]:
        tensors = self._home.next_unit()
        if self._stream is None or free is None:
            self._copy(tensors, module)
            self._home.given_back(None)
            return module, None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            self._copy(tensors, module)
            ready = self._stream.record_event()
            self._home.given_back(ready)
        return module, ready

    def _copy(self, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        assert parameters.keys() == tensors.keys()
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name], non_blocking=True)
        if self._filled < len(self._names):
            unit = self._names[self._filled]
            self._flags |= {unit + name: is_finite(parameter) for name, parameter in parameters.items()}
            self._filled += 1

    def finite(self) -> dict[str, Tensor]:
        """Flags of the tensors that came for the first time since the last call, by name: are they finite?

        Called when nothing is on its way, and read once all work is done.
        """
        flags, self._flags = self._flags, {}
        return flags

    def close(self) -> None:
        """End the thread and close the home, once nothing is being copied."""
        self._pool.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()
        self._home.close()


def release(module: nn.Module) -> None:
    """Leave the module's parameters without memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def allocate(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Give the module's parameters memory of these shapes, by their names, to be filled."""
    for name, parameter in module.named_parameters():
        parameter.data = torch.empty(shapes[name], dtype=parameter.dtype, device=parameter.device)
