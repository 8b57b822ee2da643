"""The models of one evaluation: their labels and the runs behind them, checked before the first path is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpacache.alpamayo import ActionExpert, Checkpoint
from alpacache.cached_samples.identity import check_base, check_same_vlm
from alpacache.evaluation.config import BASE, TRAINED
from alpacache.training.run_directory import RunDirectory, find_checkpoint, read_state, read_trained
from alpacache.training.trainable import apply_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A run's checkpoint that fits the model and the store."""

    path: Path
    """`RUN/checkpoints/step-N`."""
    step: int
    average: bool
    """Whether the average of the weights is wanted rather than the weights."""

    def put_into(self, expert: ActionExpert) -> None:
        """Load the trained tensors into the base model's expert. Raises `DataError` if they are damaged."""
        apply_checkpoint(expert, read_trained(self.path, average=self.average).model, where=str(self.path))

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of the run's `metrics.jsonl` up to this checkpoint; none where the file is gone."""
        return RunDirectory(self.path.parent.parent).metrics(up_to=self.step)


def labelled_runs(checkpoint: str | None, compare: Mapping[str, str]) -> dict[str, str | None]:
    """Map each label to a run directory or checkpoint, and `base` to None, in the order of the tables."""
    trained = {} if checkpoint is None else {TRAINED: checkpoint}
    return {BASE: None, **trained, **compare}


def open_run(run: str, base: Checkpoint, *, vlm: Mapping[str, str] | None, average: bool) -> TrainedRun:
    """Find a run's checkpoint and check that it can be judged here; reads no tensor.

    Raises `UsageError` where the run was trained from another model than `base`, on features of another VLM than `vlm`
    (as in `CachedDataset.vlm`), or has no average where one is wanted.
    """
    path = find_checkpoint(run).resolve()  # `best` may move on while a run is still training
    state = read_state(path, average=average)
    check_base(base, state["base"], run=path)
    check_same_vlm(state.get("vlm"), vlm, run=path, what="the store that it is to be judged on")
    return TrainedRun(path=path, step=int(state["step"]), average=average)
