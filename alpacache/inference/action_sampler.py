"""Sampling actions from cached prefixes, all flow steps of a batch at once: on a GPU as one CUDA graph.

Ten steps of 36 layers are thousands of small kernels, and launching them one by one takes longer than running them: on
an H100 a graph samples 16.3 instead of 13.6 four-camera samples a second, 20.8 instead of 19.5 of one camera
(benchmarks/results/eval_nvidia-h100-80gb-hbm3_2026-11-25.md). A graph has one batch size and one longest prefix, so a
smaller batch is filled up with its first sample and the longest prefix is that of all samples. Both change results by
rounding only. A sample's paths are more queries of the one prefix that they share, and quantised layers are decoded
once a batch where memory has room for all of them, else once a flow step.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alpacache.alpamayo import ActionExpert
from alpacache.cached_samples.ring import Batch, BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.flow_matching import sample
from alpacache.gpu.capture import captured


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledActions:
    """Actions `[B, K, 64, 2]` (float32) and number of damaged rows `[]`, on the way to the host; `values` waits."""

    batch: Batch
    action: Tensor
    damage: Tensor
    ended: torch.cuda.Event | None

    def values(self, ring: BatchRing) -> Tensor:
        """The actions of the batch's samples. Raises the ring's error if damaged bytes had come into its rows.

        The rows must not be filled again yet, so that the damaged sample can still be named.
        """
        if self.ended is not None:
            self.ended.synchronize()
        if self.damage:
            raise ring.damage_error()
        return self.action[: len(self.batch.rows)]


class ActionSampler:
    """Integrates the expert's velocity from noise to actions, for batches whose prefixes lie in `rows`."""

    def __init__(self, expert: ActionExpert, rows: PrefixRows, *, paths: int, flow_steps: int, capture: bool) -> None:
        self._expert, self._flow_steps = expert, flow_steps
        self._cuda = self._fixed = expert.device.type == "cuda"
        """Fixed: computed on the rows' batch size and the longest of all prefixes, however few and short the batch's
        are, as a graph has to; without a graph as well, so that both give the same numbers."""
        self._capture = capture and self._cuda
        self._graph: torch.cuda.CUDAGraph | None = None
        self._staged = StagedBatch(rows, expert, draws=paths)
        self._action = torch.zeros_like(self._staged.noise)

    def run(self, batch: Batch, noise: Tensor) -> SampledActions:
        """Enqueue all flow steps of a batch from `noise [B, K, 64, 2]` on the CPU."""
        staged = self._staged
        staged.put(batch, noise)
        shape = (staged.size, staged.rows.longest) if self._fixed else (len(batch.rows), max(batch.lengths))
        if self._capture and self._graph is None:
            self._graph = captured(partial(self._compute, *shape))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute(*shape)
        damage = torch.count_nonzero(staged.rows.damage).to("cpu", non_blocking=True)
        action = self._action.to("cpu", non_blocking=True, copy=True)  # from a GPU to page-locked memory
        ended = torch.cuda.current_stream().record_event() if self._cuda else None
        return SampledActions(batch=batch, action=action, damage=damage, ended=ended)

    def _compute(self, count: int, longest: int) -> None:
        """Actions of the first `count` samples, whose prefixes have at most `longest` tokens."""
        prefixes = self._staged.prefixes(slice(count), longest=longest)
        noise = self._staged.noise[:count]
        action = sample(lambda x, t: self._expert.velocity(x, t, prefixes), noise, steps=self._flow_steps)
        self._action[:count].copy_(action)
