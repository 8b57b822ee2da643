"""Copies off the device: right bytes, a bounded number, buffers that are used again."""

import threading

import numpy as np
import pytest
import torch

from alpacache.gpu import host_copies
from alpacache.gpu.host_copies import HostCopies, copied_to_host

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.arange(6, dtype=torch.uint8).view(2, 3)
    with HostCopies(torch.device("cpu"), 1) as copies:
        copy = copies.begin({"kv": tensor, "n": np.asarray(3), "text": "x"})
        found = copy.arrays()
        assert found["kv"].ctypes.data == tensor.data_ptr()
        assert (found["n"], found["text"]) == (3, "x")
        copy.release()


def test_begin_waits_for_a_release():
    with HostCopies(torch.device("cpu"), 2) as copies:
        begun = [copies.begin({}), copies.begin({})]
        third = threading.Thread(target=lambda: begun.append(copies.begin({})))
        third.start()
        third.join(0.05)
        assert third.is_alive()
        begun[1].release()
        third.join(5)
        assert len(begun) == 3
        begun[0].release()
        begun[2].release()


def test_an_error_does_not_wait_for_what_nobody_releases_any_more():
    def run():
        with HostCopies(torch.device("cpu"), 2) as copies:
            copies.begin({})
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def test_copies_of_a_whole_are_the_same_and_stay_so(device, monkeypatch):
    monkeypatch.setattr(host_copies, "_STAGE_BYTES", 2**12)
    tensors = {
        "several buffers": torch.randn(3, 5001),
        "bits": torch.randn(1001).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": torch.arange(6000).view(60, 100).T,
        "host": torch.ones(3),
    }
    given = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()} | {"host": torch.ones(3)}
    copies = copied_to_host(given)
    for tensor in given.values():
        tensor.zero_()
    assert list(copies) == list(tensors)
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
    assert all(copies[name].dtype == given[name].dtype for name in given)


@pytest.mark.gpu
@gpu
def test_bytes_arrive_while_the_gpu_goes_on():
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    expected, waiting = [], []
    with HostCopies(device, 3) as copies:
        for number in range(12):
            shape = (4, 2, 100_000 + 1000 * number)
            kv = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).view(torch.uint16)
            hidden = kv[0].view(torch.uint8) + 1
            expected.append((kv.cpu().numpy(), hidden.cpu().numpy()))
            if len(waiting) == 3:
                check(waiting.pop(0), *expected[number - 3])
            waiting.append(copies.begin({"kv": kv, "hidden": hidden, "n": number}))
            del kv, hidden
            torch.empty(10_000_000, device=device).fill_(7)  # would land where the tensors were
        for copy, values in zip(waiting, expected[-3:], strict=True):
            check(copy, *values)


@pytest.mark.gpu
@gpu
def test_a_copy_waits_for_what_made_its_values_and_no_longer():
    device = torch.device("cuda")
    with HostCopies(device, 1) as copies:
        kv = torch.zeros(2, 600_000, dtype=torch.int64, device=device)
        copies.begin({"kv": kv}).release()  # page-locks a buffer as large, for which the GPU is waited for
        torch.cuda._sleep(20_000_000)
        kv, made = torch.arange(1_200_000, device=device).view(2, -1), torch.cuda.Event(blocking=True)
        made.record()
        torch.cuda._sleep(4_000_000_000)  # seconds of the next group
        later = torch.cuda.Event()
        later.record()
        copy = copies.begin({"kv": kv}, made=made)
        assert np.array_equal(copy.arrays()["kv"], np.arange(1_200_000).reshape(2, -1))
        assert not later.query()
        copy.release()
        torch.cuda.synchronize()


def check(copy, kv, hidden):
    found = copy.arrays()
    assert np.array_equal(found["kv"], kv)
    assert np.array_equal(found["hidden"], hidden)
    copy.release()
