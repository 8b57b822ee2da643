"""Paths from cached prefixes, on noise that every model shares."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache import flow_matching, randomness
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import CachedSample
from alpacache.cached_samples.ring import Batch, BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.flow_matching import TimeSchedule, guided
from alpacache.flow_matching import sample as sample_flow
from alpacache.gpu.capture import captured
from alpacache.prefix.packed import NoPrefix, PackedPrefixes
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

Paths: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
"""xyz `[K, 64, 3]` (m, ego frame at t0) and rotations `[K, 64, 3, 3]` of one sample."""
LOSS_DRAWS = 4
"""Noise draws of the loss of a held-out sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Actions that an expert makes of one batch of samples, on the CPU."""

    indices: Sequence[int]
    actions: Tensor
    """`[S, B, K, 64, 2]` float32: one for each number of flow steps, in their order."""
    losses: Tensor | None = None
    """`[B]` flow loss on the draws of `validation_draws`, where it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledActions:
    """Actions `[S, B, K, 64, 2]`, losses `[B]` (float32) and number of damaged rows `[]`, on the way to the host;
    `prediction` waits."""

    batch: Batch
    action: Tensor
    losses: Tensor | None
    damage: Tensor
    ended: torch.cuda.Event | None

    def prediction(self, ring: BatchRing) -> Prediction:
        """What was computed. Raises the ring's error if damaged bytes had come into its rows.

        The rows must not be filled again yet, so that the damaged sample can still be named.
        """
        if self.ended is not None:
            self.ended.synchronize()
        if self.damage:
            raise ring.damage_error()
        actions = self.action[:, : len(self.batch.rows)]
        return Prediction(indices=self.batch.positions, actions=actions, losses=self.losses)


class ActionSampler:
    """Integrates the expert's velocity, all flow steps of a batch at once: on a GPU as one CUDA graph.

    Ten steps of 36 layers are thousands of small kernels, and launching them one by one takes longer than running them:
    on an H100 a graph samples 16.3 instead of 13.6 four-camera samples a second, 20.8 instead of 19.5 of one camera
    (benchmarks/results/eval_nvidia-h100-80gb-hbm3_2026-11-25.md). A graph has one batch size and one longest prefix, so
    a smaller batch is filled up with its first sample and the longest prefix is that of all samples. Both change
    results by rounding only. A sample's paths are more queries of the one prefix that they share, and quantised layers
    are decoded once a batch where memory has room for all of them, else once a flow step.
    """

    def __init__(
        self, expert: "ActionExpert", rows: PrefixRows, *, paths: int, flow_steps: Sequence[int], capture: bool
    ) -> None:
        """`flow_steps`: numbers of steps, with each of which the paths are sampled from the same noise."""
        self._expert, self._flow_steps = expert, tuple(flow_steps)
        self._cuda = self._fixed = expert.device.type == "cuda"
        """Fixed: computed on the rows' batch size and the longest of all prefixes, however few and short the batch's
        are, as a graph has to; without a graph as well, so that both give the same numbers."""
        self._capture = capture and self._cuda
        self._graph: torch.cuda.CUDAGraph | None = None
        self._staged = StagedBatch(rows, expert, draws=paths)
        self._action = self._staged.noise.new_zeros(len(self._flow_steps), *self._staged.noise.shape)

    def run(self, batch: Batch, noise: Tensor, *, flow: tuple[Tensor, Tensor, Tensor] | None = None) -> SampledActions:
        """Enqueue all flow steps of a batch from `noise [B, K, 64, 2]` on the CPU.

        `flow`: targets, noise and times that the loss is wanted of, as in `flow_loss`.
        """
        staged = self._staged
        staged.put(batch, noise)
        shape = (staged.size, staged.rows.longest) if self._fixed else (len(batch.rows), batch.longest)
        if self._capture and self._graph is None:
            self._graph = captured(partial(self._compute, *shape))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute(*shape)
        losses = None
        if flow is not None:
            prefixes = staged.prefixes(slice(len(batch.rows)), longest=batch.longest)
            with torch.no_grad():
                losses = flow_loss(self._expert, *flow, prefixes).to("cpu", non_blocking=True, copy=True)
        damage = torch.count_nonzero(staged.rows.damage).to("cpu", non_blocking=True)
        action = self._action.to("cpu", non_blocking=True, copy=True)  # from a GPU to page-locked memory
        ended = torch.cuda.current_stream().record_event() if self._cuda else None
        return SampledActions(batch=batch, action=action, losses=losses, damage=damage, ended=ended)

    def _compute(self, count: int, longest: int) -> None:
        """Actions of the first `count` samples, whose prefixes have at most `longest` tokens."""
        prefixes = self._staged.prefixes(slice(count), longest=longest)
        noise = self._staged.noise[:count]
        for steps, into in zip(self._flow_steps, self._action, strict=True):
            into[:count].copy_(sample_flow(lambda x, t: self._expert.velocity(x, t, prefixes), noise, steps=steps))


