"""Adapters begin as nothing, train alone, and merge into the base; checkpointed layers give the same gradients."""

import sys
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from alpacache import flow_matching
from alpacache.alpamayo import load_expert
from alpacache.errors import UsageError
from alpacache.training.trainable import (
    LORA_SCALE,
    apply_checkpoint,
    checkpoint_tensors,
    choose_trainable,
    enable_checkpointing,
)

pytestmark = pytest.mark.system

LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
HEAD = ("action_in_proj.", "action_out_proj.", "expert.norm.")
LAYER = "expert.layers.0.self_attn.q_proj"


@pytest.fixture
def fresh(golden_dir):
    def load(**settings):
        return load_expert(str(golden_dir), **settings)

    return load


@pytest.fixture
def case(golden, golden_prefixes):
    """Two clips of different lengths, with their noise: what `velocity` and the loss need."""
    names = ("noisy_action", "t", "action", "noise")
    tensors = {name: torch.stack([golden[f"clip{clip}.{name}"] for clip in (0, 2)]) for name in names}
    return tensors | {"prefixes": [golden_prefixes[0], golden_prefixes[2]]}


def velocity(expert, case):
    return expert.velocity(case["noisy_action"], case["t"], case["prefixes"])


def loss(expert, case):
    return flow_matching.loss(velocity(expert, case), case["action"][:, None], case["noise"]).mean()


def trained(expert, case, *, steps=5, lr=1e-2, seed=0, **settings):
    """The parameters after a few steps, and the losses."""
    parameters = choose_trainable(expert, "lora", seed=seed, **settings)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(expert, case)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return parameters, losses


def counted(calls, layer):
    """`Prefix.layer`, each call of it noted."""

    def call(self, index):
        calls.append((self, index))
        return layer(self, index)

    return call


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_all_and_head_are_named_as_in_the_checkpoint(fresh):
    expert = fresh()
    state = dict(expert.named_parameters())
    assert choose_trainable(expert, "all", seed=0).keys() == state.keys()
    assert all(parameter.requires_grad for parameter in state.values())
    head = choose_trainable(expert, "head", seed=0)
    assert set(head) == {name for name in state if name.startswith(HEAD)}
    assert {name for name, parameter in state.items() if parameter.requires_grad} == set(head)
    with pytest.raises(ValueError, match="which is 'none'; expected 'all', 'head' or 'lora'"):
        choose_trainable(expert, "none", seed=0)


