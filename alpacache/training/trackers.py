"""Where a run's numbers go beside `metrics.jsonl`: TensorBoard events by default, Weights & Biases if asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from alpacache.config import to_toml
from alpacache.errors import UsageError
from alpacache.training.config import TrainConfig


class Tracker(Protocol):
    """One place that takes scalars."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_trackers(config: TrainConfig, run: Path, *, first_step: int) -> list[Tracker]:
    """Trackers of a run that goes on after `first_step`. Raises `UsageError` where one is not installed."""
    if config.track == "none":
        return []
    trackers: list[Tracker] = [_TensorBoard(run / "tensorboard", first_step)]
    if config.track == "wandb":
        trackers.append(_WeightsAndBiases(config, run))
    return trackers


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of `metrics.jsonl`, without its step."""
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
        # What a killed run wrote after its last checkpoint is hidden by the reader.
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One run there for one run directory: its id is kept in it, so that a resumed run goes on."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
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
            config={"toml": to_toml(config)},
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
