"""Updates that processes share: what each sums, updates and passes on, with gloo on CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alpacache.distributed import exchange, sharded_update
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.distributed.world import World

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CPU = torch.device("cpu")


def parameters_of(*sizes):
    return {f"p{number}": torch.nn.Parameter(torch.ones(size)) for number, size in enumerate(sizes)}


def test_one_process_shards_nothing():
    assert ShardedUpdate(parameters_of(4096, 4096), World(rank=0, size=1, device=CPU)).shards == {}


@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_disjoint_even_and_two_thirds(size):
    parameters = parameters_of(*[4096 * (1 + number % 3) for number in range(30)], 4097, 3)
    shards = [ShardedUpdate(parameters, World(rank=rank, size=size, device=CPU)).shards for rank in range(size)]
    assert all(one.keys() == shards[0].keys() for one in shards)
    for name in shards[0]:
        pieces = [one[name] for one in shards]
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == parameters[name].numel()
        assert {piece.stop - piece.start for piece in pieces} == {parameters[name].numel() // size}
        assert pieces[0].stop % 1024 == 0
    sharded = sum(parameters[name].numel() for name in shards[0])
    assert 0.6 < sharded / sum(parameter.numel() for parameter in parameters.values()) <= 2 / 3


@pytest.fixture
def only_member():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def operations(only_member, monkeypatch):
    """A list that gets an empty one for each group of operations that is begun."""
    begun, together = [], dist._coalescing_manager
    monkeypatch.setattr(dist, "_coalescing_manager", lambda **given: begun.append([]) or together(**given))
    return begun


def test_gradients_are_summed_together_up_to_a_size_and_by_dtype(monkeypatch, operations):
    monkeypatch.setattr(sharded_update, "BUCKET_BYTES", 32)
    sums = operations
    add_up = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda grad: sums[-1].append((grad.dtype, len(grad))) or add_up(grad))
    dtypes = [torch.float32] * 3 + [torch.float64] * 2
    parameters = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size, dtype in enumerate(dtypes, 2)]
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    gradients = ShardedUpdate(named, World(rank=0, size=2, device=CPU))

    def backward(factor):
        # In their order: each is used after, so its gradient is there before.
        loss = torch.zeros((), dtype=torch.float64)
        for parameter in reversed(parameters):
            loss = (loss + factor * parameter.double()).sum()
        loss.backward()

    gradients.is_last_backward = False
    backward(1.0)
    gradients.finish_sum()
    assert sums == []
    gradients.is_last_backward = True
    backward(2.0)
    gradients.finish_sum()
    assert sums == [
        [(torch.float32, 2), (torch.float32, 3), (torch.float32, 4)],
        [(torch.float64, 5)],
        [(torch.float64, 6)],
    ]
    for parameter in parameters:
        assert parameter.grad is not None
        assert (parameter.grad / parameter.grad[0] == 1).all()
    assert parameters[0].grad[0] == 3.0


def test_shards_are_gathered_together_up_to_a_size_and_by_dtype(monkeypatch, operations):
    monkeypatch.setattr(exchange.CollectiveExchange, "gather_bucket_bytes", 20_000)
    sent = operations
    monkeypatch.setattr(exchange, "_all_gather", lambda whole, part: sent[-1].append((whole.dtype, len(part))))
    dtypes = [torch.float32] * 6 + [torch.float64] * 6
    named = {str(number): torch.nn.Parameter(torch.ones(4096, dtype=dtype)) for number, dtype in enumerate(dtypes)}
    update = ShardedUpdate(named, World(rank=1, size=2, device=CPU))
    for name in named:
        update.gather_updated(name)
    update.finish_update()
    assert [one for group in sent for one in group] == [(dtypes[int(name)], 2048) for name in update.shards]
    assert [len(group) for group in sent] == [2, 2, 1, 1, 1, 1]  # of 16 kB each, then of 32
    assert all(len({dtype for dtype, _ in group}) == 1 for group in sent)


# Three steps of processes whose gradients differ, beside one process that has their sums; every bit is compared.
SHARED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
sys.path.append(BENCHMARKS)
from adamw8_reference import ReferenceAdamW8
from alpacache.training.adamw8 import AdamW8
from alpacache.training.adamw8_update import Hyperparameters
from alpacache.training.optimizers import make_optimizer
from alpacache.distributed.peer_memory import peer_memory
from alpacache.distributed.sharded_update import ShardedUpdate
from alpacache.distributed.exchange import CopyExchange
from alpacache.distributed.world import World, join_world

HYPER = Hyperparameters(betas=(0.9, 0.999), weight_decay=0.1, eps=1e-8)

class Mapped:
    "Memory that processes on a CPU write to together: files."
    beside_bytes = 0
    def __init__(self, world):
        self.world, self.number = world, 0
    def empty(self, count, dtype):
        self.number += 1
        paths = [Path(__file__).with_suffix(f".{self.number}-{rank}") for rank in range(self.world.size)]
        torch.from_file(str(paths[self.world.rank]), shared=True, size=count, dtype=dtype)
        dist.barrier()
        return [torch.from_file(str(path), shared=True, size=count, dtype=dtype) for path in paths]
    def barrier(self):
        dist.barrier()

def optimizer(name, parameters, shards):
    if name == "adamw8":
        return (ReferenceAdamW8 if device == "cpu" else AdamW8)(parameters, HYPER, shards)
    return make_optimizer(name, parameters, betas=HYPER.betas, weight_decay=0.1, shards=shards)

name, dtype, device, way = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3], sys.argv[4]
CopyExchange.least_sharded = 0
with join_world(device) as world:
    def scalars(skip):
        numbers = dict(lr=torch.tensor(1e-2), scale=torch.tensor(0.5), skip=torch.tensor(skip))
        return {key: number.to(world.device) for key, number in numbers.items()}
    memory = None
    if way == "copies":
        memory = Mapped(world) if device == "cpu" else peer_memory(world)
        assert memory is not None, "these GPUs cannot write to each other"
    torch.manual_seed(0)
    values = {"a": torch.randn(6, 1024), "b": torch.randn(2, 2048), "c": torch.randn(4096), "d": torch.randn(5)}
    ours, theirs = ({k: nn.Parameter(v.to(world.device, dtype, copy=True)) for k, v in values.items()} for _ in "ab")
    shared = ShardedUpdate(ours, world, memory)
    assert sorted(shared.shards) == (["a", "b", "c"] if way == "copies" and world.size == 2 else ["b", "c"])
    for k, parameter in theirs.items():
        assert torch.equal(ours[k], parameter), k
    mine, reference = optimizer(name, ours, shared.shards), optimizer(name, theirs, {})
    for number in range(3):
        # Small whole numbers, whose sums are exact in any order.
        gradients = [{k: torch.randint(-8, 9, v.shape).to(world.device, dtype) for k, v in values.items()}
                     for _ in range(world.size)]
        for parameter in ours.values():
            parameter.grad = None
        sum((ours[k].float() * gradients[world.rank][k].float()).sum() for k in values).backward()
        shared.finish_sum()
        for k, parameter in theirs.items():
            parameter.grad = sum(gradient[k] for gradient in gradients)
        square = shared.squared_norm()
        world.all_reduce(square)
        expected = sum(parameter.grad.float().square().sum() for parameter in theirs.values())
        assert abs(square / expected - 1) < 1e-5, (square, expected)
        skip = number == 1
        mine.step(**scalars(skip), updated=shared.gather_updated)
        shared.finish_update()
        reference.step(**scalars(skip))
        for k in values:
            assert torch.equal(ours[k], theirs[k]), (number, k)
    before = mine.tensors()
    if world.rank:
        assert not all(torch.equal(tensor, reference.tensors()[k]) for k, tensor in before.items())
    shared.complete(before)
    for k, tensor in reference.tensors().items():
        assert torch.equal(mine.tensors()[k], tensor), k
    save_file({k: parameter.detach() for k, parameter in ours.items()}, f"{__file__}.{world.rank}.safetensors")
# A backend's thread that outlives the group may abort the interpreter at its end.
threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
assert not [thread for thread in threads if "gloo" in thread], threads
print("equal")
"""


def run_shared(tmp_path, processes, *given):
    program = tmp_path / "shared.py"
    program.write_text(f"BENCHMARKS = {str(BENCHMARKS)!r}\n{SHARED}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(program), *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == processes


@pytest.mark.system
@pytest.mark.parametrize(("way", "processes"), [("collectives", 2), ("copies", 2), ("copies", 4)])
@pytest.mark.parametrize(("name", "dtype"), [("adamw8", "bfloat16"), ("adamw", "float32")])
@pytest.mark.ci
def test_a_shared_update_is_that_of_one_process_bit_for_bit(tmp_path, name, dtype, way, processes):
    run_shared(tmp_path, processes, name, dtype, "cpu", way)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", ["collectives", "copies"])
def test_and_so_it_is_on_two_gpus(tmp_path, way):
    run_shared(tmp_path, 2, "adamw8", "bfloat16", "cuda", way)
