"""The interface that a training step asks of its optimizer."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeAlias

from torch import Tensor

from alpacache.errors import DataError

Updated: TypeAlias = Callable[[str], None]
NO_SHARDS: Mapping[str, slice] = MappingProxyType({})


def ignore_name(name: str) -> None:
    """Do nothing; the default of `updated`."""


class StepOptimizer(Protocol):
    """An optimizer that can be captured in a CUDA graph: state is allocated at construction and changed in place."""

    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor, updated: Updated = ignore_name) -> None:
        """Apply one step from each parameter's gradient times `scale`; where `skip` is True nothing changes.

        The three are 0-dim tensors on the parameters' device: float32, float32, bool. Parameters without a gradient are
        left alone. Gradients may be scaled in place. On a GPU the host does not wait for the device. `updated` is
        called with a parameter's name when its update is enqueued.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The live state by `<key>.<parameter name>`: all that an exact resume needs besides the weights."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state into the live one. Raises `DataError`, with nothing changed, if it does not fit."""
        ...


def copy_into(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into live ones of the same names, whose addresses a captured graph may hold.

    Floating-point types may differ, as they do when a run goes on with another device. Raises `DataError` before
    anything is changed.
    """
    for name, live in state.items():
        saved = tensors.get(name)
        if saved is None:
            raise DataError(f"optimizer state has no tensor {name!r}; was it saved by another optimizer?")
        same_kind = saved.dtype == live.dtype or (saved.is_floating_point() and live.is_floating_point())
        if saved.shape != live.shape or not same_kind:
            raise DataError(
                f"optimizer state {name!r} is {saved.dtype} {list(saved.shape)}, expected {live.dtype} "
                f"{list(live.shape)}; was it saved by another optimizer or for another model?"
            )
    for name, live in state.items():
        live.copy_(tensors[name])
