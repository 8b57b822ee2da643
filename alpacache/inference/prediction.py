"""Paths from cached prefixes, on noise that every model shares."""

from collections.abc import Generator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache import randomness
from alpacache.alpamayo import ActionExpert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import CachedSample
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.flow_matching import sample as sample_flow
from alpacache.inference.action_sampler import ActionSampler, SampledActions

Paths: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
"""xyz `[K, 64, 3]` (m, ego frame at t0) and rotations `[K, 64, 3, 3]` of one sample."""
_LEAST_BUFFERS = 4
"""Samples between disk and device at the least. A batch is enough: computing on it takes longer than copying it."""


@torch.no_grad()
def predict_actions(
    expert: ActionExpert, samples: Sequence[CachedSample], *, paths: int, flow_steps: int, seed: int
) -> Tensor:
    """Sampled actions `[B, K, 64, 2]`, on the CPU.

    If samples come with tails of reasoning rollouts, there must be K of them: path k is that of rollout k, as in the
    public sampler. The noise depends on the seed and the sample id alone, so every model sees the same and batch size
    changes nothing.
    """
    noise = eval_noise(seed, [sample.sample_id for sample in samples], paths).to(expert.device)
    if any(sample.tails for sample in samples):
        pairs = zip(samples, noise, strict=True)
        return torch.stack([_after_rollouts(expert, sample, draws, flow_steps) for sample, draws in pairs])
    batch = expert.batch([sample.prefix for sample in samples])
    return sample_flow(lambda x, t: expert.velocity(x, t, batch), noise, steps=flow_steps).cpu()


def predict_ahead(
    expert: ActionExpert,
    data: CachedDataset,
    indices: Sequence[int],
    *,
    paths: int,
    flow_steps: int,
    seed: int,
    batch_size: int,
    capture: bool = True,
) -> Generator[tuple[Sequence[int], Tensor]]:
    """Batch by batch, the indices and their actions on the direct prefixes, as from `predict_actions`.

    Samples are read and copied while earlier batches are computed, and stay as they are stored. On a GPU an integration
    is one CUDA graph with `capture`, and the same kernels without; a batch is yielded when the next one is enqueued.
    Close the generator if it is not read to its end. Raises what `BatchRing` does.
    """
    batch_size = min(batch_size, len(indices))
    starts = range(0, len(indices), batch_size)
    batches = ([(index, index) for index in indices[start : start + batch_size]] for start in starts)
    rows = PrefixRows(data.layout, data.longest, batch_size=batch_size, device=expert.device, check_on_device=True)
    ring = BatchRing(data, expert.action_space, batches, rows, buffers=max(_LEAST_BUFFERS, batch_size))
    sampler = ActionSampler(expert, rows, paths=paths, flow_steps=flow_steps, capture=capture)
    before: SampledActions | None = None
    with ring:
        for batch in ring:
            underway = sampler.run(batch, eval_noise(seed, batch.sample_ids, paths))
            ring.done(batch)
            if before is not None:
                ring.release_finished()
                yield before.batch.positions, before.values(ring)
            before = underway
        if before is not None:
            yield before.batch.positions, before.values(ring)


def to_paths(space: UnicycleActionSpace, action: Tensor, history_xyz: Tensor, history_rot: Tensor) -> Paths:
    """Paths of one sample's actions `[K, 64, 2]`."""
    xyz, rot = space.to_path(action, history_xyz, history_rot)
    return xyz.numpy(), rot.numpy()


def eval_noise(seed: int, sample_ids: Sequence[str], paths: int) -> Tensor:
    """The noise `[B, K, 64, 2]` that every model is judged on."""
    return torch.stack([randomness.noise("eval", seed, sample_id, draws=paths) for sample_id in sample_ids])


def _after_rollouts(expert: ActionExpert, sample: CachedSample, noise: Tensor, flow_steps: int) -> Tensor:
    """Actions `[K, 64, 2]` from noise `[K, 64, 2]`, each on its own rollout: K whole prefixes."""
    if len(sample.tails) != len(noise):
        raise ValueError(f"{sample.sample_id}: {len(sample.tails)} tails for {len(noise)} paths; expected one a path.")
    batch = expert.batch(sample.rollout_prefixes(expert.device))
    return sample_flow(lambda x, t: expert.velocity(x, t, batch), noise[:, None], steps=flow_steps)[:, 0].cpu()
