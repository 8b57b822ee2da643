"""The expert and all that a training step changes: weights, optimizer state, and the average of the weights."""

import torch
from torch import nn

from alpacache.alpamayo import ActionExpert
from alpacache.distributed.peer_memory import PeerMemory
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.training.ema import WeightAverage
from alpacache.training.run_directory import RunCheckpoint
from alpacache.training.step_optimizer import StepOptimizer
from alpacache.training.trainable import checkpoint_tensors


class Learner:
    """What a step changes; a checkpoint holds all of it."""

    def __init__(
        self,
        expert: ActionExpert,
        parameters: dict[str, nn.Parameter],
        optimizer: StepOptimizer,
        update: ShardedUpdate,
        memory: PeerMemory | None,
    ) -> None:
        """`parameters`: the trained ones, by the names of checkpoints; `update` and `memory` are theirs."""
        self.expert, self.parameters, self.optimizer, self.update = expert, parameters, optimizer, update
        self.average: WeightAverage | None = None
        """Kept by the first process alone."""
        self._memory = memory

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
            self.average.load(saved.average, saved.state["average"])

    def checkpoint(self, state: dict[str, object]) -> RunCheckpoint:
        """The live tensors, and the state of the run with that of the average."""
        return RunCheckpoint(
            model=checkpoint_tensors(self.expert, self.parameters),
            optimizer=self.optimizer.tensors(),
            average={} if self.average is None else self.average.tensors(),
            state={**state, "average": None if self.average is None else self.average.state},
        )

    def peak_bytes(self) -> int:
        """Peak of the GPU memory that the run has taken so far, without CUDA's own."""
        beside = 0 if self._memory is None else self._memory.beside_bytes
        return torch.cuda.max_memory_reserved(self.expert.device) + beside
