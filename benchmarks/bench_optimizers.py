"""Optimizers of stage two: time and memory of a step at full size, and how far rounding takes the weights.

Speed: the expert's 2.28 B bf16 parameters, gradients present, eager and as a replayed CUDA graph; each row says its
time over that of the fused bf16 AdamW. `norm` is the sum of the gradients' squares in a graph, torch's and ours, whose
row says its time over torch's. Quality: distance of the weights (masters, where there are some) to those of a
float32 AdamW after 300 noisy steps, in percent of the way that one went. Gradients are noise plus a drift of 0.3 of it,
`even` all of one size, `uneven` of log-normal sizes with one channel in 64 thirty times larger. `--quick` measures
quality alone, smaller and on the CPU with the reference of adamw8. flashoptim is measured where it is installed.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from adamw8_reference import ReferenceAdamW8, join
from benchmark_report import arguments, finish, hardware_name
from torch import Tensor, nn

from alpacache.gpu.squares import SquareSum
from alpacache.training.adamw8 import AdamW8
from alpacache.training.adamw8_update import Hyperparameters
from alpacache.training.optimizers import make_optimizer

LAYER = {
    "q": (2048, 2048),
    "k": (1024, 2048),
    "v": (1024, 2048),
    "o": (2048, 2048),
    "gate": (8256, 2048),
    "up": (8256, 2048),
    "down": (2048, 8256),
    "norms": (2, 2048),
    "q_norm": (128,),
    "k_norm": (128,),
}
HYPER = Hyperparameters(betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
Parameters = Mapping[str, nn.Parameter]


class Candidate:
    """One optimizer over given parameters; `step` may be captured."""

    def __init__(self, name: str, parameters: Parameters, lr: float) -> None:
        device = next(iter(parameters.values())).device
        self.name, self.parameters = name, parameters
        self.scalars = {
            "lr": torch.tensor(lr, device=device),
            "scale": torch.tensor(1.0, device=device),
            "skip": torch.tensor(False, device=device),
        }
        options: dict[str, Any] = {"betas": HYPER.betas, "weight_decay": HYPER.weight_decay}
        if name == "flashoptim":
            from flashoptim import FlashAdamW

            self.optimizer: Any = FlashAdamW(parameters.values(), lr=lr, **options)
        elif name == "adamw8":
            self.optimizer = (AdamW8 if device.type == "cuda" else ReferenceAdamW8)(parameters, HYPER)
        else:
            self.optimizer = make_optimizer(name, parameters, **options)

    def step(self) -> None:
        if self.name == "flashoptim":
            self.optimizer.step()
        else:
            self.optimizer.step(**self.scalars)

    def masters(self) -> dict[str, Tensor]:
        """Weights in float32, as exactly as the optimizer knows them."""
        if self.name == "flashoptim":
            found = self.optimizer.get_fp32_model_state_dict(nn.ParameterDict(dict(self.parameters)))
            return {name: found[name] for name in self.parameters}
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        if self.name == "adamw8":
            state = self.optimizer.tensors()
            return {name: join(weight, state[f"residual.{name}"]) for name, weight in weights.items()}
        return {name: weight.float() for name, weight in weights.items()}


def full_size_parameters(device: torch.device) -> Parameters:
    shapes = {f"{layer}.{name}": shape for layer in range(36) for name, shape in LAYER.items()}
    parameters = {}
    for name, shape in shapes.items():
        parameter = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02))
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-3)
        parameters[name] = parameter
    return parameters


def measure_speed(name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Two rows: eager and captured."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    candidate = Candidate(name, full_size_parameters(device), lr=1e-5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            candidate.step()
    torch.cuda.current_stream().wait_stream(side)
    row: dict[str, Any] = {"part": "speed", "optimizer": name}
    yield row | {"mode": "eager", "step_ms": step_ms(candidate.step), "peak_gib": peak_gib()}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            candidate.step()
    except RuntimeError as error:
        yield row | {"mode": "captured", "note": str(error).splitlines()[0]}
        return
    yield row | {"mode": "captured", "step_ms": step_ms(graph.replay), "peak_gib": peak_gib()}


def measure_norm(device: torch.device) -> list[dict[str, Any]]:
    """Two rows: torch's norm of a list of tensors, and sums of squares by one kernel."""
    grads = [grad for parameter in full_size_parameters(device).values() if (grad := parameter.grad) is not None]
    sums = SquareSum(device)
    ways = {
        "torch": lambda: torch.stack(torch._foreach_norm(grads, 2, torch.float32)).square().sum(),
        "squares": lambda: sums(grads),
    }
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        way()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            way()
        rows.append({"part": "norm", "optimizer": name, "mode": "captured", "step_ms": step_ms(graph.replay)})
    rows[1]["over_torch"] = rows[1]["step_ms"] / rows[0]["step_ms"]
    return rows


