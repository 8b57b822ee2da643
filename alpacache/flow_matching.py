"""Flow matching between noise and actions.

t = 0 is noise, t = 1 is data: `x_t = t x + (1 - t) n`, and the velocity to learn is `x - n` (Lipman et al. 2023,
arXiv:2210.02747; the beta schedule is that of pi0, arXiv:2410.24164, as the public Alpamayo recipe uses it).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Generator, Tensor

TimeSchedule = Literal["beta", "uniform"]
_MAX_T = 0.999


def draw_times(
    shape: tuple[int, ...], *, schedule: TimeSchedule = "beta", generator: Generator | None = None
) -> Tensor:
    """Training times in `[0, 0.999]`, float32 on the CPU: `0.999 (1 - Beta(1.5, 1))`, or uniform."""
    return times_from_uniform(torch.rand(shape, generator=generator), schedule=schedule)


def times_from_uniform(u: Tensor, *, schedule: TimeSchedule = "beta") -> Tensor:
    """Training times in `[0, 0.999]`: `0.999 (1 - Beta(1.5, 1))`, or uniform.

    The schedule's inverse CDF at `u` in [0, 1): stratified or quasi-random u give stratified times for free.
    """
    if schedule == "uniform":
        return _MAX_T * u
    return _MAX_T * (1.0 - u ** (2.0 / 3.0))


def interpolate(action: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`x_t` between noise and action `[..., 64, 2]` at times `[...]`."""
    t = t[..., None, None]
    return t * action + (1.0 - t) * noise


def loss(velocity: Tensor, action: Tensor, noise: Tensor, *, rounds_target: bool = True) -> Tensor:
    """Squared error `[...]` of the velocity `[..., 64, 2]`, mean over waypoints and the two action channels.

    The target is rounded to the velocity's dtype first, as the public code of most families does; the error is summed
    in float32.
    """
    target = (action - noise).to(velocity.dtype if rounds_target else torch.float32)
    return (velocity.float() - target.float()).square().mean(dim=(-2, -1))


def guided(with_route: Tensor, without: Tensor, weight: float) -> Tensor:
    """Velocity that a route guides: `(1 - weight) without + weight with_route`, in float32.

    Source: the navigation guidance of the public Alpamayo 1.5 and 2 demos (behaviour); there the weight is 3.
    """
    return (1.0 - weight) * without.float() + weight * with_route.float()


@torch.no_grad()
def sample(velocity_fn: Callable[[Tensor, Tensor], Tensor], initial_noise: Tensor, steps: int = 10) -> Tensor:
    """Integrate the velocity from noise to action with Euler steps.

    Args:
        velocity_fn: `(x [..., 64, 2], t [...]) -> [..., 64, 2]`.
        initial_noise: `[..., 64, 2]`; the state stays float32 throughout.
        steps: number of equal steps from t = 0 to t = 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1.")
    x = initial_noise.float()
    times = torch.linspace(0.0, 1.0, steps + 1, device=x.device)
    for start, end in pairwise(times):
        x = x + (end - start) * velocity_fn(x, start.expand(x.shape[:-2])).float()
    return x
