"""Sampling actions from cached prefixes, all flow steps of a batch at once: on a GPU as one CUDA graph.

Ten steps of 36 layers are thousands of small kernels, bound by launching them until they are captured. As in
`train_step`, all that differs from batch to batch lies at fixed addresses: a graph has one number of samples, so a
smaller batch is filled up with its first one, and one longest prefix, that of all samples. Both change results by
rounding only. A sample's paths are more queries of the one prefix that they share, and quantised layers are decoded
once a batch where memory has room for all of them, else once a step.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache.alpamayo import ActionExpert, PackedPrefixes
from alpacache.cached_samples.graph_inputs import StepInputs
from alpacache.cached_samples.ring import Batch, BatchRing
from alpacache.flow_matching import sample
from alpacache.gpu.capture import captured
from alpacache.prefix.layout import LEAST_DECODED, PrefixLayout

if TYPE_CHECKING:
    from alpacache.prefix.layers_ahead import LayersAhead  # needs Triton

_SPARE_BYTES = 2 * 2**30
"""GPU memory that decoded layers leave to activations and libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledActions:
    """Actions of a batch that were enqueued; not there before `values` has waited for them."""

    batch: Batch
    action: Tensor
    """`[B, K, 64, 2]` float32 on the host."""
    damage: Tensor
    """`[]` on the host: how many rows of the ring are damaged."""
    ended: torch.cuda.Event | None

    def values(self) -> tuple[Tensor, bool]:
        """The actions of the batch's samples, and whether damaged bytes had come into the ring."""
        if self.ended is not None:
            self.ended.synchronize()
        return self.action[: len(self.batch.rows)], bool(self.damage)


class ActionSampler:
    """Buffers for batches of one size, and the graph that works on them."""

    def __init__(
        self,
        expert: ActionExpert,
        ring: BatchRing,
        *,
        batch_size: int,
        paths: int,
        flow_steps: int,
        capture: bool,
        fixed: bool | None = None,
    ) -> None:
        """`fixed`: compute on `batch_size` samples and the longest of all prefixes, however few and short the batch's
        are, as a graph has to; by default on a GPU, captured or not, so that the numbers are the same."""
        device = expert.device
        self._expert, self._ring, self._flow_steps = expert, ring, flow_steps
        self._cuda = device.type == "cuda"
        self._fixed = self._cuda if fixed is None else fixed
        self._capture = capture and self._cuda
        self._graph: torch.cuda.CUDAGraph | None = None
        waypoints = expert.action_space.waypoints
        self._inputs = StepInputs(batch_size=batch_size, draws=paths, waypoints=waypoints, device=device)
        self._action = torch.zeros(batch_size, paths, waypoints, 2, device=device)
        self._places: Tensor | None = None
        self._decoding: torch.cuda.Stream | None = None
        if self._cuda and ring.layout.codec is not None and expert.dtype == torch.bfloat16:
            self._make_places(ring.layout, batch_size, ring.longest)

    def run(self, batch: Batch, noise: Tensor) -> SampledActions:
        """Enqueue all flow steps of a batch from `noise [B, K, 64, 2]` on the CPU."""
        count, (size, paths) = len(batch.rows), self._action.shape[:2]
        filled = [*range(count), *[0] * (size - count)]
        places = torch.tensor([batch.rows, batch.lengths, batch.starts])[:, filled]
        # Action, times and rate are for training; the state and its times are made on the device.
        action, t = torch.zeros(size, 1, *noise.shape[2:]), torch.zeros(size, paths)
        self._inputs.put(places=places, action=action, noise=noise[filled], t=t, lr=0.0, stop=False)
        if batch.ready is not None:
            torch.cuda.current_stream().wait_event(batch.ready)
        shape = (size, self._ring.longest) if self._fixed else (count, max(batch.lengths))
        if self._capture and self._graph is None:
            self._graph = self._captured(*shape)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute(*shape)
        return self._result(batch)

    def _compute(self, count: int, longest: int) -> None:
        """Actions of the first `count` samples, no prefix of which is above `longest` tokens."""
        rows, lengths, starts = self._inputs.places[:, :count]
        prefixes = PackedPrefixes(
            layout=self._ring.layout,
            data=self._ring.data,
            rows=rows,
            lengths=lengths,
            starts=starts,
            longest=longest,
            dtype=self._expert.dtype,
            ahead=self._decoded(),
        )
        noise = self._inputs.noise[:count]
        action = sample(lambda x, t: self._expert.velocity(x, t, prefixes), noise, steps=self._flow_steps)
        self._action[:count].copy_(action)

    def _captured(self, count: int, longest: int) -> torch.cuda.CUDAGraph:
        return captured(partial(self._compute, count, longest))

    def _decoded(self) -> "LayersAhead | None":
        """What decodes layers for one integration."""
        if self._places is None:
            return None
        from alpacache.prefix.layers_ahead import LayersAhead

        return LayersAhead(self._places, self._decoding)

    def _result(self, batch: Batch) -> SampledActions:
        flags = self._ring.damage
        damage = torch.zeros((), dtype=torch.int64) if flags is None else torch.count_nonzero(flags)
        if not self._cuda:
            return SampledActions(batch=batch, action=self._action.clone(), damage=damage, ended=None)
        action = torch.empty(self._action.shape, pin_memory=True)
        action.copy_(self._action, non_blocking=True)
        counted = torch.empty((), dtype=torch.int64, pin_memory=True)
        counted.copy_(damage, non_blocking=True)
        ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ended.record()
        return SampledActions(batch=batch, action=action, damage=counted, ended=ended)

    def _make_places(self, layout: PrefixLayout, samples: int, longest: int) -> None:
        """Memory for all decoded layers if it is free, else for two, which a stream of its own fills in turn."""
        from alpacache.prefix import layers_ahead

        device, layers = self._expert.device, layout.layers
        rows, row_bytes = layout.scratch_shape(samples, longest)
        if not _is_free(layers * rows * row_bytes, device):
            layers = LEAST_DECODED
            self._decoding = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._places = layers_ahead.make_places(layout, samples, longest, device, layers=layers)


def _is_free(size_bytes: int, device: torch.device) -> bool:
    """Whether so much GPU memory can be had and enough is left."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size_bytes + _SPARE_BYTES <= torch.cuda.mem_get_info(device)[0] + idle
