"""`--draws auto`: more noise draws a sample where the GPU would otherwise wait for the disk.

A sample of hundreds of megabytes serves one draw as well as eight, and more draws make the gradient less noisy. So K is
the least at which a step takes as long as the stores need for the next batch; it never slows a run down by much.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from alpacache.cached_samples.ring import BatchRing
from alpacache.planning.machine import Gpu
from alpacache.planning.time_model import compute_seconds, optimizer_seconds
from alpacache.planning.workload import MAX_DRAWS, MemoryPlan, Workload

DELIVERED_BATCHES = 5
"""Read to learn how fast batches come; the first does not count."""
_DELIVERY_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoDraws:
    """The choice and why."""

    draws: int
    batch_s: float
    """Seconds in which the stores deliver a batch."""
    step_s: float
    """Estimated seconds of a step with these draws."""


def choose_draws(
    plan_for: Callable[[int], MemoryPlan | None], work: Workload, *, batch_s: float, gpu: Gpu
) -> AutoDraws:
    """The least number of draws that keeps the GPU busy, or the most that fit.

    Args:
        plan_for: draws -> plan, or None where they do not fit.
        batch_s: from `delivery_seconds`.
        gpu: what a step is to run on.
    """
    chosen: AutoDraws | None = None
    draws = 1
    while draws <= MAX_DRAWS and (plan := plan_for(draws)) is not None:
        step_s = compute_seconds(work, plan, gpu) + optimizer_seconds(work, gpu)
        chosen = AutoDraws(draws=draws, batch_s=batch_s, step_s=step_s)
        if chosen.step_s >= batch_s:
            break
        draws *= 2
    if chosen is None:
        raise ValueError("not even one draw fits; plan for one draw first, which says what to change.")
    return chosen


def delivery_seconds(ring: BatchRing) -> float:
    """Seconds a batch of a ring over a few batches that nobody works on."""
    started, count = 0.0, -1
    with ring:
        for batch in ring:
            ring.done(batch)
            count += 1
            if count == 0:
                started = time.monotonic()
            elif time.monotonic() - started > _DELIVERY_LIMIT_S:
                break
        elapsed = time.monotonic() - started
    return elapsed / count if count > 0 else 0.0
