"""Paths from cached prefixes, on noise that every model shares."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache import randomness
from alpacache.alpamayo import ActionExpert
from alpacache.features import CachedSample
from alpacache.flow_matching import sample as sample_flow

Paths: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]


@torch.no_grad()
def predict(
    expert: ActionExpert, samples: Sequence[CachedSample], *, paths: int, flow_steps: int, seed: int
) -> list[Paths]:
    """Sampled paths of each sample: xyz `[K, 64, 3]` (m, ego frame at t0) and rotations `[K, 64, 3, 3]`.

    Where samples come with tails of reasoning rollouts, path k is that of rollout k, as the public sampler has it; they
    need K of them. The noise depends on the seed and the sample id alone, so every model sees the same and batch size
    changes nothing.
    """
    noise = torch.stack([randomness.noise("eval", seed, sample.sample_id, draws=paths) for sample in samples]).to(
        expert.device
    )
    if any(sample.tails for sample in samples):
        pairs = zip(samples, noise, strict=True)
        action = torch.stack([_after_rollouts(expert, sample, draws, flow_steps) for sample, draws in pairs])
    else:
        batch = expert.batch([sample.prefix for sample in samples])
        action = sample_flow(lambda x, t: expert.velocity(x, t, batch), noise, steps=flow_steps).cpu()
    result = []
    for row, sample in zip(action, samples, strict=True):
        xyz, rot = expert.action_space.to_path(row, sample.history_xyz, sample.history_rot)
        result.append((xyz.numpy(), rot.numpy()))
    return result


def _after_rollouts(expert: ActionExpert, sample: CachedSample, noise: Tensor, flow_steps: int) -> Tensor:
    """Actions `[K, 64, 2]` from noise `[K, 64, 2]`, each on its own rollout. One sample at a time: K whole prefixes."""
    if len(sample.tails) != len(noise):
        raise ValueError(f"{sample.sample_id}: {len(sample.tails)} tails for {len(noise)} paths; expected one a path.")
    batch = expert.batch(sample.rollout_prefixes(expert.device))
    return sample_flow(lambda x, t: expert.velocity(x, t, batch), noise[:, None], steps=flow_steps)[:, 0].cpu()
