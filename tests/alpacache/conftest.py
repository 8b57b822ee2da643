"""Shared pieces of the tests: the golden model, tiny checkpoints, and how errors are measured."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alpacache.alpamayo import load_expert, load_vlm
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "alpamayo_tiny"


@pytest.fixture(scope="session", autouse=True)
def plain_checkout():
    """Tests also run where alpacache is not installed, as on a borrowed GPU, in processes of their own too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="session")
def golden_cases():
    return json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="session")
def golden_vlm():
    return load_vlm(str(GOLDEN))


@pytest.fixture(scope="session")
def golden_expert():
    return load_expert(str(GOLDEN)).eval()


@pytest.fixture(scope="session")
def golden_prefixes(golden, golden_vlm):
    """PrefixFeatures of the three golden clips."""
    names = ("input_ids_fused", "pixel_values", "image_grid_thw")
    return [golden_vlm.prefill(*(golden[f"clip{clip}.{name}"] for name in names)) for clip in range(3)]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A complete tiny R1 checkpoint in bfloat16, two shards."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-R1")


@pytest.fixture(scope="session")
def tiny_checkpoint_15(tmp_path_factory):
    """The same for 1.5: constants absent from the weights."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny15") / "Tiny-1.5", seed=1, family="1.5", shards=1)


@pytest.fixture(scope="session")
def relative_error():
    """Relative L2 error."""

    def measure(got, expected):
        got, expected = (torch.as_tensor(tensor).detach().double() for tensor in (got, expected))
        assert got.shape == expected.shape
        return float((got - expected).norm() / expected.norm())

    return measure
