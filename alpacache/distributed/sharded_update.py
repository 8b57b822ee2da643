"""One update by all processes of a run: gradients are summed, and most parameters are updated in shards.

Of a sharded parameter a process gets its shard of the summed gradient alone and updates that shard of the weights;
shards are gathered while others are updated. This moves as many bytes as summing whole gradients, but half of them
after the backward, and what is sharded is updated once instead of by every process. The other parameters are summed
and updated as a whole by all processes. `docs/decisions/0009-gradient-sum.md` has the numbers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alpacache.distributed.exchange import (
    BUCKET_BYTES,
    Bucket,
    CollectiveExchange,
    CopyExchange,
    gather_shards,
    shard_slice,
)
from alpacache.distributed.peer_memory import PeerMemory
from alpacache.distributed.world import World
from alpacache.gpu.squares import SquareSum

_SHARD_MULTIPLE = 1024
"""Elements: whole programs of adamw8's kernel, and whole groups."""


class ShardedUpdate:
    """Sums gradients while the backward goes on, and gathers weights while the optimizer does.

    With one process it does nothing, and nothing is sharded.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, memory: PeerMemory | None = None) -> None:
        """Choose shards; with `memory`, processes write into each other's, and sharded parameters are moved there."""
        self.world = world
        self.shards = _choose_shards(parameters, world, CollectiveExchange if memory is None else CopyExchange)
        """Elements (flattened) that this process updates, by parameter name; names without an entry: all of them."""
        self.is_last_backward = True
        """True if the next backward is the step's last; until then gradients only accumulate."""
        self._parameters = dict(parameters)
        self._shard_of: dict[Tensor, slice] = {parameters[name]: shard for name, shard in self.shards.items()}
        self._exchange = CollectiveExchange(world)
        if memory is not None:
            self._exchange = CopyExchange(list(self._shard_of), memory, world)
        self._sharded_grads = Bucket(self._exchange.reduce_scatter, BUCKET_BYTES)
        self._whole_grads = Bucket(self._exchange.all_reduce, BUCKET_BYTES)
        self._updated = Bucket(self._exchange.all_gather, self._exchange.gather_bucket_bytes)
        self._of_whole, self._of_shards = SquareSum(world.device), SquareSum(world.device)
        if world.size > 1:
            for parameter in parameters.values():
                parameter.register_post_accumulate_grad_hook(self._sum)  # type: ignore[no-untyped-call]

    def finish_sum(self) -> None:
        """Make the current stream wait for all sums of gradients."""
        self._sharded_grads.flush()
        self._whole_grads.flush()
        self._exchange.finish()

    def squared_norm(self) -> Tensor:
        """This process's share of the gradient's squared norm, float32; the shares of all processes add up to it."""
        grads = {parameter: parameter.grad for parameter in self._parameters.values() if parameter.grad is not None}
        whole = [grad for parameter, grad in grads.items() if parameter not in self._shard_of]
        shards = [grad.view(-1)[self._shard_of[p]] for p, grad in grads.items() if p in self._shard_of]
        shares = []
        if whole:
            shares.append(self._of_whole(whole) / self.world.size)
        if shards:
            shares.append(self._of_shards(shards))
        return torch.stack(shares).sum()

    def gather_updated(self, name: str) -> None:
        """Gather a parameter whose update this process has enqueued on the current stream."""
        if name in self.shards:
            self._updated.add(self._parameters[name])

    def finish_update(self) -> None:
        """Make the current stream wait for all weights."""
        self._updated.flush()
        self._exchange.finish()

    def complete(self, state: Mapping[str, Tensor]) -> None:
        """Gather an optimizer's state, `<key>.<parameter name>`, of which each process keeps its shard up to date.

        Every process has to call it.
        """
        for name, tensor in state.items():
            parameter = name.partition(".")[2]
            if parameter not in self.shards or not tensor.ndim:
                continue
            whole = tensor.shape == self._parameters[parameter].shape
            for row in [tensor] if whole else tensor:  # state by group of elements has several rows
                gather_shards(row.view(-1), self.world)

    def _sum(self, parameter: Tensor) -> None:
        if self.is_last_backward and parameter.grad is not None:
            (self._sharded_grads if parameter in self._shard_of else self._whole_grads).add(parameter)


def _choose_shards(
    parameters: Mapping[str, nn.Parameter], world: World, exchange: type[CollectiveExchange]
) -> dict[str, slice]:
    shards: dict[str, slice] = {}
    seen = sharded = 0
    for name, parameter in parameters.items():
        count = parameter.numel()
        seen += count
        even = count % (_SHARD_MULTIPLE * world.size) == 0 and count >= exchange.least_sharded
        if world.size > 1 and even and sharded + count <= exchange.sharded_fraction * seen:
            shards[name] = shard_slice(count, world)
            sharded += count
    return shards
