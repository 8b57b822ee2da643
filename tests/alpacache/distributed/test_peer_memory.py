"""Memory that processes write to together: when there is any, and how much of a budget it takes. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

from alpacache.distributed import peer_memory as subject
from alpacache.distributed.peer_memory import peer_memory
from alpacache.distributed.world import World

GPU = torch.device("cuda", 0)


def test_a_single_process_and_processes_on_a_cpu_have_none():
    assert peer_memory(World(rank=0, size=2, device=torch.device("cpu"))) is None
    assert peer_memory(World(rank=0, size=1, device=GPU)) is None


class Module:
    """In place of torch's symmetric memory."""

    def __init__(self, *, counted, fails=False):
        self.counted, self.fails, self.reserved, self.barriers = counted, fails, 0, []

    def empty(self, count, dtype, device):
        memory = torch.zeros(count, dtype=dtype)
        if self.counted:
            self.reserved += max(512, memory.nbytes)
        return memory

    def rendezvous(self, memory, group):
        if self.fails:
            raise RuntimeError("the driver does not share memory")
        return SimpleNamespace(
            get_buffer=lambda rank, shape, dtype: torch.full(shape, rank, dtype=dtype),
            barrier=lambda channel: self.barriers.append((memory.numel(), channel)),
        )


@pytest.fixture
def two(monkeypatch):
    """Two processes with a GPU each that can reach the other's; a function that says what memory they have."""

    def found(module, *, other=True, here="2"):
        monkeypatch.setattr(subject, "import_module", lambda name: module)
        monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=None))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: module.reserved)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        return peer_memory(SimpleNamespace(rank=0, size=2, device=GPU, all_gather=lambda value: [value, other]))

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: (device.index, other) == (0, 1))
    return found


def test_own_memory_is_first_by_rank_and_all_share_one_barrier(two):
    module = Module(counted=False)
    memory = two(module)
    own, other = memory.empty(4, torch.bfloat16)
    assert own.tolist() == [0] * 4
    assert other.tolist() == [1] * 4
    memory.barrier()
    memory.barrier()
    assert module.barriers == [(1, 0), (1, 0)]


@pytest.mark.parametrize(("counted", "beside"), [(False, 1 + 2000), (True, 0)])
def test_only_what_the_allocator_does_not_count_is_beside_it(two, counted, beside):
    memory = two(Module(counted=counted))
    memory.empty(1000, torch.bfloat16)
    assert memory.beside_bytes == beside


def test_where_any_process_cannot_reach_the_others_none_has_memory(two, monkeypatch):
    assert two(Module(counted=False)) is not None
    assert two(Module(counted=False), other=False) is None
    assert two(Module(counted=False, fails=True)) is None
    assert two(Module(counted=False), here="1") is None  # on two machines
    assert two(SimpleNamespace(reserved=0)) is None  # a torch that has it under other names
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert two(Module(counted=False)) is None
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: False)
    assert two(Module(counted=False)) is None
