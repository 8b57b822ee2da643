"""`plan` counts an expert of one's own size, and stores of some layers, as `train` and `extract` make them."""

import math

import pytest

from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.alpamayo.new_expert import NewExpert, plan_expert
from alpacache.errors import UsageError
from alpacache.planning.config import PlanConfig
from alpacache.planning.plan import plan


def test_layers_that_are_not_stored_take_no_bytes():
    sizes = {
        layers: plan(PlanConfig(samples=1, codec="int8", layers=layers)) for layers in (None, "every:3", "first:6")
    }
    whole = sizes[None].kv_bytes_by_codec
    for layers, share in (("every:3", 3), ("first:6", 6)):
        some = {name: share * size for name, size in sizes[layers].kv_bytes_by_codec.items()}
        assert some == pytest.approx(whole, rel=1e-4)  # but for the chunks' own few bytes
        assert any("--from-scratch" in note for note in sizes[layers].notes)
    assert whole == pytest.approx(
        {"bf16": 119.3e6, "fp8": 60.1e6, "int8": 63.3e6, "int5": 41e6, "int4": 33.5e6}, rel=2e-3
    )
    with pytest.raises(UsageError, match="layers names 36; the VLM has layers 0 to 35"):
        plan(PlanConfig(samples=1, layers="0,36"))


def test_a_new_expert_takes_the_memory_and_the_time_of_its_size():
    big = plan(PlanConfig(samples=1000, codec="int8"))
    new = {"from_scratch": True, "expert_layers": 6, "expert_width": 1024}
    small = plan(PlanConfig(samples=1000, codec="int8", **new))
    # 6 layers of four 1024 x 1024 projections and three of 1024 x 4128, and the projections of actions
    assert small.memory.weights == pytest.approx(2 * (6 * (4 * 1024**2 + 3 * 1024 * 4128) + 0.85e6), rel=2e-3)
    assert small.memory.weights < big.memory.weights / 20
    assert small.memory.prefixes == pytest.approx(big.memory.prefixes / 6, rel=0.01)
    assert small.train.compute_s < big.train.compute_s / 4
    assert small.train.optimizer_s < big.train.optimizer_s / 10
    stored = plan(PlanConfig(samples=1000, codec="int8", layers="every:3", **new | {"expert_layers": None}))
    assert stored.memory.prefixes == pytest.approx(big.memory.prefixes / 3, rel=0.01)
    with pytest.raises(UsageError, match="expert_layers is of a new expert, and from_scratch is not given"):
        plan(PlanConfig(samples=1, expert_layers=6))


def test_planned_parameters_are_those_that_are_trained(tiny_checkpoint):
    base = Checkpoint(str(tiny_checkpoint))
    open_sizes = dict.fromkeys(("width", "intermediate", "heads", "layer_map"))
    spec = plan_expert(
        base.shapes(*EXPERT_PARTS), kv_heads=2, head_dim=32, held=(0, 1, 2, 3), seed=0, layers=3, **open_sizes
    )
    assert spec.layer_map == (0, 1, 2)
    assert (spec.width, spec.intermediate, spec.heads) == (96, 192, 4)  # the model's own
    expert = load_expert(NewExpert(base, spec))
    new = {"from_scratch": True, "expert_layers": 3, "model": str(tiny_checkpoint)}
    weights = plan(PlanConfig(samples=1, **new)).memory.weights
    assert weights == 2 * sum(math.prod(parameter.shape) for parameter in expert.parameters())
