"""Which GPU is the current one, and how many threads PyTorch takes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alpacache.gpu.device import enter, limit_torch_to_one_thread, restored_torch_threads


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_reading_threads_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with restored_torch_threads():
            with ThreadPoolExecutor(1, initializer=limit_torch_to_one_thread) as pool:
                assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 3
        assert threads_of_a_new_thread() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "entered"), [("cpu", []), ("cuda", []), ("cuda:1", ["cuda:1"])])
def test_only_a_numbered_gpu_becomes_the_current_one(name, entered, monkeypatch):
    """PyTorch refuses to make one the current that has no number."""
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(str(device)))
    enter(torch.device(name))
    assert found == entered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_without_number_may_be_entered():
    enter(torch.device("cuda"))
    enter(torch.device("cuda", torch.cuda.device_count() - 1))
    assert torch.cuda.current_device() == torch.cuda.device_count() - 1
    torch.cuda.set_device(0)
