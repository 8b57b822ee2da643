"""The expert and all that a training step changes: weights, optimizer state, and the average of the weights."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from alpacache.distributed.peer_memory import peer_memory
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.distributed.world import World
from alpacache.finite import not_finite
from alpacache.gpu.device import cap_memory
from alpacache.planning.workload import MemoryPlan
from alpacache.training.ema import WeightAverage
from alpacache.training.optimizers import NO_SHARDS, StepOptimizer
from alpacache.training.run_directory import RunCheckpoint
from alpacache.training.state_in_ram import spread
from alpacache.training.streamed_optimizer import StreamedOptimizer
from alpacache.training.trainable import checkpoint_tensors
from alpacache.training.two_backwards import TwoBackwards

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert


def planned_optimizer(
    make: Callable[..., StepOptimizer],
    parameters: Mapping[str, nn.Parameter],
    plan: MemoryPlan,
    *,
    layers: int,
    shards: Mapping[str, slice] = NO_SHARDS,
) -> StepOptimizer:
    """The optimizer of an expert of so many layers, with its state where `plan` has it.

    `make` makes one of some parameters, of `shards` of them where all state is on the GPU.
    """
    streamed = spread(layers, plan.streamed_layers)
    if plan.backwards == 2:
        return TwoBackwards(make, parameters, streamed)
    if streamed:
        return StreamedOptimizer(make, parameters, streamed, keep_gradients=plan.captured)
    return make(parameters, shards=shards)


class Learner:
    """State that a step changes; a checkpoint holds all of it."""

    def __init__(
        self,
        expert: "ActionExpert",
        parameters: Mapping[str, nn.Parameter],
        world: World,
        make_optimizer: Callable[[Mapping[str, slice]], StepOptimizer],
        *,
        budget_bytes: int | None,
    ) -> None:
        """Share the trained parameters, by their names in checkpoints, with the other processes of the run.

        `make_optimizer` gets this process's shards of them; see `ShardedUpdate.shards`.
        """
        self.expert, self.parameters = expert, parameters
        self._memory = peer_memory(world)
        self.update = ShardedUpdate(parameters, world, self._memory)
        if self._memory is not None:
            cap_memory(budget_bytes, world.device, beside_bytes=self._memory.beside_bytes)
        self.optimizer = make_optimizer(self.update.shards)
        self.average: WeightAverage | None = None
        """Kept by the first process alone."""

    @torch.no_grad()
    def load(self, content: RunCheckpoint) -> None:
        """Take over weights and optimizer state of a checkpoint."""
        for name, parameter in self.parameters.items():
            parameter.copy_(content.model[name])
        self.optimizer.load_tensors(content.optimizer)

    def start_average(self, decay: float, every: int, saved: RunCheckpoint | None) -> None:
        """Keep an average from here on: a checkpoint's, where it has one, or one that begins at the weights."""
        self.average = WeightAverage(self.parameters, decay=decay, every=every)
        if saved is not None and saved.average:
            self.average.load(saved.average, saved.state["average"]["behind"])

    def count_step(self, step: int) -> None:
        """Let the average count a step that was enqueued, if one is kept."""
        if self.average is not None:
            if self.average.is_due(step):
                self.settle()
            self.average.after(step)

    def settle(self) -> None:
        """Make the updates of the last step that are put off, and wait for state that goes to RAM."""
        if isinstance(self.optimizer, StreamedOptimizer | TwoBackwards):
            self.optimizer.settle()

    def checkpoint(self, state: Mapping[str, object]) -> RunCheckpoint:
        """The live tensors, and the state of the run with that of the average."""
        return RunCheckpoint(
            model=checkpoint_tensors(self.expert, self.parameters),
            optimizer=self.optimizer.tensors(),
            average={} if self.average is None else self.average.tensors(),
            state={**state, "average": None if self.average is None else self.average.state},
        )

    def not_finite(self) -> list[str]:
        """Names of the tensors of a checkpoint that are not finite. Reads all of them once, where they lie."""
        live = {**self.parameters, **self.optimizer.tensors()}
        return not_finite(live) + not_finite({} if self.average is None else self.average.tensors())

    def peak_bytes(self) -> int:
        """Peak of the GPU memory that the run has taken so far, without CUDA's own."""
        beside = 0 if self._memory is None else self._memory.beside_bytes
        return torch.cuda.max_memory_reserved(self.expert.device) + beside