@torch.no_grad()
def predict_actions(
    expert: "ActionExpert", samples: Sequence[CachedSample], *, paths: int, flow_steps: int, seed: int
) -> Tensor:
    """Sampled actions `[B, K, 64, 2]`, on the CPU.

    If samples come with tails of reasoning rollouts, there must be K of them: path k is that of rollout k, as in the
    public sampler. The noise depends on the seed and the sample id alone, so every model sees the same and batch size
    changes nothing.
    """
    noise = eval_noise(seed, [sample.sample_id for sample in samples], paths).to(expert.device)
    if any(sample.tails for sample in samples):
        pairs = zip(samples, noise, strict=True)
        return torch.stack([after_rollouts(expert, sample, draws, flow_steps=flow_steps) for sample, draws in pairs])
    return sampled(expert, [sample.prefix for sample in samples], noise, flow_steps)


@torch.no_grad()
def predict_on_twins(
    expert: "ActionExpert", samples: Sequence[CachedSample], *, paths: int, flow_steps: int, seed: int
) -> Tensor:
    """`predict_actions` on the twins that the samples come with, from the same noise."""
    noise = eval_noise(seed, [sample.sample_id for sample in samples], paths).to(expert.device)
    return sampled(expert, [sample.twin_prefix(expert.device) for sample in samples], noise, flow_steps)


@torch.no_grad()
def predict_guided(
    expert: "ActionExpert", samples: Sequence[CachedSample], *, guidance: float, paths: int, flow_steps: int, seed: int
) -> Tensor:
    """`predict_actions` guided by the samples' routes: they come with their twins without one, or have none.

    Both prefixes are of one stem, each with a start position of its own; the noise is that of `predict_actions`.
    """
    noise = eval_noise(seed, [sample.sample_id for sample in samples], paths).to(expert.device)
    routed = expert.batch([sample.prefix for sample in samples])
    plain = expert.batch(
        [sample.prefix if sample.twin is None else sample.twin_prefix(expert.device) for sample in samples]
    )

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return guided(expert.velocity(x, t, routed), expert.velocity(x, t, plain), guidance)

    return sample_flow(velocity, noise, steps=flow_steps).cpu()


def predict_ahead(
    expert: "ActionExpert",
    data: CachedDataset,
    indices: Sequence[int],
    *,
    paths: int,
    flow_steps: Sequence[int],
    seed: int,
    batch_size: int,
    capture: bool = True,
    sample_id: Callable[[int], str] | None = None,
    prefix_of: Callable[[int], int] | None = None,
    target_of: Callable[[int], Tensor] | None = None,
) -> Generator[Prediction]:
    """Batch by batch, what an expert predicts on direct prefixes; the actions are those of `predict_actions`.

    Samples are read and copied while earlier batches are computed, and stay as they are stored; each prefix is read
    once for all numbers of flow steps. On a GPU an integration is one CUDA graph with `capture`, and the same kernels
    without; a batch is yielded when the next one is enqueued. Close the generator if it is not read to its end.
    Only the layers that the expert attends to are read.

    Args:
        sample_id: names the samples that `indices` stand for, whose noise is taken; by default those of `data`.
        prefix_of: index in `data` of the sample whose prefix is read for one of `indices`; by default its own.
        target_of: true action `[64, 2]` of one of `indices`; with it there are losses.

    Raises what `BatchRing` and `CachedDataset.of_layers` do.
    """
    data = data.of_layers(expert.prefix_layers)
    batch_size = min(batch_size, len(indices))
    starts = range(0, len(indices), batch_size)
    sample_id, prefix_of = sample_id or data.sample_id, prefix_of or (lambda index: index)
    batches = ([(index, prefix_of(index)) for index in indices[start : start + batch_size]] for start in starts)
    rows = PrefixRows(data.layout, data.longest, batch_size=batch_size, device=expert.device, check_on_device=True)
    # Buffers for a batch are enough, because computing on it takes longer than copying it.
    ring = BatchRing(data, expert.action_space, batches, rows, buffers=max(4, batch_size))
    sampler = ActionSampler(expert, rows, paths=paths, flow_steps=flow_steps, capture=capture)
    before: SampledActions | None = None
    with ring:
        for batch in ring:
            names = [sample_id(index) for index in batch.positions]
            flow = None if target_of is None else _flow(batch.positions, names, target_of, expert.device)
            underway = sampler.run(batch, eval_noise(seed, names, paths), flow=flow)
            ring.done(batch)
            if before is not None:
                ring.release_finished()
                yield before.prediction(ring)
            before = underway
        if before is not None:
            yield before.prediction(ring)


