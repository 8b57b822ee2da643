"""Which GPU is the current one."""

import pytest
import torch

from alpacache.device import enter


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
