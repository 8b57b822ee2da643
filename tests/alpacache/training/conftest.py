"""What several tests of training need."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # for adamw8_reference


@pytest.fixture
def run_state():
    """Makes the state of a checkpoint as `train` writes it, with changes."""

    def make(**changes):
        settings = {"draws": 1, "micro_batch": 1, "processes": 1, "dataset_samples": 0, "stores": []}
        state = {"settings": settings, "base": {"id": "tiny", "revision": None, "config_sha256": "0"}, "vlm": None}
        state["best"] = {"step": None, "value": None, "by": "loss", "since": 0}
        state |= {"average": None, "trainable": "all", "damaged": [], "damaged_indices": []}
        return state | changes

    return make