def predict_blind(
    expert: "ActionExpert",
    indices: Sequence[int],
    *,
    paths: int,
    flow_steps: Sequence[int],
    seed: int,
    batch_size: int,
    sample_id: Callable[[int], str],
    start_of: Callable[[int], int],
    target_of: Callable[[int], Tensor],
) -> Generator[Prediction]:
    """Like `predict_ahead`, from the same noise without any prefix.

    `start_of`: position of a sample's first action token, which stands where it would behind the prefix.
    """
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        names = [sample_id(index) for index in rows]
        prefix = NoPrefix(starts=torch.tensor([start_of(index) for index in rows], device=expert.device))
        noise = eval_noise(seed, names, paths).to(expert.device)
        actions = [_sampled_on(expert, prefix, noise, steps) for steps in flow_steps]
        with torch.no_grad():
            losses = flow_loss(expert, *_flow(rows, names, target_of, expert.device), prefix).cpu()
        yield Prediction(indices=rows, actions=torch.stack(actions), losses=losses)


def to_paths(space: UnicycleActionSpace, action: Tensor, history_xyz: Tensor, history_rot: Tensor) -> Paths:
    """Paths of one sample's actions `[K, 64, 2]`."""
    xyz, rot = space.to_path(action, history_xyz, history_rot)
    return xyz.numpy(), rot.numpy()


def eval_noise(seed: int, sample_ids: Sequence[str], paths: int) -> Tensor:
    """The noise `[B, K, 64, 2]` that every model is judged on."""
    return torch.stack([randomness.noise("eval", seed, sample_id, draws=paths) for sample_id in sample_ids])


def validation_draws(sample_ids: Sequence[str], *, schedule: TimeSchedule = "beta") -> tuple[Tensor, Tensor]:
    """The noise `[B, 4, 64, 2]` and times `[B, 4]` of the loss of held-out samples, which never change."""
    noise = torch.stack([randomness.noise("val", name, draws=LOSS_DRAWS) for name in sample_ids])
    t = torch.stack([randomness.times("val", name, draws=LOSS_DRAWS, schedule=schedule) for name in sample_ids])
    return noise, t


def flow_loss(
    expert: "ActionExpert",
    action: Tensor,
    noise: Tensor,
    t: Tensor,
    prefixes: PackedPrefixes | NoPrefix | Sequence[PrefixFeatures | EncodedPrefix],
    *,
    causal: bool = False,
) -> Tensor:
    """Loss of each sample `[B]`, mean over its draws.

    `action [B, 1, 64, 2]`, `noise [B, K, 64, 2]` and `t [B, K]` are on the expert's device.
    """
    velocity = expert.velocity(flow_matching.interpolate(action, noise, t), t, prefixes, causal=causal)
    return flow_matching.loss(velocity, action, noise, rounds_target=expert.rounds_target).mean(dim=1)


def _flow(
    indices: Sequence[int], sample_ids: Sequence[str], target_of: Callable[[int], Tensor], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets `[B, 1, 64, 2]`, noise and times of the loss, on the expert's device."""
    action = torch.stack([target_of(index) for index in indices])[:, None]
    noise, t = (_sent(part, device) for part in validation_draws(sample_ids))
    return _sent(action, device), noise, t


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on its way to the device; the host does not wait for what is enqueued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@torch.no_grad()
def after_rollouts(expert: "ActionExpert", sample: CachedSample, noise: Tensor, *, flow_steps: int) -> Tensor:
    """Actions `[K, 64, 2]` on the CPU from noise `[K, 64, 2]`, each on its own rollout: K whole prefixes."""
    if len(sample.tails) != len(noise):
        raise ValueError(f"{sample.sample_id}: {len(sample.tails)} tails for {len(noise)} paths; expected one a path.")
    return sampled(expert, sample.rollout_prefixes(expert.device), noise[:, None].to(expert.device), flow_steps)[:, 0]


@torch.no_grad()
def sampled(
    expert: "ActionExpert", prefixes: Sequence[PrefixFeatures | EncodedPrefix], noise: Tensor, flow_steps: int
) -> Tensor:
    """Actions `[B, K, 64, 2]`, on the CPU, from noise of that shape on these B prefixes."""
    return _sampled_on(expert, expert.batch(prefixes), noise, flow_steps)


def _sampled_on(expert: "ActionExpert", prefix: PackedPrefixes | NoPrefix, noise: Tensor, flow_steps: int) -> Tensor:
    return sample_flow(lambda x, t: expert.velocity(x, t, prefix), noise, steps=flow_steps).cpu()
