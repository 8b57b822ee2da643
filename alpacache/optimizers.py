"""The optimizers of stage two behind one interface: a step whose lr, gradient factor and skip are device scalars.

Why: forward, backward and optimizer are captured as one CUDA graph. Python numbers would be frozen in it, and reading
the loss to decide whether to skip a step would stop the stream.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from alpacache.errors import DataError, UsageError

OPTIMIZERS = ("auto", "adamw8", "adamw")
_BYTES = {"adamw": 4.0, "adamw8": 3.0 + 3 * 2 / 128}
"""State of a bf16 parameter: two bf16 moments; residual, two codes and three bf16 scales a group of 128."""


class StepOptimizer(Protocol):
    """All state is allocated at construction and changed in place, so a step can be captured in a CUDA graph."""

    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor) -> None:
        """Apply one step from each parameter's gradient times `scale`; where `skip` is True nothing changes.

        All three are 0-dim tensors on the parameters' device: float32, float32, bool. Parameters without a gradient are
        left alone. Gradients may be scaled in place. On a GPU nothing waits for the device.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The live state by `<key>.<parameter name>`: all that an exact resume needs beside the weights."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state into the live one. Raises `DataError`, with nothing changed, if it does not fit."""
        ...


def resolve(name: str, device: torch.device) -> str:
    """The optimizer to use; `auto` is adamw8 on a GPU. Raises `UsageError` for one that is unknown or cannot run."""
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer {name!r} is unknown; expected one of {', '.join(OPTIMIZERS)}.")
    if name == "auto":
        return "adamw8" if device.type == "cuda" else "adamw"
    if name == "adamw8" and device.type != "cuda":
        raise UsageError(f"optimizer adamw8 needs a GPU, the device is {device}; choose adamw or auto.")
    return name


def make_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
) -> StepOptimizer:
    """An optimizer of the named parameters, which are on one device. Raises `UsageError` as `resolve` does."""
    device = next(iter(parameters.values())).device
    if resolve(name, device) == "adamw8":
        from alpacache.adamw8 import AdamW8, Hyperparameters

        return AdamW8(parameters, Hyperparameters(betas=betas, weight_decay=weight_decay, eps=eps))
    kind = _FusedAdamW if device.type == "cuda" else _PlainAdamW
    return kind(parameters, betas=betas, weight_decay=weight_decay, eps=eps)


def state_bytes(name: str, parameter_count: int) -> int:
    """About what the state of bf16 parameters takes; `name` as `resolve` gives it."""
    return round(_BYTES[name] * parameter_count)


def copy_into(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into live ones of the same names, whose addresses a captured graph may hold.

    Floating-point types may differ, as they do when a run goes on on another device. Raises `DataError` before anything
    is changed.
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


class _AdamW:
    """torch's AdamW with its state made beforehand."""

    fused: bool

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], weight_decay: float, eps: float
    ) -> None:
        self.parameters = dict(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=0.0,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=self.fused,
            capturable=self.fused,
        )
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {f"{key}.{name}": value for name, p in self.parameters.items() for key, value in state[p].items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        copy_into(self.tensors(), tensors)

    def _apply(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


class _PlainAdamW(_AdamW):
    """On the CPU, where the scalars are simply read. A float64 `lr` keeps all bits of a Python number."""

    fused = False

    @torch.no_grad()
    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor) -> None:
        if skip:
            return
        if scale != 1:
            torch._foreach_mul_([p.grad for p in self.parameters.values() if p.grad is not None], scale)
        self._apply(float(lr))


class _FusedAdamW(_AdamW):
    """On a GPU: scale and skip are what the fused kernel knows as a gradient scaler's `grad_scale` and `found_inf`."""

    fused = True

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], weight_decay: float, eps: float
    ) -> None:
        super().__init__(parameters, betas=betas, weight_decay=weight_decay, eps=eps)
        device = next(iter(self.parameters.values())).device
        self._divisor, self._found_inf = (torch.zeros((), device=device) for _ in range(2))
        vars(self.optimizer).update(grad_scale=self._divisor, found_inf=self._found_inf)

    @torch.no_grad()
    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor) -> None:
        torch.reciprocal(scale, out=self._divisor)
        self._found_inf.copy_(skip)
        self._apply(lr)
