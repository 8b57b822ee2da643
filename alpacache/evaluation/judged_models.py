"""The models that an evaluation compares: the base, runs, and any of them on another store of the same samples."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import layer_map_of
from alpacache.alpamayo.new_expert import begun_with
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.errors import UsageError
from alpacache.evaluation.predicting import Poses, StoredSamples
from alpacache.inference import BASE, TRAINED
from alpacache.layer_choice import layers_text
from alpacache.sources.name_lists import listed
from alpacache.training.trained_expert import find_trained
from cache_store import SampleReadError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedModel:
    """One column of an evaluation."""

    checkpoint: Checkpoint
    """Checkpoint that is loaded before a run's tensors come into it."""
    run: Path | None = None
    """Checkpoint of the run that is judged; None for the base model."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """The run's."""
    stored: StoredSamples
    """The prefixes that it is judged on."""


def find_models(
    base: Checkpoint,
    runs: Mapping[str, str],
    data: CachedDataset,
    indices: Sequence[int],
    poses: Callable[[int], Poses],
    *,
    store: str,
    other_stores: Mapping[str, str],
    average: bool,
    paths_on_rollouts: int,
) -> dict[str, JudgedModel]:
    """Find the models by label, the base first, then it on other stores, then runs.

    Args:
        runs: by label, the one that the evaluation is about as `TRAINED`.
        data, indices, poses: the judged samples.
        store: where they lie, for messages.
        other_stores: by label; that of a run puts the run on the store, others the base.
        average: take the runs' averages of the weights.
        paths_on_rollouts: paths that need a reasoning rollout of their own.

    Raises `UsageError` for a run or a store that does not go with the base and the judged samples.
    """
    others = {
        label: _other_store(f"--compare-store {label}={store}", store, base, data, indices, poses, paths_on_rollouts)
        for label, store in other_stores.items()
    }
    stored = {label: others.get(label) or StoredSamples(data=data) for label in (BASE, *others, *runs)}
    where = "the store that it is to be judged on"
    found = {
        label: find_trained(run, base, vlm=stored[label].data.vlm, what=where, average=average)
        for label, run in runs.items()
    }
    first = base
    if TRAINED in found and not set(layer_map_of(base)) <= set(data.held_layers):
        first = begun_with(base, found[TRAINED][1])
    if first is not base:
        _log.warning(
            "%s has keys and values of layers %s alone, too few for the expert of %s: 'base' is the new expert of %s "
            "as it began, random weights.",
            *(store, layers_text(data.held_layers), base.model, runs[TRAINED]),
        )
    of_base = [BASE, *(label for label in others if label not in runs)]
    models = {label: JudgedModel(checkpoint=first, stored=stored[label]) for label in of_base}
    for label, (path, state) in found.items():
        models[label] = JudgedModel(checkpoint=base, run=path, state=state, stored=stored[label])
    for model in models.values():
        begun = model.checkpoint if model.run is None else begun_with(base, model.state)
        model.stored.data.of_layers(sorted(set(layer_map_of(begun))))  # what a store lacks is refused now
    return models


def _other_store(
    option: str,
    store: str,
    base: Checkpoint,
    data: CachedDataset,
    indices: Sequence[int],
    poses: Callable[[int], Poses],
    paths_on_rollouts: int,
) -> StoredSamples:
    """The judged samples in another store.

    Raises `UsageError`, in the name of `option`, where some are not in it, or are of other drives.
    """
    other = CachedDataset([store], base)
    if other.rollouts < paths_on_rollouts:
        raise UsageError(
            f"{option} has {other.rollouts} reasoning rollouts per sample, {paths_on_rollouts} paths need one each; "
            "pass --reasoning none for paths without reasoning."
        )
    place_of = {sample_id: place for place, sample_id in enumerate(other.ids)}
    names = {index: data.sample_id(index) for index in indices}
    if missing := [name for name in names.values() if name not in place_of]:
        raise UsageError(
            f"{option}: {len(missing)} of {len(names)} samples that are to be judged are not in it, {listed(missing)}. "
            "Extract them there too, or judge those of both with --only."
        )
    places = {index: place_of[name] for index, name in names.items()}
    if strange := [names[index] for index, place in places.items() if _differ(poses, index, other, place)]:
        raise UsageError(
            f"{option}: {len(strange)} of {len(names)} samples have another path there, {listed(strange)}; samples of "
            "one id must be of one drive to be compared."
        )
    return StoredSamples(data=other, places=places)


def _differ(poses: Callable[[int], Poses], index: int, other: CachedDataset, place: int) -> bool:
    """Tell whether a sample has other poses in another store; False where one cannot be read, which its turn tells."""
    try:
        return not all(map(torch.equal, poses(index), other.poses(place)))
    except SampleReadError:
        return False
