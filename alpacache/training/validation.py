"""Validation during training: loss of held-out samples on noise that never changes, by turn, and their minADE."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.ring import Batch, BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.distributed.world import World
from alpacache.flow_matching import TimeSchedule
from alpacache.flow_matching import sample as sample_flow
from alpacache.inference.prediction import LOSS_DRAWS, eval_noise, to_paths, validation_draws
from alpacache.metrics.paths import min_ade
from alpacache.planning.workload import VAL_BATCH
from alpacache.prefix.packed import PackedPrefixes
from alpacache.training.step import flow_loss

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

_PATHS, _FLOW_STEPS = 6, 10
"""Paths per sample and flow steps, as in the public evaluation."""


class Validation:
    """At most `val_samples` samples of a store, evenly spread over it; of several views the pictures as they are."""

    def __init__(
        self, data: CachedDataset, val_samples: int, *, times: TimeSchedule, causal: bool, with_min_ade: bool
    ) -> None:
        self._data, self._times, self._causal, self._with_min_ade = data, times, causal, with_min_ade
        plain = data.plain
        count = min(len(plain), val_samples)
        self._indices = [plain[place * len(plain) // count] for place in range(count)]

    @torch.no_grad()
    def run(
        self, expert: "ActionExpert", world: World, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """`val_loss`, `val_loss/straight` and so on by turn, and `val_min_ade` (m) `with_min_ade`.

        Each process takes every n-th sample; all get the same numbers. `stop` is asked before each batch: if that of
        any process says so, all of them end here, with None.
        """
        values: dict[str, list[float]] = defaultdict(list)
        mine = self._indices[world.rank :: world.size]
        batches = ([(index, index) for index in mine[at : at + VAL_BATCH]] for at in range(0, len(mine), VAL_BATCH))
        # The memory plan has room for one batch, and for one decoded layer of it.
        data, room = self._data, self._data.tail_room
        rows = PrefixRows(
            data.layout, data.longest, batch_size=VAL_BATCH, batches=1, device=expert.device, tail_room=room
        )
        staged = StagedBatch(rows, expert, draws=LOSS_DRAWS, decoded_layers=0)
        ring = BatchRing(data, expert.action_space, batches, rows)
        rounds = math.ceil(len(self._indices) / world.size / VAL_BATCH)  # the same in all processes
        expert.eval()
        try:
            # Layers were compiled for other shapes than these.
            with torch.compiler.set_stance("force_eager"), ring:
                left = iter(ring)
                for _ in range(rounds):
                    if any(world.all_gather(stop())):
                        return None
                    if (batch := next(left, None)) is None:
                        continue
                    losses, prefixes = self._losses(expert, staged, batch)
                    for turn, loss in zip(batch.turns, losses, strict=True):
                        values["val_loss"].append(loss)
                        values[f"val_loss/{turn}"].append(loss)
                    if self._with_min_ade:
                        values["val_min_ade"] += self._min_ades(expert, batch, prefixes)
                    ring.done(batch)
        finally:
            expert.train()
        return means(world.all_gather(dict(values)))

    def _losses(self, expert: "ActionExpert", staged: StagedBatch, batch: Batch) -> tuple[list[float], PackedPrefixes]:
        """The loss of each sample, and the prefixes of the batch."""
        count = len(batch.rows)
        noise, t = validation_draws(batch.sample_ids, schedule=self._times)
        staged.put(batch, noise, t=t)
        prefixes = staged.prefixes(slice(count), longest=batch.longest)
        flow = staged.action[:count], staged.noise[:count], staged.t[:count]
        return flow_loss(expert, *flow, prefixes, causal=self._causal).tolist(), prefixes

    def _min_ades(self, expert: "ActionExpert", batch: Batch, prefixes: PackedPrefixes) -> list[float]:
        noise = eval_noise(0, batch.sample_ids, _PATHS).to(expert.device)
        action = sample_flow(lambda x, t: expert.velocity(x, t, prefixes), noise, steps=_FLOW_STEPS).cpu()
        values = []
        for index, draws in zip(batch.positions, action, strict=True):
            *history, future_xyz, _ = self._data.poses(index)
            xyz, _ = to_paths(expert.action_space, draws, *history)
            # Of a path that is not finite there is no error to take.
            values.append(min_ade(xyz, future_xyz)["min_ade"] if np.isfinite(xyz).all() else math.nan)
        return values


def means(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Mean by name over the values of several processes."""
    names = sorted({name for part in parts for name in part})
    every = {name: [value for part in parts for value in part.get(name, ())] for name in names}
    return {name: sum(values) / len(values) for name, values in every.items()}
