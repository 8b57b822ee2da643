"""An exponential moving average of the trained weights, float32 in host memory.

It takes nothing of the GPU, but each update copies all trained weights to the host; so it is made every so many steps,
with the decay of all of them together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """Average over a run of what `choose_trainable` returned."""

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float, every: int) -> None:
        """`decay` is that of one step; the average begins at the weights as they are."""
        self._parameters, self._decay, self._every = dict(parameters), decay, every
        self._average = {
            name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in parameters.items()
        }

    @torch.no_grad()
    def after(self, step: int) -> None:
        """To be called after every step; does something after every so many."""
        if step % self._every == 0:
            weight = 1.0 - self._decay**self._every
            for name, average in self._average.items():
                average.lerp_(_on_host(self._parameters[name]), weight)

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name."""
        return dict(self._average)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a saved average."""
        for name, average in self._average.items():
            average.copy_(tensors[name])


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