def step_ms(step: Callable[[], Any], steps: int = 20) -> float:
    """Mean over steps back to back."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps * 1e3


def peak_gib() -> float:
    return torch.cuda.max_memory_reserved() / 2**30


def gradients(kind: str, shapes: Mapping[str, Tensor], steps: int, generator: torch.Generator) -> Iterator[Any]:
    """bf16 gradients of each step, by parameter."""

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device)

    size, drift = {}, {}
    for name, like in shapes.items():
        size[name] = torch.full_like(like, 1e-3, dtype=torch.float32)
        if kind == "uneven":
            outlier = torch.rand(like.shape, generator=generator, device=like.device) < 1 / 64
            size[name] *= normal(like).exp() * torch.where(outlier, 30.0, 1.0)
        drift[name] = 0.3 * size[name] * normal(like)
    for _ in range(steps):
        yield {name: (drift[name] + size[name] * normal(like)).bfloat16() for name, like in shapes.items()}


def measure_quality(
    names: list[str], kind: str, lr: float, count: int, device: torch.device, steps: int = 300
) -> Iterator[dict[str, Any]]:
    """A row an optimizer; weights of std 0.02 and norm gains near 1."""
    generator = torch.Generator(device).manual_seed(0)
    start = {
        "weights": (0.02 * torch.randn(count, generator=generator, device=device)).bfloat16(),
        "gains": (1 + 0.05 * torch.randn(count // 4, generator=generator, device=device)).bfloat16(),
    }
    exact = {name: nn.Parameter(value.float()) for name, value in start.items()}
    candidates = {"float32": Candidate("adamw", exact, lr)} | {
        name: Candidate(name, {key: nn.Parameter(value.clone()) for key, value in start.items()}, lr) for name in names
    }
    for gradient in gradients(kind, start, steps, generator):
        for candidate in candidates.values():
            for name, parameter in candidate.parameters.items():
                parameter.grad = gradient[name].to(parameter.dtype, copy=True)
            candidate.step()
    final = candidates.pop("float32").masters()
    for name, candidate in candidates.items():
        row: dict[str, Any] = {"part": "quality", "optimizer": name, "gradients": kind, "lr": lr}
        for key, value in candidate.masters().items():
            way = (final[key] - start[key].float()).norm()
            row[f"{key}_off_percent"] = float((value - final[key]).norm() / way) * 100
        yield row


def main() -> None:
    options = arguments(__doc__).parse_args()
    cuda = torch.cuda.is_available() and not options.quick
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick measures quality alone, on the CPU.")
    device = torch.device("cuda" if cuda else "cpu")
    names = ["adamw", "adamw8"]
    if cuda and importlib.util.find_spec("flashoptim"):
        names.append("flashoptim")
    rows: list[dict[str, Any]] = []
    for name in names if cuda else []:
        rows += measure_speed(name, device)
    base = {row["mode"]: row.get("step_ms") for row in rows if row["optimizer"] == "adamw"}
    for row in rows:
        if row.get("step_ms") and base[row["mode"]]:
            row["over_adamw"] = row["step_ms"] / base[row["mode"]]
    if cuda:
        rows += measure_norm(device)
    for kind in ("even", "uneven"):
        for lr in (1e-4, 1e-5):
            rows += measure_quality(names, kind, lr, 2**20 if cuda else 2**14, device)
    hardware = torch.cuda.get_device_name() if cuda else hardware_name()
    finish("optimizers", rows, options, hardware=hardware)


if __name__ == "__main__":
    main()
