"""What `eval` and `probe` are told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from alpacache.config_file import check_value


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Did it help?"""

    store: str
    model: str
    out: str
    checkpoint: str | None = None
    """A run directory or one of its checkpoints; without it the unmodified model is evaluated."""
    compare: Mapping[str, str] = field(default_factory=dict)
    """More models in the same tables: label -> run directory or checkpoint."""
    ema: bool = False
    """Take the average of the weights that runs with `--ema` kept."""
    reasoning: Literal["auto", "none"] = "auto"
    """`auto`: each path on a reasoning rollout of its own where the store has them; `none`: on the direct prefix."""
    paths: int = 6
    flow_steps: int = 10
    samples: int | None = None
    batch_size: int = 8
    seed: int = 0
    device: str | None = None
    capture: bool = True
    """On a GPU, replay all flow steps of a batch as one CUDA graph; not on reasoning rollouts."""

    def __post_init__(self) -> None:
        for name in ("paths", "flow_steps", "batch_size"):
            check_value(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_value(self.samples is None or self.samples >= 1, "samples", self.samples, "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """What the frozen VLM knows of the road ahead."""

    store: str
    out: str | None = None
    """Directory for `probe.json` and `probe.png`; None writes nothing."""
    layers: Literal["last", "all"] | tuple[int, ...] = "last"
    """`last`: the hidden states after the last layer. Else the cached values of all or these layers, and those."""
    pool: Literal["both", "last", "mean"] = "both"
    """A sample's vector: the last prefix token's, the mean over tokens, or the two side by side."""
    samples: int = 2000
    """At most this many, whole clips by seed; time and memory grow faster than the number."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_value(self.samples >= 1, "samples", self.samples, "at least 1")
        known = self.layers in ("last", "all") or (self.layers and all(layer >= 0 for layer in self.layers))  # type: ignore[operator]
        check_value(bool(known), "layers", self.layers, "last, all or layer numbers counted from 0")
        check_value(self.pool in ("both", "last", "mean"), "pool", self.pool, "both, last or mean")
