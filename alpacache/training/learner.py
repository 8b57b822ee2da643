"""The expert and all that a training step changes: weights, optimizer state, and the average of the weights."""

from collections.abc import Mapping

import torch

from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.distributed.peer_memory import peer_memory
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.distributed.world import World
from alpacache.training.auto_settings import cap_memory
from alpacache.training.config import TrainConfig
from alpacache.training.ema import WeightAverage
from alpacache.training.optimizers import make_optimizer
from alpacache.training.run_directory import RunCheckpoint
from alpacache.training.trainable import checkpoint_tensors, choose_trainable, enable_checkpointing


class Learner:
    """What a step changes; a checkpoint holds all of it."""

    def __init__(self, checkpoint: Checkpoint, config: TrainConfig, world: World) -> None:
        """Load the expert, choose what is trained, and make its optimizer."""
        device = world.device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.expert = load_expert(checkpoint, dtype=dtype, device=device)
        self.parameters = choose_trainable(
            self.expert, config.trainable, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, seed=config.seed
        )
        """The trained ones, by their names in checkpoints."""
        if config.checkpointing:
            enable_checkpointing(self.expert)
        self._memory = peer_memory(world)
        self.update = ShardedUpdate(self.parameters, world, self._memory)
        if self._memory is not None:
            cap_memory(config.budget_bytes, device, beside_bytes=self._memory.beside_bytes)
        betas, decay, shards = config.betas, config.weight_decay, self.update.shards
        self.optimizer = make_optimizer(
            config.optimizer, self.parameters, betas=betas, weight_decay=decay, shards=shards
        )
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

    def checkpoint(self, state: Mapping[str, object]) -> RunCheckpoint:
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
