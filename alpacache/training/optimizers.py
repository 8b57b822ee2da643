"""The optimizers of stage two behind one interface: a step whose lr, gradient factor and skip are device scalars.

Forward, backward and optimizer are captured as one CUDA graph: it would freeze Python numbers, and reading the loss to
decide whether to skip a step would stop the stream.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from alpacache.errors import DataError, UsageError

Updated: TypeAlias = Callable[[str], None]
NO_SHARDS: Mapping[str, slice] = MappingProxyType({})


def ignore_name(name: str) -> None:
    """Do nothing."""


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
    check_fits(state, tensors)
    for name, live in state.items():
        live.copy_(tensors[name])


def check_fits(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise `DataError` where `copy_into` would."""
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


def resolve(name: str, device: torch.device) -> str:
    """Name of the optimizer to use; `auto` is adamw8 on a GPU. Raises `UsageError` if it is unknown or cannot run."""
    cuda = device.type == "cuda"
    if name not in ("auto", "adamw8", "adamw"):
        raise UsageError(f"optimizer {name!r} is unknown; expected one of auto, adamw8, adamw.")
    if name == "auto":
        return "adamw8" if cuda else "adamw"
    if name == "adamw8" and not cuda:
        raise UsageError(f"optimizer adamw8 needs a GPU, the device is {device}; choose adamw or auto.")
    return name


def make_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
    shards: Mapping[str, slice] = NO_SHARDS,
) -> StepOptimizer:
    """Make an optimizer of named parameters, which are on one device. Raises `UsageError` as `resolve` does.

    `shards`: elements (flattened, multiples of 1024) to update of some parameters; the gradient and the state of their
    other elements are not touched.
    """
    device = next(iter(parameters.values())).device
    if resolve(name, device) == "adamw8":
        from alpacache.training.adamw8 import AdamW8
        from alpacache.training.adamw8_update import Hyperparameters

        return AdamW8(parameters, Hyperparameters(betas=betas, weight_decay=weight_decay, eps=eps), shards)
    return _AdamW(parameters, betas=betas, weight_decay=weight_decay, eps=eps, shards=shards)


class _AdamW:
    """torch's AdamW with its state allocated beforehand.

    On a GPU the fused kernel takes scale and skip as a gradient scaler's `grad_scale` and `found_inf`. On the CPU
    scalars are simply read; a float64 `lr` keeps all bits of a Python number.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
        shards: Mapping[str, slice],
    ) -> None:
        device = next(iter(parameters.values())).device
        self._parameters, self._shards, self._fused = dict(parameters), shards, device.type == "cuda"
        self._moments: dict[str, Tensor] = {}
        self._own = {
            name: nn.Parameter(parameter.detach().view(-1)[shards[name]]) if name in shards else parameter
            for name, parameter in parameters.items()
        }
        """Parameters that torch's AdamW updates: whole ones, and views of shards."""
        self._optimizer = torch.optim.AdamW(
            self._own.values(), 0.0, betas, eps, weight_decay, fused=self._fused, capturable=self._fused
        )
        self._divisor, self._found_inf = (torch.zeros((), device=device) for _ in range(2))
        if self._fused:
            vars(self._optimizer).update(grad_scale=self._divisor, found_inf=self._found_inf)
        for name, own in self._own.items():
            state = self._optimizer.state[own] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
            for key in ("exp_avg", "exp_avg_sq"):
                moment = self._moments[f"{key}.{name}"] = torch.zeros_like(parameters[name])
                state[key] = moment.view(-1)[shards[name]] if name in shards else moment

    def tensors(self) -> dict[str, Tensor]:
        steps = {f"step.{name}": self._optimizer.state[own]["step"] for name, own in self._own.items()}
        return {**steps, **self._moments}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        copy_into(self.tensors(), tensors)

    @torch.no_grad()
    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor, updated: Updated = ignore_name) -> None:
        if not self._fused and skip:
            return
        for name, shard in self._shards.items():
            grad = self._parameters[name].grad
            self._own[name].grad = None if grad is None else grad.view(-1)[shard]
        if self._fused:
            torch.reciprocal(scale, out=self._divisor)
            self._found_inf.copy_(skip)
        elif scale != 1 and (grads := [own.grad for own in self._own.values() if own.grad is not None]):
            torch._foreach_mul_(grads, scale)
        self._optimizer.param_groups[0]["lr"] = lr if self._fused else float(lr)
        self._optimizer.step()
        for name in self._own:
            updated(name)
