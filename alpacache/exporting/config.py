"""Settings of `export`."""

from dataclasses import dataclass

from alpacache.config import Config, Place
from alpacache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(Config):
    """Settings of `export`."""

    model: Place | None = None
    """Hub id or directory of the model that the run was trained from. Required, but for a `--check` alone."""
    checkpoint: Place | None = None
    """Run directory (its best checkpoint, else its last) or one of its checkpoints. Required, but for a `--check`
    alone."""
    out: Place
    """Directory to write; must not exist, be empty (a mount point will do) or hold just this export already."""
    ema: bool = False
    """Export the average of the weights that a run with `--ema` kept."""
    expert_only: bool = False
    """Leave out the VLM: enough for `train` and `eval`, not for the public code."""
    check: bool = False
    """Look through what lies in `--out` for all that a loader would refuse, after it is written; without `--checkpoint`
    nothing is written. With `--model` what was not trained is compared with that."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if self.check and self.checkpoint is None:
            if self.ema or self.expert_only:
                raise UsageError(
                    "--ema and --expert-only say what is exported, and without --checkpoint nothing is; name the run, "
                    "or leave them out."
                )
        elif missing := [f"--{name}" for name in ("model", "checkpoint") if getattr(self, name) is None]:
            raise UsageError(
                f"{', '.join(missing)} missing; give it as an option or in --config FILE.toml, or --check alone to "
                "look through what lies in --out."
            )
