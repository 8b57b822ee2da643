"""Every random number of a run, as a function of what it is for.

Nothing is drawn from a shared stream: a sample's noise depends on the seed and its place in the global order alone, so
neither batch composition, nor worker count, nor a resume, nor the number of GPUs can change it.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from alpacache.driving.sample import FUTURE_STEPS
from alpacache.errors import UsageError
from alpacache.flow_matching import TimeSchedule, times_from_uniform


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key's text."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def numpy_generator(seed: int, *entropy: int, key: tuple[int, ...] = ()) -> np.random.Generator:
    """A numpy generator for a seed with further entropy, and a spawn key. Raises `UsageError` for a negative seed."""
    if seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more.")
    return np.random.default_rng(np.random.SeedSequence([seed, *entropy] if entropy else seed, spawn_key=key))


def noise(*key: object, draws: int) -> Tensor:
    """Standard normal noise `[draws, 64, 2]`, float32."""
    return torch.randn(draws, FUTURE_STEPS, 2, generator=generator("noise", *key))


def times(*key: object, draws: int, schedule: TimeSchedule) -> Tensor:
    """Training times `[draws]`, stratified over the draws: each falls into its own 1 / draws of the distribution."""
    u = torch.rand(draws, generator=generator("time", *key))
    return times_from_uniform((torch.arange(draws) + u) / draws, schedule=schedule)
