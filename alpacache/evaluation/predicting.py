"""Predictions of every model for every sample: paths, and the numbers of control runs.

Several numbers of flow steps go through each prefix while it is there. A control is one more pass over the samples, in
which each is given another clip's prefix, or none; noise and targets stay its own.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import SWAPPED, UNROUTED, CachedSample
from alpacache.errors import InterruptedRunError, NonFiniteError
from alpacache.evaluation.judging import Variant, judge_variant
from alpacache.evaluation.unread import Unread
from alpacache.inference.prediction import (
    Paths,
    Prediction,
    predict_actions,
    predict_ahead,
    predict_blind,
    predict_guided,
    predict_on_twins,
    to_paths,
)
from alpacache.interrupt import InterruptGuard

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert
    from alpacache.driving.action_space import UnicycleActionSpace

Poses = tuple[Tensor, Tensor, Tensor, Tensor]
Start = Callable[[Sequence[int]], Generator[Prediction]]


@dataclass(slots=True, kw_only=True)
class Predicted:
    """Predictions of one model, by sample."""

    paths: dict[int, Paths] = field(default_factory=dict)
    actions: dict[int, Tensor] = field(default_factory=dict)
    """`[K, 64, 2]` that the paths come from."""
    losses: dict[int, float] = field(default_factory=dict)
    swapped: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """xyz with left for right in the route."""
    by_steps: dict[int, dict[int, Variant]] = field(default_factory=dict)
    """Number of flow steps -> sample -> result, of all numbers where there are several."""
    controls: dict[str, dict[int, Variant]] = field(default_factory=dict)
    """Control -> sample -> result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSamples:
    """The prefixes that one model is judged on: those of the judged samples themselves, or of another store's."""

    data: CachedDataset
    places: Mapping[int, int] | None = None
    """Index in `data` of each judged sample; None where it is the judged one's own."""

    def place(self, index: int) -> int:
        """Index in `data` of a judged sample."""
        return index if self.places is None else self.places[index]

    def start_position(self, index: int) -> int:
        """Position of a judged sample's first action token."""
        return self.data.start_position(self.place(index))


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Predicts the same samples with one expert after another, from the same noise."""

    indices: Sequence[int]
    """Samples to judge."""
    sample_id: Callable[[int], str]
    """Name of one of them, by which its noise is drawn."""
    poses: Callable[[int], Poses]
    target_of: Callable[[int], Tensor]
    """Driven path's action `[64, 2]` of a sample."""
    unread: Unread
    guard: InterruptGuard
    paths: int
    flow_steps: Sequence[int]
    seed: int
    batch_size: int
    capture: bool
    on_rollouts: bool
    guidance: float | None = None
    """Weight of the routes; None: nothing guides."""
    swaps_route: bool
    """Predict samples that have one with left for right in their routes too."""
    controls: Sequence[str]
    partners: Mapping[int, int]
    """Sample -> the one of another clip whose prefix the control `shuffled` takes."""
    on_batch: Callable[[int], None]
    """Told how many samples are done."""

    def swappable(self, stored: StoredSamples) -> list[int]:
        """Samples that are predicted with left for right in their routes too."""
        if not self.swaps_route:
            return []
        return [index for index in self.indices if stored.data.has_twin(stored.place(index), SWAPPED)]

    def passes(self, stored: StoredSamples) -> int:
        """Samples that one expert predicts, those of controls counted again."""
        return len(self.indices) * (1 + len(self.controls)) + len(self.swappable(stored))

    def predict(self, expert: "ActionExpert", stored: StoredSamples, *, model: str) -> Predicted:
        """Predict everything with one expert; `model` names it in the error for paths that are not finite."""
        found, space = Predicted(), expert.action_space

        def keep(prediction: Prediction, row: int) -> None:
            index = prediction.indices[row]
            actions = prediction.actions[:, row]
            paths = [self._paths(space, action, index, model) for action in actions]
            found.paths[index], found.actions[index] = paths[0], actions[0]
            loss = None if prediction.losses is None else float(prediction.losses[row])
            if loss is not None:
                found.losses[index] = loss
            if len(self.flow_steps) > 1:
                for steps, of_steps in zip(self.flow_steps, paths, strict=True):
                    found.by_steps.setdefault(steps, {})[index] = self._variant(of_steps, index, loss)

        def keep_swapped(prediction: Prediction, row: int) -> None:
            index = prediction.indices[row]
            found.swapped[index] = self._paths(space, prediction.actions[0, row], index, model)[0]

        def keep_control(control: str, prediction: Prediction, row: int) -> None:
            index = prediction.indices[row]
            assert prediction.losses is not None
            paths, loss = self._paths(space, prediction.actions[0, row], index, model), float(prediction.losses[row])
            found.controls.setdefault(control, {})[index] = self._variant(paths, index, loss)

        self._run(self.indices, partial(self._honest, expert, stored), keep)
        self._run(self.swappable(stored), partial(self._swapped, expert, stored), keep_swapped)
        for control in self.controls:
            needs = self.partners if control == "shuffled" else {}
            self._run(
                self.indices, partial(self._control, expert, stored, control), partial(keep_control, control), needs
            )
        return found

    def _run(
        self,
        indices: Sequence[int],
        start: Start,
        keep: Callable[[Prediction, int], None],
        needs: Mapping[int, int] | None = None,
    ) -> None:
        """Predict all samples that can be read, and whose partner in `needs` can; go on behind one that cannot."""
        done: set[int] = set()

        def is_open(index: int) -> bool:
            gone = self.unread.errors
            return index not in done and index not in gone and (needs or {}).get(index, index) not in gone

        while todo := [*filter(is_open, indices)]:
            with self.unread.caught(), closing(start(todo)) as predictions:
                for prediction in predictions:
                    if self.guard.requested:
                        raise InterruptedRunError("stopped on request; an evaluation keeps nothing, run it again.")
                    for row, index in enumerate(prediction.indices):
                        keep(prediction, row)
                        done.add(index)
                    self.on_batch(len(prediction.indices))

    def _honest(self, expert: "ActionExpert", stored: StoredSamples, todo: Sequence[int]) -> Generator[Prediction]:
        if self.on_rollouts:
            load = partial(stored.data.of_layers(expert.prefix_layers).load, tails=self.paths)
            return self._loaded(predict_actions, expert, load, stored, todo, self.flow_steps)
        if self.guidance is not None:
            load = partial(stored.data.of_layers(expert.prefix_layers).load, twin=UNROUTED)
            guided = partial(predict_guided, guidance=self.guidance)
            return self._loaded(guided, expert, load, stored, todo, self.flow_steps)
        return predict_ahead(
            expert,
            stored.data,
            todo,
            flow_steps=self.flow_steps,
            capture=self.capture,
            prefix_of=stored.place,
            target_of=self.target_of if self.controls else None,
            **self._sampling,
        )

    def _swapped(self, expert: "ActionExpert", stored: StoredSamples, todo: Sequence[int]) -> Generator[Prediction]:
        load = partial(stored.data.of_layers(expert.prefix_layers).load, twin=SWAPPED)
        return self._loaded(predict_on_twins, expert, load, stored, todo, self.flow_steps[:1])

    def _control(
        self, expert: "ActionExpert", stored: StoredSamples, control: str, todo: Sequence[int]
    ) -> Generator[Prediction]:
        options: dict[str, Any] = {**self._sampling, "flow_steps": self.flow_steps[:1], "target_of": self.target_of}
        if control == "none":
            starts = stored.start_position
            return predict_blind(expert, todo, start_of=starts, **options)

        def partner(index: int) -> int:
            return stored.place(self.partners[index])

        return predict_ahead(expert, stored.data, todo, prefix_of=partner, capture=self.capture, **options)

    def _loaded(
        self,
        predict: Callable[..., Tensor],
        expert: "ActionExpert",
        load: Callable[[int], CachedSample],
        stored: StoredSamples,
        todo: Sequence[int],
        flow_steps: Sequence[int],
    ) -> Generator[Prediction]:
        """Predict samples that are loaded one by one."""
        for start in range(0, len(todo), self.batch_size):
            rows = todo[start : start + self.batch_size]
            samples = [load(stored.place(index)) for index in rows]
            by_steps = [
                predict(expert, samples, paths=self.paths, flow_steps=steps, seed=self.seed) for steps in flow_steps
            ]
            yield Prediction(indices=rows, actions=torch.stack(by_steps))

    @cached_property
    def _sampling(self) -> dict[str, Any]:
        return {
            "paths": self.paths,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sample_id": self.sample_id,
        }

    def _paths(self, space: "UnicycleActionSpace", action: Tensor, index: int, model: str) -> Paths:
        """Paths of a sample's actions. Raises `NonFiniteError` where one is not finite."""
        paths = to_paths(space, action, *self.poses(index)[:2])
        if not all(np.isfinite(part).all() for part in paths):
            raise NonFiniteError(
                f"the model {model} predicts paths for {self.sample_id(index)} that are not finite: its weights "
                "or the sample's prefix are broken. Take an earlier checkpoint, or extract the sample again."
            )
        return paths

    def _variant(self, paths: Paths, index: int, loss: float | None) -> Variant:
        _, history_rot, truth_xyz, _ = self.poses(index)
        return judge_variant(*paths, truth_xyz.double().numpy(), history_rot.double().numpy(), loss=loss)
