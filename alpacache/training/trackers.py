"""Where a run's numbers go beside `metrics.jsonl`: TensorBoard events by default, Weights & Biases if asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from alpacache.errors import UsageError


class Tracker(Protocol):
    """A service that takes the scalars of each step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_trackers(track: str, run: Path, *, first_step: int, config_toml: str) -> list[Tracker]:
    """Trackers for a run that goes on after `first_step`. Raises `UsageError` where one is not installed.

    `track`: `none`, `tensorboard`, or `wandb` for both.
    """
    if track == "none":
        return []
    trackers: list[Tracker] = [_TensorBoard(run / "tensorboard", first_step)]
    if track == "wandb":
        trackers.append(_WeightsAndBiases(run, config_toml))
    return trackers


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a row of `metrics.jsonl`, without its step."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class _TensorBoard:
    def __init__(self, directory: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"TensorBoard events need tensorboard ({error}); install it, or pass --track none."
            ) from error
        # Makes readers hide what a killed run wrote after its last checkpoint.
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One W&B run for a run directory, which keeps its id, so that a resumed run goes on there."""

    def __init__(self, run: Path, config_toml: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError(f"--track wandb needs wandb ({error}): pip install 'alpacache[wandb]'.") from error
        note = run / "wandb-id"
        run_id = note.read_text().strip() if note.is_file() else wandb.util.generate_id()
        note.write_text(run_id + "\n")
        self._run = wandb.init(
            project="alpacache",
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run),
            config={"toml": config_toml},
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
