"""Settings of `demo`."""

from dataclasses import dataclass

from alpacache.config import Config, Place, Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig(Config):
    """Settings of `demo`."""

    out: Place = "demo"
    """Directory for everything; must be new or empty."""
    seed: Seed = 0
    """Seed of training and evaluation."""
