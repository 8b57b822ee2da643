"""Host memory: page-aligned, no larger than asked for, and honest about what is left."""

import threading

import numpy as np
import pytest
import torch

from alpacache.gpu import host_memory
from alpacache.gpu.host_memory import (
    Slabs,
    available_bytes,
    page_aligned,
    page_rounded,
)


def test_memory_begins_on_a_page_and_is_writable():
    memory = page_aligned(5000)
    assert (memory.size, memory.ctypes.data % 4096) == (5000, 0)
    memory[...] = 7
    assert memory.sum() == 35000
    assert [page_rounded(size) for size in (1, 4096, 4097)] == [4096, 4096, 8192]


def test_places_do_not_overlap_and_slabs_waste_nothing_on_equal_sizes(monkeypatch):
    monkeypatch.setattr(host_memory, "_SLAB_BYTES", 10 * 4096)
    slabs = Slabs(12 * 3 * 4096)
    places = [slabs.place(3 * 4096 - 5) for _ in range(12)]
    for number, place in enumerate(places):
        place[...] = number
    assert all((place == number).all() for number, place in enumerate(places))
    assert all(place.ctypes.data % 4096 == 0 for place in places)
    assert [slab.size for slab in slabs._slabs] == [9 * 4096] * 4


def test_small_places_fill_what_large_ones_leave(monkeypatch):
    monkeypatch.setattr(host_memory, "_SLAB_BYTES", 10 * 4096)
    mixed = Slabs(20 * 4096)
    for pages in (2, 9, 2, 2, 2, 2):
        mixed.place(pages * 4096)
    assert [slab.size // 4096 for slab in mixed._slabs] == [10, 9]


def test_threads_get_places_of_their_own(monkeypatch):
    monkeypatch.setattr(host_memory, "_SLAB_BYTES", 64 * 4096)
    slabs, found = Slabs(800 * 4096), []

    def take():
        found.extend(slabs.place(4096) for _ in range(100))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({place.ctypes.data for place in found}) == 800


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """With 2,048,000 bytes available and no limits; its folder of control groups."""
    (tmp_path / "meminfo").write_text("MemTotal: 999 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path / "cgroup")
    return tmp_path / "cgroup"


def limit(folder, most, used, cached):
    """As cgroup v1 tells it below a folder `memory`, else as v2."""
    folder.mkdir(parents=True, exist_ok=True)
    v1 = "memory" in folder.parts
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{most}\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
    counted = f"inactive_file 1\ntotal_inactive_file {cached}\n" if v1 else f"inactive_file {cached}\n"
    (folder / "memory.stat").write_text(f"anon 1\n{counted}")


def test_available_is_the_least_of_system_and_container(machine):
    assert available_bytes() == 2000 * 1024  # a kernel without control groups
    machine.with_name("own").write_text("0::/\n")
    assert available_bytes() == 2000 * 1024  # the root of a machine has no limit to tell
    limit(machine, "max", 500_000, 100_000)
    assert available_bytes() == 2000 * 1024
    limit(machine, 1_000_000, 500_000, 100_000)
    assert available_bytes() == 600_000
    limit(machine, 1_000_000, 1_500_000, 0)
    assert available_bytes() == 0


@pytest.mark.parametrize("limited", ["job_7/step_0", "job_7", "."])
def test_a_limit_counts_wherever_it_is_above_the_process(machine, limited):
    machine.with_name("own").write_text("0::/job_7/step_0\n")
    limit(machine / "job_7/step_0", "max", 300_000, 0)
    limit(machine / "job_7", "max", 400_000, 0)
    limit(machine / "job_8", 1, 1, 0)  # of others
    limit(machine / limited, 1_000_000, 400_000, 50_000)
    assert available_bytes() == 650_000


def test_the_first_version_of_control_groups_is_understood(machine):
    own = "4:cpu,cpuacct:/slurm\n3:memory:/slurm/job_7/step_0\n1:name=systemd:/user\n0::/user\n"
    machine.with_name("own").write_text(own)
    for folder in (machine / "memory", machine / "memory/slurm", machine / "memory/slurm/job_7/step_0"):
        limit(folder, 9223372036854771712, 500_000, 0)
    assert available_bytes() == 2000 * 1024
    limit(machine / "memory/slurm/job_7", 1_600_000, 500_000, 100_000)
    assert available_bytes() == 1_200_000


def test_a_container_that_is_told_the_path_of_its_host_finds_its_limit_at_the_root(machine):
    machine.with_name("own").write_text("3:memory:/docker/0123\n0::/../x\n")
    limit(machine / "memory", 1_600_000, 500_000, 0)
    assert available_bytes() == 1_100_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_page_locked_memory_is_known_to_cuda():
    memory = page_aligned(10_000_000)
    host_memory.page_lock(memory)
    tensor = torch.from_numpy(memory)
    assert tensor.is_pinned()
    memory[...] = np.arange(10_000_000) % 251
    copied = tensor.to("cuda", non_blocking=True)
    assert torch.equal(copied.cpu(), tensor)
    host_memory.page_unlock(memory)
    assert not tensor.is_pinned()