def test_lora_names_do_not_depend_on_peft(fresh):
    expert = fresh()
    layers, head = len(expert.expert.layers), {name for name, _ in expert.named_parameters() if name.startswith(HEAD)}
    parameters = choose_trainable(expert, "lora", lora_rank=4, seed=0)
    adapters = {f"expert.layers.{i}.{linear}.lora_{part}" for i in range(layers) for linear in LINEARS for part in "AB"}
    assert set(parameters) == adapters | head
    assert parameters[f"{LAYER}.lora_A"].shape == (4, 48)
    assert parameters[f"{LAYER}.lora_B"].shape == (64, 4)
    needing = {id(parameter) for parameter in expert.parameters() if parameter.requires_grad}
    assert needing == {id(parameter) for parameter in parameters.values()}
    assert not any(isinstance(module, torch.nn.Dropout) for module in expert.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_output_is_the_bases_bit_for_bit(dtype, fresh, case):
    base = velocity(fresh(dtype=dtype), case)
    expert = fresh(dtype=dtype)
    parameters = choose_trainable(expert, "lora", seed=0)
    assert torch.equal(velocity(expert, case), base)
    assert {parameter.dtype for parameter in parameters.values()} == {dtype}
    with torch.no_grad():
        parameters[f"{LAYER}.lora_B"].fill_(0.1)
    assert not torch.equal(velocity(expert, case), base)


def test_adapters_are_a_function_of_the_seed_and_their_name_alone(fresh):
    before = torch.random.get_rng_state()
    first = choose_trainable(fresh(), "lora", lora_rank=8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1234)
    assert same(first, choose_trainable(fresh(), "lora", lora_rank=8, seed=3))
    other = choose_trainable(fresh(), "lora", lora_rank=8, seed=4)
    a = first[f"{LAYER}.lora_A"].detach()
    assert not torch.equal(a, other[f"{LAYER}.lora_A"])
    assert not torch.equal(a, first[LAYER.replace("q_proj", "k_proj") + ".lora_A"])
    assert a.abs().max() <= 48**-0.5
    assert a.std().item() == pytest.approx((3 * 48) ** -0.5, rel=0.05)
    assert all(not tensor.any() for name, tensor in first.items() if name.endswith("lora_B"))


def test_adapters_learn_and_leave_the_base_as_it_was(fresh, case):
    expert = fresh()
    parameters, losses = trained(expert, case, steps=10, lora_rank=4)
    assert losses[-1] < 0.9 * losses[0]
    assert all(later < earlier for earlier, later in pairwise(losses[:4]))
    assert all(tensor.any() for name, tensor in parameters.items() if name.endswith("lora_B"))
    now = {name.replace(".base_layer", ""): tensor for name, tensor in expert.state_dict().items()}
    for name, tensor in fresh().state_dict().items():
        assert torch.equal(now[name], tensor) == (name not in parameters), name


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_checkpoint_merged_into_a_fresh_expert_gives_the_same_velocity(alpha, fresh, case, tmp_path, relative_error):
    from safetensors.torch import load_file, save_file

    expert = fresh()
    parameters, _ = trained(expert, case, lora_rank=4, lora_alpha=alpha)
    tensors = checkpoint_tensors(expert, parameters)
    assert set(tensors) == set(parameters) | {LORA_SCALE}
    assert tensors[LORA_SCALE].item() == (2.0 if alpha is None else 0.75)
    save_file(tensors, tmp_path / "model.safetensors")
    merged = fresh()
    apply_checkpoint(merged, load_file(tmp_path / "model.safetensors"))
    assert merged.state_dict().keys() == fresh().state_dict().keys()
    expected = velocity(expert, case)
    assert relative_error(velocity(merged, case), expected) <= 1e-6
    assert relative_error(velocity(fresh(), case), expected) >= 0.01


def test_a_merged_weight_is_rounded_once(fresh, case):
    expert = fresh()
    parameters, _ = trained(expert, case, lora_rank=4)
    merged = fresh(dtype=torch.bfloat16)
    before = merged.state_dict()[f"{LAYER}.weight"].clone()
    apply_checkpoint(merged, checkpoint_tensors(expert, parameters))
    a, b = (parameters[f"{LAYER}.lora_{part}"].detach().double() for part in "AB")
    exact = before.double() + 2.0 * b @ a
    got = merged.state_dict()[f"{LAYER}.weight"]
    spacing = torch.exp2(exact.abs().log2().floor() - 7)
    assert ((got.double() - exact).abs() <= 0.5001 * spacing).all()
    assert not torch.equal(got, before)


@pytest.mark.parametrize("which", ["all", "head"])
def test_plain_tensors_are_copied(which, fresh):
    expert = fresh()
    tensors = checkpoint_tensors(expert, choose_trainable(expert, which, seed=0))
    assert LORA_SCALE not in tensors
    other = fresh()
    apply_checkpoint(other, {name: tensor + 1 for name, tensor in tensors.items()})
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expert.state_dict()[name] + (name in tensors)), name


@pytest.mark.parametrize("lost", [f"{LAYER}.lora_A", f"{LAYER}.lora_B", LORA_SCALE])
def test_an_incomplete_adapter_is_named_and_nothing_changes(lost, fresh):
    expert, merged = fresh(), fresh()
    tensors = checkpoint_tensors(expert, choose_trainable(expert, "lora", seed=0))
    tensors = {name: tensor + 1 for name, tensor in tensors.items() if name != lost}
    with pytest.raises(UsageError, match=rf"run-1 lacks {lost}; adapters are lora_A, lora_B and lora_scale together"):
        apply_checkpoint(merged, tensors, where="run-1")
    assert same(merged.state_dict(), fresh().state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vlm.x": torch.zeros(1)}, r"expert does not have: vlm\.x\. Apply it once, to the base model"),
        ({"expert.norm.weight": torch.zeros(7)}, r"expert\.norm\.weight \[7\] \(expected \[48\]\)"),
        ({f"{LAYER}.lora_A": torch.zeros(4, 7)}, r"q_proj\.weight \[64, 7\] \(expected \[64, 48\]\)"),
        ({f"{LAYER}.lora_A": torch.zeros(5, 48)}, r"q_proj\.weight \[64, 4, 5, 48\] \(expected \[64, 48\]\)"),
        ({f"x.lora_{part}": torch.zeros(4, 4) for part in "AB"}, r"does not have: x\.weight\."),
        ({f"x{i}": torch.zeros(1) for i in range(10)}, r"x0, x1, x2, x3, x4, x5, x6, x7 and 2 more\."),
    ],
)
def test_foreign_tensors_are_named_and_nothing_changes(changes, message, fresh):
    expert, merged = fresh(), fresh()
    tensors = checkpoint_tensors(expert, choose_trainable(expert, "lora", lora_rank=4, seed=0))
    with pytest.raises(UsageError, match=message):
        apply_checkpoint(merged, {**tensors, "action_out_proj.bias": torch.ones(2), **changes})
    assert same(merged.state_dict(), fresh().state_dict())


