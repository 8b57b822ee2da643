"""An exponential moving average of the trained weights, float32 in host memory.

It takes nothing of the GPU, but each update copies all trained weights to the host; so it is made every so many steps,
with the decay of all of them together.

A checkpoint in between has the average of the last update and how many steps it is behind. So a resumed run updates it
as if nothing had happened, and `up_to_date` makes it whole of the checkpoint's own weights for whoever uses it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """Average over a run of what `choose_trainable` returned."""

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float, every: int) -> None:
        """`decay` is that of one step; the average begins at the weights as they are."""
        self._parameters, self._decay, self._every = dict(parameters), decay, every
        self._behind: int | None = 0
        self._average = {
            name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in parameters.items()
        }

    @torch.no_grad()
    def after(self, step: int) -> None:
        """To be called after every step; does something after every so many."""
        self._behind = 1 + ((step - 1) % self._every if self._behind is None else self._behind)
        if step % self._every == 0:
            share = 1.0 - self._decay**self._behind
            for name, average in self._average.items():
                average.lerp_(_on_host(self._parameters[name]), share)
            self._behind = 0

    def tensors(self) -> dict[str, Tensor]:
        """The average of the last update by parameter name."""
        return dict(self._average)

    @property
    def state(self) -> dict[str, Any]:
        """What `load` and `up_to_date` need beside the tensors: `decay` of a step, steps `behind`."""
        return {"decay": self._decay, "behind": self._behind or 0}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
        """Go on from a saved average; without `state`, which old checkpoints lack, by the number of the next step."""
        for name, average in self._average.items():
            average.copy_(tensors[name])
        self._behind = None if state is None else state["behind"]


@torch.no_grad()
def up_to_date(
    average: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, decay: float, behind: int
) -> dict[str, Tensor]:
    """An average with the steps that it is behind: `weights`, as they are after them, count for all of them."""
    share = 1.0 - decay**behind
    return {name: tensor.lerp(_on_host(weights[name]), share) for name, tensor in average.items()}


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
