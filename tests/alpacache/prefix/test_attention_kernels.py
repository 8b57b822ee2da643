"""The Triton kernels against the reference: interpreted on the CPU, run where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; CPU-only installs do not need it")

SCRIPT = Path(__file__).with_name("kernels_against_reference.py")


def run(device):
    done = subprocess.run([sys.executable, str(SCRIPT), device], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ci
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels on")
def test_interpreted_kernels_equal_the_reference():
    run("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_reference():
    run("cuda")
