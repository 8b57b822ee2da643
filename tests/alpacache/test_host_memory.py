"""Host memory: page-aligned, no larger than asked for, and honest about what is left."""

import threading

import numpy as np
import pytest
import torch

from alpacache import host_memory
from alpacache.host_memory import Slabs, available_bytes, page_aligned, page_rounded


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


def test_available_is_the_least_of_system_and_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 999 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() == 2000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500000\n")
    assert available_bytes() == 2000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert available_bytes() == 600_000


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