def test_a_scale_without_adapters_is_foreign(fresh):
    with pytest.raises(UsageError, match=r"the checkpoint holds tensors that the expert does not have: lora_scale\."):
        apply_checkpoint(fresh(), {LORA_SCALE: torch.tensor(2.0)})


def test_without_peft_the_error_says_what_to_install(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    expert = fresh()
    with pytest.raises(UsageError, match=r"pip install 'alpacache\[lora\]'"):
        choose_trainable(expert, "lora", seed=0)
    assert choose_trainable(expert, "head", seed=0)


@pytest.mark.parametrize("settings", [{"lora_rank": 0}, {"lora_alpha": 0.0}, {"lora_alpha": float("nan")}])
def test_a_rank_or_alpha_that_cannot_be_is_refused(settings, fresh):
    with pytest.raises(UsageError, match="expected a rank of at least 1 and an alpha above 0"):
        choose_trainable(fresh(), "lora", seed=0, **settings)


@pytest.mark.parametrize("which", ["all", "head", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_layers_give_the_same_loss_and_gradients(which, dtype, fresh, case, monkeypatch):
    """And ask the one prefix of the call for each layer once more."""
    results, asked = [], []
    for checkpointed in (False, True):
        expert = fresh(dtype=dtype).train()
        parameters = choose_trainable(expert, which, seed=0)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(0.01 if name.endswith("lora_B") else 0.0)
        if checkpointed:
            enable_checkpointing(expert)
        batch, calls = expert.batch(case["prefixes"]), []
        with monkeypatch.context() as patch:
            patch.setattr(type(batch), "layer", counted(calls, type(batch).layer))
            value = loss(expert, {**case, "prefixes": batch})
            value.backward()
        assert all(called is batch for called, _ in calls)
        results.append({"loss": value.detach()} | {name: parameter.grad for name, parameter in parameters.items()})
        asked.append(len(calls))
    assert same(*results)
    layers = len(expert.expert.layers)
    assert all(gradient.any() for gradient in results[0].values())
    assert asked == [2 * layers, 3 * layers]


def test_checkpointing_keeps_less_and_warns_of_nothing(fresh, case, caplog):
    kept = []
    for checkpointed in (False, True):
        expert = fresh().train()
        choose_trainable(expert, "all", seed=0)
        if checkpointed:
            enable_checkpointing(expert)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = expert.batch(case["prefixes"])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(expert, {**case, "prefixes": batch})
        kept.append(sum(sizes.values()))
        value.backward()
    assert kept[1] < 0.5 * kept[0]
    assert not caplog.records


def test_evaluation_is_not_checkpointed(fresh, case):
    expert = fresh().eval()
    enable_checkpointing(expert)
    base = velocity(fresh(), case)
    with torch.no_grad():
        assert torch.equal(velocity(expert, case), base)
        assert torch.equal(velocity(expert.train(), case), base)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("which", ["all", "lora"])
def test_a_checkpointed_step_replays_as_a_graph(which, fresh, case):
    expert = fresh(dtype=torch.bfloat16, device="cuda").train()
    parameters = choose_trainable(expert, which, seed=0)
    assert {(parameter.dtype, parameter.device.type) for parameter in parameters.values()} == {(torch.bfloat16, "cuda")}
    enable_checkpointing(expert)
    tensors = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    tensors["prefixes"] = expert.batch(case["prefixes"])

    def step(context):
        for parameter in parameters.values():
            parameter.grad = None
        with context:
            value = loss(expert, tensors)
            value.backward()
        return {"loss": value.detach()} | {name: parameter.grad for name, parameter in parameters.items()}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(nullcontext())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    captured = step(torch.cuda.graph(graph))
    tensors["noisy_action"].mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    captured = {name: tensor.clone() for name, tensor in captured.items()}
    expected = step(nullcontext())
    assert captured.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(captured[name], tensor, rtol=1e-2, atol=1e-4, msg=name)
