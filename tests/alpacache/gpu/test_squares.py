"""Sums of squares by one kernel: those of torch, whatever the tensors' sizes and types."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from alpacache.gpu.squares import SquareSum

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
AGREEMENT = """
import sys, torch
from alpacache.gpu import squares

device = torch.device(sys.argv[1])
squares._TILE = 1024
sums = squares.SquareSum(device)
generator = torch.Generator().manual_seed(0)
for sizes in ((1024 * 40, 3, 2048, 1025, 1024), (5,), (1024,)):
    for seed in range(2):
        given = [torch.randn(size, generator=generator) * 10.0 ** (place - 2) for place, size in enumerate(sizes)]
        given = [each.bfloat16() if place % 2 == 0 else each for place, each in enumerate(given)]
        given.append(torch.randn(64, 48, generator=generator).T)
        there = [each.to(device) for each in given]
        parts = [sums.partial_sums(kind, alike) for kind, alike in squares.by_kind(there).items()]
        assert all(len(part) == len(part.unique()) for part in parts)
        found = float(torch.cat(parts).double().sum())
        expected = sum(float(each.double().square().sum()) for each in given)
        assert abs(found / expected - 1) < 1e-5, (sizes, found, expected)
        apart = [squares.SquareSum(device).of_each(some) for some in (there[:2], there[2:]) if some]
        assert torch.equal(squares.total(part for some in apart for part in some), sums(there))
        if device.type == "cuda":
            assert torch.equal(sums(there), sums(there))
            assert abs(float(sums(there)) / expected - 1) < 1e-5
    spoilt = [each.clone() for each in there]
    spoilt[0].view(-1)[-1] = float("nan")
    assert torch.cat([sums.partial_sums((each.dtype, False), [each.contiguous()]) for each in spoilt]).isnan().any()
"""


def test_without_a_gpu_they_are_those_of_torch():
    given = [torch.full((3, 4), 2.0), torch.full((5,), 1.0, dtype=torch.bfloat16)]
    assert float(SquareSum(torch.device("cpu"))(given)) == 12 * 4 + 5


@pytest.mark.ci
@needs_triton
def test_kernel_agrees_with_torch_in_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", AGREEMENT, "cpu"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_agrees_with_torch_on_a_gpu():
    done = subprocess.run([sys.executable, "-c", AGREEMENT, "cuda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_graph_reads_what_the_tensors_hold():
    sums, device = SquareSum(torch.device("cuda")), torch.device("cuda")
    given = [torch.ones(8192, device=device), torch.ones(7, device=device)]
    sums(given)
    torch.cuda.synchronize()
    others = [torch.full((8192,), 2.0, device=device), torch.full((7,), 3.0, device=device)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sums(others)
    assert float(sums(given)) == 8199.0
    others[1].fill_(1.0)
    graph.replay()
    assert float(found) == 4 * 8192 + 7
