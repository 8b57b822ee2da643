"""Validation during training: loss of held-out samples on noise that never changes, by stratum, and their minADE."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from alpacache import randomness
from alpacache.alpamayo import ActionExpert
from alpacache.cached_samples.dataset import CachedDataset, target
from alpacache.cached_samples.features import CachedSample
from alpacache.distributed.world import World
from alpacache.driving.strata import classify
from alpacache.inference.prediction import predict
from alpacache.metrics.paths import min_ade
from alpacache.planning.workload import VAL_BATCH
from alpacache.training.config import TrainConfig
from alpacache.training.step import flow_loss

_DRAWS = 4
_PATHS, _FLOW_STEPS = 6, 10
"""As the public evaluation samples."""


class Validation:
    """At most `val_samples` samples of a store, evenly spread over it; of several views the pictures as they are."""

    def __init__(self, data: CachedDataset, config: TrainConfig) -> None:
        self._data, self._config = data, config
        plain = data.plain
        count = min(len(plain), config.val_samples)
        self._indices = [plain[place * len(plain) // count] for place in range(count)]

    @torch.no_grad()
    def run(self, expert: ActionExpert, world: World) -> dict[str, float]:
        """`val_loss`, `val_loss/straight` and so on by turn, and `val_min_ade` (m) where the best is chosen by it.

        Each process takes every n-th sample; all get the same numbers.
        """
        found: dict[str, list[float]] = defaultdict(list)
        mine = self._indices[world.rank :: world.size]
        expert.eval()
        # Other shapes than those that layers were compiled for.
        with torch.compiler.set_stance("force_eager"):
            for start in range(0, len(mine), VAL_BATCH):
                samples = [self._data.load(index) for index in mine[start : start + VAL_BATCH]]
                for sample, loss in zip(samples, self._losses(expert, samples), strict=True):
                    found["val_loss"].append(loss)
                    found[f"val_loss/{_turn(sample)}"].append(loss)
                if self._config.best_by == "min_ade":
                    found["val_min_ade"] += self._min_ades(expert, samples)
        expert.train()
        return means(world.all_gather(dict(found)))

    def _losses(self, expert: ActionExpert, samples: list[CachedSample]) -> list[float]:
        schedule, device = self._config.times, expert.device
        action = torch.stack([target(sample, expert.action_space) for sample in samples])[:, None]
        ids = [sample.sample_id for sample in samples]
        noise = torch.stack([randomness.noise("val", name, draws=_DRAWS) for name in ids])
        t = torch.stack([randomness.times("val", name, draws=_DRAWS, schedule=schedule) for name in ids])
        prefixes = [sample.prefix for sample in samples]
        losses: list[float] = flow_loss(
            expert, action.to(device), noise.to(device), t.to(device), prefixes, causal=self._config.causal
        ).tolist()
        return losses

    def _min_ades(self, expert: ActionExpert, samples: list[CachedSample]) -> list[float]:
        paths = predict(expert, samples, paths=_PATHS, flow_steps=_FLOW_STEPS, seed=0)
        return [min_ade(xyz, sample.future_xyz)["min_ade"] for (xyz, _), sample in zip(paths, samples, strict=True)]


def means(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Mean by name over what several processes found."""
    names = sorted({name for part in parts for name in part})
    every = {name: [value for part in parts for value in part.get(name, ())] for name in names}
    return {name: sum(values) / len(values) for name, values in every.items()}


def _turn(sample: CachedSample) -> str:
    return classify(sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot).turn
