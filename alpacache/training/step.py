"""One optimizer step on one batch: forward, backward, clipping and optimizer, on a GPU as one CUDA graph.

A step of this size is bound by launching kernels until it is captured. So all that differs from step to step lies in
tensors at fixed addresses: inputs, rows and lengths of the prefixes, learning rate. They reach the device as one small
copy while the step before is computed: later it would wait behind the next batch's prefixes, which begin to be copied
as soon as that step has ended. A step that is not finite is skipped on the device, and the host reads loss and norm of
a step when it has already enqueued the next. So is every step from the first on whose rows' checksums are wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alpacache import flow_matching
from alpacache.alpamayo import ActionExpert, EncodedPrefix, PackedPrefixes, PrefixFeatures
from alpacache.cached_samples.graph_inputs import StepInputs
from alpacache.cached_samples.ring import Batch, BatchRing
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.gpu.capture import captured
from alpacache.prefix.layout import LEAST_DECODED
from alpacache.training.step_optimizer import StepOptimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Loss and gradient norm of a step that was enqueued; not there before `values` has waited for it."""

    batch: Batch
    numbers: Tensor
    """`[4 + B]` float32 on the host: loss, gradient norm, requests to stop, damaged rows, and the loss of each of this
    process's samples."""
    began: torch.cuda.Event | None
    """When its samples and everything before it were there."""
    ended: torch.cuda.Event | None

    def values(self) -> "StepValues":
        """Read them; waits for the step."""
        if self.ended is not None:
            self.ended.synchronize()
        loss, norm, stop, damaged, *losses = self.numbers.tolist()
        return StepValues(loss=loss, norm=norm, stop=stop > 0, damaged=damaged > 0, losses=losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValues:
    """What came of a step, over all processes but for `losses`."""

    loss: float
    norm: float
    """Of the gradient, before clipping."""
    stop: bool
    """Some process would like to end after this step."""
    damaged: bool
    """Damaged bytes had come into the ring of some process: neither this step nor any after it changed anything."""
    losses: list[float]
    """Of each sample of this process."""


class TrainStep:
    """Buffers for batches of one size, and the graph that works on them."""

    def __init__(
        self,
        expert: ActionExpert,
        parameters: dict[str, nn.Parameter],
        optimizer: StepOptimizer,
        ring: BatchRing,
        *,
        batch_size: int,
        micro_batch: int,
        draws: int,
        clip: float,
        causal: bool,
        capture: bool,
        compile_layers: bool = False,
        decoded_layers: int = LEAST_DECODED,
        shared: ShardedUpdate,
    ) -> None:
        """`batch_size` samples of this process; `micro_batch` of them go through the expert at a time.

        `decoded_layers`: of encoded prefixes, how many layers of a micro-batch there is room for.
        """
        self._expert, self._optimizer = expert, optimizer
        self._parameters = list(parameters.values())
        self._micro_batch, self._clip, self._causal = micro_batch, clip, causal
        self._shared = shared
        self._graph: torch.cuda.CUDAGraph | None = None
        device = expert.device
        self._cuda = device.type == "cuda"
        self._capture = capture and self._cuda
        if compile_layers and self._cuda:
            for layer in expert.expert.layers:
                layer.compile()
        waypoints = expert.action_space.waypoints
        self._inputs = StepInputs(batch_size=batch_size, draws=draws, waypoints=waypoints, device=device)
        self._dry = torch.zeros((), dtype=torch.bool, device=device)
        self._numbers = torch.zeros(4 + batch_size, device=device)
        self._damage = torch.zeros(1, dtype=torch.int32, device=device) if ring.damage is None else ring.damage
        rows, lengths, starts = self._inputs.places
        self._prefixes = PackedPrefixes(
            layout=ring.layout,
            data=ring.data,
            rows=rows,
            lengths=lengths,
            starts=starts,
            longest=ring.longest,
            dtype=expert.dtype,
        )
        self._places_ahead: Tensor | None = None
        self._decoding: torch.cuda.Stream | None = None
        if self._cuda and ring.layout.codec is not None and expert.dtype == torch.bfloat16:
            from alpacache.prefix.layers_ahead import make_places

            samples = min(micro_batch, batch_size)
            self._places_ahead = make_places(ring.layout, samples, ring.longest, device, layers=decoded_layers)
            self._decoding = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, batch: Batch, noise: Tensor, t: Tensor, lr: float, *, stop: bool = False) -> StepResult:
        """Enqueue one step; `noise [B, K, 64, 2]` and `t [B, K]` on the CPU.

        `stop`: this process would like to end after it; the result says whether any would.
        """
        places = torch.tensor([batch.rows, batch.lengths, batch.starts])
        self._inputs.put(places=places, action=batch.action[:, None], noise=noise, t=t, lr=lr, stop=stop)
        if batch.ready is not None:
            torch.cuda.current_stream().wait_event(batch.ready)
        began = self._event()
        if self._capture and self._graph is None:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()
        if not self._cuda:
            return StepResult(batch=batch, numbers=self._numbers.clone(), began=None, ended=None)
        numbers = torch.empty(len(self._numbers), pin_memory=True)
        numbers.copy_(self._numbers, non_blocking=True)
        return StepResult(batch=batch, numbers=numbers, began=began, ended=self._event())

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _compute(self) -> None:
        self._forget_gradients()
        inputs = self._inputs
        batch_size = len(inputs.action)
        everyone = batch_size * self._shared.world.size
        losses = []
        for start in range(0, batch_size, self._micro_batch):
            self._shared.is_last_backward = start + self._micro_batch >= batch_size
            part = slice(start, start + self._micro_batch)
            loss = flow_loss(
                self._expert,
                inputs.action[part],
                inputs.noise[part],
                inputs.t[part],
                self._slice(part),
                causal=self._causal,
            )
            (loss.sum() / everyone).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        each = torch.cat(losses)
        self._shared.finish_sum()
        squared_norm = self._shared.squared_norm()
        damaged = torch.count_nonzero(self._damage).float()
        sums = torch.stack([each.sum() / everyone, squared_norm, inputs.stop, damaged])
        self._shared.world.all_reduce(sums)
        total, squared_norm, stop, damaged = sums
        norm = squared_norm.sqrt()
        scale = (self._clip / (norm + 1e-6)).clamp(max=1.0)
        bad = ~(torch.isfinite(total) & torch.isfinite(norm)) | (damaged > 0)
        self._optimizer.step(lr=inputs.lr, scale=scale, skip=bad | self._dry, updated=self._shared.gather_updated)
        self._shared.finish_update()
        self._numbers.copy_(torch.cat([torch.stack([total, norm, stop, damaged]), each]))

    def _slice(self, part: slice) -> PackedPrefixes:
        rows, lengths, starts = self._inputs.places[:, part]
        ahead = None
        if self._places_ahead is not None:
            from alpacache.prefix.layers_ahead import LayersAhead

            ahead = LayersAhead(self._places_ahead[:, : len(rows)], self._decoding)
        return replace(self._prefixes, rows=rows, lengths=lengths, starts=starts, ahead=ahead)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; nothing changes by warming up."""
        self._dry.fill_(True)
        graph = captured(self._compute, after_warm_up=self._forget_gradients)
        self._dry.fill_(False)
        return graph

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def flow_loss(
    expert: ActionExpert,
    action: Tensor,
    noise: Tensor,
    t: Tensor,
    prefixes: PackedPrefixes | Sequence[PrefixFeatures | EncodedPrefix],
    *,
    causal: bool,
) -> Tensor:
    """Each sample's loss `[B]`, mean over its draws.

    `action [B, 1, 64, 2]`, `noise [B, K, 64, 2]` and `t [B, K]` are on the expert's device.
    """
    velocity = expert.velocity(flow_matching.interpolate(action, noise, t), t, prefixes, causal=causal)
    return flow_matching.loss(velocity, action, noise).mean(dim=1)
