"""An exponential moving average of the trained weights, float32 in host memory.

It takes no GPU memory, but each update copies all trained weights to the host. So it is updated only every so many
steps, with the decay of all of them together.

A checkpoint in between holds the average of the last update and how many steps it is behind. A resumed run then updates
it as if nothing had happened, and whoever uses it brings it up to the checkpoint's own weights with `up_to_date`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """Moving average of the parameters that `choose_trainable` returned."""

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float, every: int) -> None:
        """`decay` is that of one step; the average begins at the current weights."""
        self._parameters, self._decay, self._every = dict(parameters), decay, every
        self._behind = 0
        self._average = {
            name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in parameters.items()
        }

    def is_due(self, step: int) -> bool:
        """Tell whether the average is updated after this step."""
        return step % self._every == 0

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Count a step, and update when it is time; to be called after every step."""
        self._behind += 1
        if self.is_due(step):
            share = 1.0 - self._decay**self._behind
            for name, average in self._average.items():
                average.lerp_(_on_host(self._parameters[name]), share)
            self._behind = 0

    def tensors(self) -> dict[str, Tensor]:
        """The average as last updated, by parameter name."""
        return dict(self._average)

    @property
    def state(self) -> dict[str, Any]:
        """Return what `up_to_date` needs besides the tensors: `decay` per step, steps `behind`."""
        return {"decay": self._decay, "behind": self._behind}

    def load(self, tensors: Mapping[str, Tensor], behind: int) -> None:
        """Go on from a saved average."""
        for name, average in self._average.items():
            average.copy_(tensors[name])
        self._behind = behind


@torch.no_grad()
def up_to_date(
    average: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, decay: float, behind: int
) -> dict[str, Tensor]:
    """Average brought up to date: `weights`, as they are now, count for all steps that it is behind."""
    share = 1.0 - decay**behind
    return {name: tensor.lerp(_on_host(weights[name]), share) for name, tensor in average.items()}


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
