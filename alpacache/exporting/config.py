"""Settings of `export`."""

from dataclasses import dataclass

from alpacache.config import Config, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(Config):
    """Settings of `export`."""

    model: Place
    """Hub id or directory of the model that the run was trained from."""
    checkpoint: Place
    """Run directory (its best checkpoint, else its last) or one of its checkpoints."""
    out: Place
    """Directory to write; must not exist, be empty (a mount point will do) or hold just this export already."""
    ema: bool = False
    """Export the average of the weights that a run with `--ema` kept."""
    expert_only: bool = False
    """Leave out the VLM: enough for `train` and `eval`, not for the public code."""
