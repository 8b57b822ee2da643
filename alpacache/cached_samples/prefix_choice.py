"""Chooses the prefix that a sample is trained on: the direct one, or that of one of its reasoning rollouts.

The deployed sampler attends to a reasoning text that the VLM has just generated, the direct prefix has none. Like all
randomness the choice is a function of what it is for, so nothing but sample, epoch and seed decides it.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

TrainedPrefix: TypeAlias = Literal["direct", "rollouts", "mix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixChoice:
    """Chooses anew for each sample in each epoch."""

    prefix: TrainedPrefix = "direct"
    """`rollouts`: each of a sample's rollouts with equal probability; `mix`: half of the times the direct prefix."""
    route_dropout: float = 0.0
    """Probability that a sample with a route has the direct prefix without it, whatever `prefix` says."""
    seed: object = 0
    """First part of the key of the choice."""

    @property
    def is_direct(self) -> bool:
        """True if samples have their direct prefixes alone."""
        return self.prefix == "direct" and not self.route_dropout

    def drops_route(self, sample_id: str, epoch: int) -> bool:
        """Tell whether a sample with a route is without it in an epoch."""
        if not self.route_dropout:
            return False
        import torch  # as below

        from alpacache import randomness

        return float(torch.rand((), generator=randomness.generator("route", self.seed, sample_id, epoch))) < (
            self.route_dropout
        )

    def tail(self, sample_id: str, epoch: int, *, rollouts: int) -> int | None:
        """Number of the rollout, of so many, whose tail a sample has in an epoch; None for the direct one."""
        if self.prefix == "direct":
            return None
        import torch  # `alpacache --help` knows the choices without it

        from alpacache import randomness

        options = rollouts if self.prefix == "rollouts" else 2 * rollouts
        source = randomness.generator("prefix", self.seed, sample_id, epoch)
        chosen = int(torch.randint(options, (), generator=source))
        return chosen if chosen < rollouts else None
