"""The optimizers of stage two behind one interface: a step whose lr, gradient factor and skip are device scalars.

Forward, backward and optimizer are captured as one CUDA graph: it would freeze Python numbers, and reading the loss to
decide whether to skip a step would stop the stream.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alpacache.errors import UsageError
from alpacache.training.step_optimizer import NO_SHARDS, StepOptimizer, Updated, copy_into, ignore_name

OPTIMIZERS = ("auto", "adamw8", "adamw")


def resolve(name: str, device: torch.device) -> str:
    """Name of the optimizer to use; `auto` is adamw8 on a GPU. Raises `UsageError` if it is unknown or cannot run."""
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
    kind = _FusedAdamW if device.type == "cuda" else _PlainAdamW
    return kind(parameters, betas=betas, weight_decay=weight_decay, eps=eps, shards=shards)


class _AdamW:
    """torch's AdamW with its state allocated beforehand."""

    fused: bool

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
        shards: Mapping[str, slice],
    ) -> None:
        self.parameters, self.shards = dict(parameters), shards
        self.moments = {
            f"{key}.{name}": torch.zeros_like(parameter)
            for name, parameter in parameters.items()
            for key in ("exp_avg", "exp_avg_sq")
        }
        self.own = {
            name: nn.Parameter(parameter.detach().view(-1)[shards[name]]) if name in shards else parameter
            for name, parameter in parameters.items()
        }
        """Parameters that torch's AdamW updates: whole ones, and views of shards."""
        self.optimizer = torch.optim.AdamW(
            self.own.values(),
            lr=0.0,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=self.fused,
            capturable=self.fused,
        )
        for name, parameter in self.own.items():
            moments = {key: self.moments[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            if name in shards:
                moments = {key: moment.view(-1)[shards[name]] for key, moment in moments.items()}
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.optimizer.state[parameter] = {"step": step, **moments}

    def tensors(self) -> dict[str, Tensor]:
        steps = {f"step.{name}": self.optimizer.state[own]["step"] for name, own in self.own.items()}
        return {**steps, **self.moments}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        copy_into(self.tensors(), tensors)

    def _apply(self, lr: float | Tensor, updated: Updated) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for name in self.own:
            updated(name)

    def _take_gradients(self) -> None:
        for name, shard in self.shards.items():
            grad = self.parameters[name].grad
            self.own[name].grad = None if grad is None else grad.view(-1)[shard]


class _PlainAdamW(_AdamW):
    """On the CPU, where scalars are simply read. A float64 `lr` keeps all bits of a Python number."""

    fused = False

    @torch.no_grad()
    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor, updated: Updated = ignore_name) -> None:
        if skip:
            return
        self._take_gradients()
        if scale != 1:
            torch._foreach_mul_([own.grad for own in self.own.values() if own.grad is not None], scale)
        self._apply(float(lr), updated)


class _FusedAdamW(_AdamW):
    """On a GPU, where the fused kernel takes scale and skip as a gradient scaler's `grad_scale` and `found_inf`."""

    fused = True

    def __init__(self, parameters: Mapping[str, nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, **options)
        device = next(iter(self.parameters.values())).device
        self._divisor, self._found_inf = (torch.zeros((), device=device) for _ in range(2))
        vars(self.optimizer).update(grad_scale=self._divisor, found_inf=self._found_inf)

    @torch.no_grad()
    def step(self, *, lr: Tensor, scale: Tensor, skip: Tensor, updated: Updated = ignore_name) -> None:
        self._take_gradients()
        torch.reciprocal(scale, out=self._divisor)
        self._found_inf.copy_(skip)
        self._apply(lr, updated)
