"""Validation during training: loss of held-out samples on noise that never changes, by turn, and their minADE."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.other_clips import partners_of
from alpacache.cached_samples.ring import Batch, BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.distributed.world import World
from alpacache.flow_matching import TimeSchedule
from alpacache.flow_matching import sample as sample_flow
from alpacache.inference.prediction import LOSS_DRAWS, eval_noise, flow_loss, to_paths, validation_draws
from alpacache.metrics.paths import min_ade
from alpacache.planning.workload import VAL_BATCH
from alpacache.prefix.packed import PackedPrefixes

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

_PATHS, _FLOW_STEPS = 6, 10
"""Paths per sample and flow steps, as in the public evaluation."""


def held_out_samples(data: CachedDataset, count: int) -> list[int]:
    """At most `count` samples, evenly spread over a store; of several views the pictures as they are."""
    plain = data.plain
    count = min(len(plain), count)
    return [plain[place * len(plain) // count] for place in range(count)]


class Validation:
    """Judges the samples of `held_out_samples`."""

    def __init__(
        self,
        data: CachedDataset,
        val_samples: int,
        *,
        times: TimeSchedule,
        causal: bool,
        with_min_ade: bool,
        shuffled: bool = False,
    ) -> None:
        """`shuffled`: also find the loss with another clip's prefix. Raises `UsageError` where all are of one clip."""
        self._data, self._times, self._causal, self._with_min_ade = data, times, causal, with_min_ade
        self._indices = held_out_samples(data, val_samples)
        self._partners = partners_of(data, self._indices, seed=0) if shuffled else {}

    @torch.no_grad()
    def run(
        self, expert: "ActionExpert", world: World, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """`val_loss`, `val_loss/straight` and so on by turn, `val_min_ade` (m) `with_min_ade`, and `val_loss/shuffled`.

        Each process takes every n-th sample; all get the same numbers. `stop` is asked before each batch: if that of
        any process says so, all of them end here, with None.
        """
        values: dict[str, list[float]] = defaultdict(list)
        mine = self._indices[world.rank :: world.size]
        passes = [{index: index for index in mine}, *([self._partners] if self._partners else [])]
        starts = range(0, len(mine), VAL_BATCH)
        batches = (
            [(index, prefix_of[index]) for index in mine[at : at + VAL_BATCH]] for prefix_of in passes for at in starts
        )
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
                for number in range(rounds * len(passes)):
                    if any(world.all_gather(stop())):
                        return None
                    if number % rounds >= len(starts) or (batch := next(left, None)) is None:
                        continue
                    losses, prefixes = self._losses(expert, staged, batch)
                    if number >= rounds:
                        values["val_loss/shuffled"] += losses
                        ring.done(batch)
                        continue
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
        """The loss of each sample, which its place in the order names, and the prefixes of the batch."""
        count, names = len(batch.rows), tuple(map(self._data.sample_id, batch.positions))
        noise, t = validation_draws(names, schedule=self._times)
        if batch.sample_ids != names:  # prefixes of others, and with them came their targets
            space = expert.action_space
            own = torch.stack([space.to_action(*self._data.poses(index)) for index in batch.positions])
            batch = replace(batch, action=own)
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
