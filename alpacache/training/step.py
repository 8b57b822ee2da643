"""One optimizer step on one batch: forward, backward, clipping and optimizer, on a GPU as one CUDA graph.

Launching the kernels one by one takes longer than running them, so the step is captured and reads a `StagedBatch`. The
host reads loss and norm of a step when it has already enqueued the next one. So it is the device that skips a step
whose loss or gradient is not finite, and every step from the first one on whose rows have a wrong checksum.

A `StreamedOptimizer` updates some layers one step late, each just before its forward: the graph then begins with the
updates of the step before. `TwoBackwards` updates layers in the course of a second backward.

What is not skipped cannot make finite weights infinite, so nothing is checked behind the update: the gradient's norm is
at most `clip` (1e18), AdamW's update lr / eps times that, with lr and weight decay of at most 1 (`TrainConfig`).
Weights that are not finite all the same, as by a fault of memory, make the next loss not finite and are never saved.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alpacache.cached_samples.ring import Batch
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.gpu.capture import captured
from alpacache.inference.prediction import flow_loss
from alpacache.training.compiled_expert import compile_for
from alpacache.training.learner import Learner
from alpacache.training.streamed_optimizer import StreamedOptimizer
from alpacache.training.two_backwards import TwoBackwards


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A step that was enqueued; `values` waits for its numbers."""

    batch: Batch
    numbers: Tensor
    """`[4 + B]` float32 on the host: loss, norm, requests to stop, damaged rows, losses of this process's samples."""
    began: torch.cuda.Event | None
    """Recorded when the batch's samples had arrived and the step before had ended."""
    ended: torch.cuda.Event | None

    def values(self) -> "StepValues":
        """Wait for the step and read its numbers."""
        if self.ended is not None:
            self.ended.synchronize()
        loss, norm, stop, damaged, *losses = self.numbers.tolist()
        return StepValues(loss=loss, norm=norm, stop=stop > 0, damaged=damaged > 0, losses=losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValues:
    """The outcome of a step, over all processes but for `losses`."""

    loss: float
    norm: float
    """Gradient norm before clipping."""
    stop: bool
    """Some process would like to end after this step."""
    damaged: bool
    """Damaged bytes had come into the ring of some process: neither this step nor any after it changed anything."""
    losses: list[float]
    """Loss of each sample of this process."""


class TrainStep:
    """The work of a step on staged batches, and the graph that holds it."""

    def __init__(
        self,
        learner: Learner,
        staged: StagedBatch,
        *,
        micro_batch: int,
        clip: float,
        causal: bool,
        capture: bool,
        compile_layers: bool = False,
    ) -> None:
        """`staged`: the batches of this process; `micro_batch` of their samples go through the expert at a time."""
        expert = self._expert = learner.expert
        self._optimizer = learner.optimizer
        self._streamed = learner.optimizer if isinstance(learner.optimizer, StreamedOptimizer) else None
        self._twice = learner.optimizer if isinstance(learner.optimizer, TwoBackwards) else None
        self._by_layer = self._streamed or self._twice
        waiting = frozenset() if self._streamed is None else self._streamed.waiting
        self._parameters = [parameter for name, parameter in learner.parameters.items() if name not in waiting]
        """Those whose gradients are the optimizer's no more when a step has been enqueued."""
        self._shared, self._staged = learner.update, staged
        self._micro_batch, self._clip, self._causal = micro_batch, clip, causal
        self._graph: torch.cuda.CUDAGraph | None = None
        self._cuda = expert.device.type == "cuda"
        self._capture = capture and self._cuda
        if self._twice is not None and micro_batch < staged.size:
            raise ValueError(f"two backwards take all {staged.size} samples at once, not {micro_batch}.")
        if compile_layers and self._cuda:
            compile_for(expert.expert.layers, backwards=1 if self._twice is None else 2)
        if self._streamed is not None:
            call_before(expert.expert.layers, self._streamed.before_layer)
        self._dry = torch.zeros((), dtype=torch.bool, device=expert.device)
        """Set while the graph warms up: the optimizer then changes nothing."""
        self._numbers = torch.zeros(4 + staged.size, device=expert.device)

    def run(self, batch: Batch, noise: Tensor, t: Tensor, lr: float, *, stop: bool = False) -> StepResult:
        """Enqueue one step; `noise [B, K, 64, 2]` and `t [B, K]` on the CPU.

        `stop`: this process would like to end after it; the result says whether any would.
        """
        if len(batch.rows) != self._staged.size:
            raise ValueError(f"a step takes {self._staged.size} samples, got {len(batch.rows)}.")
        self._staged.put(batch, noise, t=t, lr=lr, stop=stop)
        began = self._event()
        if self._capture and self._graph is None:
            self._dry.fill_(True)
            self._graph = captured(self._compute, after_warm_up=self._forget_gradients)
            self._dry.fill_(False)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()
        if self._streamed is not None:
            self._streamed.stepped()
        numbers = self._numbers.to("cpu", non_blocking=True, copy=True)  # from a GPU to page-locked memory
        return StepResult(batch=batch, numbers=numbers, began=began, ended=self._event())

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _compute(self) -> None:
        self._forget_gradients()
        if self._by_layer is not None:
            self._by_layer.begin()
        staged = self._staged
        all_samples = staged.size * self._shared.world.size
        losses = []
        for start in range(0, staged.size, self._micro_batch):
            self._shared.is_last_backward = start + self._micro_batch >= staged.size
            part = slice(start, start + self._micro_batch)
            flow = staged.action[part], staged.noise[part], staged.t[part]
            loss = flow_loss(self._expert, *flow, staged.prefixes(part), causal=self._causal)
            mean = loss.sum() / all_samples
            with nullcontext() if self._twice is None else self._twice.summing():
                mean.backward(retain_graph=self._twice is not None)  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        each = torch.cat(losses)
        self._shared.finish_sum()
        squared_norm = (self._shared if self._twice is None else self._twice).squared_norm()
        damaged = torch.count_nonzero(staged.rows.damage).float()
        sums = torch.stack([each.sum() / all_samples, squared_norm, staged.stop, damaged])
        self._shared.world.all_reduce(sums)
        total, squared_norm, stop, damaged = sums
        norm = squared_norm.sqrt()
        scale = (self._clip / (norm + 1e-6)).clamp(max=1.0)
        bad = ~(torch.isfinite(total) & torch.isfinite(norm)) | (damaged > 0)
        scalars = {"lr": staged.lr, "scale": scale, "skip": bad | self._dry}
        if self._twice is not None:
            with self._twice.updating(**scalars):
                mean.backward(inputs=self._twice.in_layers)  # type: ignore[no-untyped-call]
        self._optimizer.step(**scalars, updated=self._shared.gather_updated)
        self._shared.finish_update()
        self._numbers.copy_(torch.cat([torch.stack([total, norm, stop, damaged]), each]))
        if self._by_layer is not None:
            self._by_layer.end()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def call_before(layers: nn.ModuleList, work: Callable[[int], None]) -> None:
    """Have `work` called with a layer's number before its forward, outside of what is compiled or computed again.

    A forward hook would be compiled with the layer.
    """
    kind, numbers = type(layers[0]), {layer: number for number, layer in enumerate(layers)}

    def call(self: nn.Module, *args: Any, **options: Any) -> Any:
        work(numbers[self])
        return kind.__call__(self, *args, **options)

    announced = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    for layer in layers:
        layer.__class__ = announced
