"""The optimizers' interface: which one runs, torch's AdamW bit for bit, scale, skip, resume."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from alpacache.errors import DataError, UsageError
from alpacache.planning.workload import state_bytes
from alpacache.training.optimizers import make_optimizer, resolve

OPTIONS = {"betas": (0.9, 0.95), "weight_decay": 0.1}
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def values(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(17, 9, generator=generator).to(device),
        "b": torch.randn(5, generator=generator).to(device),
    }


def make(start, name="adamw"):
    parameters = {key: nn.Parameter(value.clone()) for key, value in start.items()}
    return parameters, make_optimizer(name, parameters, **OPTIONS)


def take_step(parameters, optimizer, gradients, lr=1e-2, scale=1.0, skip=False):
    device = next(iter(parameters.values())).device
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone() if name in gradients else None
    lr = torch.tensor(lr, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    optimizer.step(lr=lr, scale=torch.tensor(scale, device=device), skip=torch.tensor(skip, device=device))


def gradients(count, start):
    torch.manual_seed(1)
    return [{name: torch.randn_like(value) for name, value in start.items()} for _ in range(count)]


def snapshot(parameters, optimizer):
    return {name: t.detach().clone() for name, t in {**parameters, **optimizer.tensors()}.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_resolve():
    assert [resolve("auto", device) for device in (CPU, GPU)] == ["adamw", "adamw8"]
    assert [resolve("adamw", device) for device in (CPU, GPU)] == ["adamw", "adamw"]
    assert resolve("adamw8", GPU) == "adamw8"
    with pytest.raises(UsageError, match="adamw8 needs a GPU"):
        resolve("adamw8", CPU)
    with pytest.raises(UsageError, match="'sgd' is unknown"):
        resolve("sgd", CPU)
    with pytest.raises(UsageError, match="adamw8 needs a GPU"):
        make(values(), "adamw8")


def test_state_bytes():
    assert state_bytes("adamw", 1000) == 4000
    assert state_bytes("adamw8", 64000) == 195000


def test_auto_on_a_cpu_is_torchs_adamw_bit_for_bit():
    start = values()
    parameters, ours = make(start, "auto")
    plain = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = torch.optim.AdamW(plain.values(), lr=1.0, fused=False, **OPTIONS)
    for step, gradient in enumerate(gradients(5, start)):
        lr = 1e-2 / (step + 3)
        take_step(parameters, ours, gradient, lr=lr)
        for name, parameter in plain.items():
            parameter.grad = gradient[name].clone()
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
    assert all(torch.equal(parameters[name], plain[name]) for name in plain)
    state = ours.tensors()
    assert set(state) == {f"{key}.{name}" for name in plain for key in ("step", "exp_avg", "exp_avg_sq")}
    assert torch.equal(state["exp_avg_sq.b"], theirs.state[plain["b"]]["exp_avg_sq"])


def test_scale_multiplies_and_skip_changes_nothing():
    start = values()
    first, second = make(start), make(start)
    one, two = gradients(2, start)
    take_step(*first, one, scale=0.25)
    take_step(*second, {name: gradient * 0.25 for name, gradient in one.items()})
    assert same(snapshot(*first), snapshot(*second))
    take_step(*first, {name: gradient * float("nan") for name, gradient in two.items()}, skip=True)
    assert same(snapshot(*first), snapshot(*second))


def test_a_parameter_without_a_gradient_is_left_alone():
    parameters, ours = make(values())
    before = snapshot(parameters, ours)
    take_step(parameters, ours, {"b": torch.ones(5)}, scale=0.5)
    after = snapshot(parameters, ours)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"b", "step.b", "exp_avg.b", "exp_avg_sq.b"}


def test_resumed_equals_uninterrupted_and_addresses_stay():
    start = values()
    steps = gradients(4, start)
    parameters, ours = make(start)
    for gradient in steps[:2]:
        take_step(parameters, ours, gradient)
    saved = snapshot(parameters, ours)
    again, resumed = make({name: saved[name] for name in start})
    addresses = {name: tensor.data_ptr() for name, tensor in resumed.tensors().items()}
    resumed.load_tensors(saved)
    assert {name: tensor.data_ptr() for name, tensor in resumed.tensors().items()} == addresses
    for gradient in steps[2:]:
        take_step(parameters, ours, gradient)
        take_step(again, resumed, gradient)
    assert same(snapshot(parameters, ours), snapshot(again, resumed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg_sq.b": None}, r"no tensor 'exp_avg_sq\.b'"),
        ({"exp_avg_sq.b": torch.zeros(6)}, r"'exp_avg_sq\.b' is torch\.float32 \[6\], expected torch\.float32 \[5\]"),
        ({"exp_avg_sq.b": torch.zeros(5, dtype=torch.uint8)}, r"'exp_avg_sq\.b' is torch\.uint8 \[5\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, message):
    start = values()
    parameters, ours = make(start)
    take_step(parameters, ours, gradients(1, start)[0])
    tensors = {name: torch.full_like(tensor, 7) for name, tensor in ours.tensors().items()} | change
    before = snapshot(parameters, ours)
    with pytest.raises(DataError, match=message):
        ours.load_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert same(before, snapshot(parameters, ours))


def test_a_state_of_another_precision_is_converted():
    _, ours = make(values())
    ours.load_tensors({name: torch.full_like(t, 1.5, dtype=torch.bfloat16) for name, t in ours.tensors().items()})
    assert torch.equal(ours.tensors()["exp_avg.b"], torch.full((5,), 1.5))


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from alpacache.training import adamw8_update, optimizers;"
    code += "print(adamw8_update.triton)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr[-2000:]


@pytest.mark.gpu
@needs_gpu
def test_fused_adamw_is_captured_with_its_scalars():
    """Replayed with other lr, scale and skip: close to the plain steps of a CPU."""
    start = values()
    settings = [(1e-2, 1.0, False), (5e-3, 0.25, False), (1e-2, 1.0, True), (1e-3, 1.0, False)]
    steps = gradients(len(settings), start)
    plain = make(start)
    parameters, ours = make({name: value.cuda() for name, value in start.items()})
    lr, scale = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    skip = torch.tensor(True, device="cuda")
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    ours.step(lr=lr, scale=scale, skip=skip)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step(lr=lr, scale=scale, skip=skip)
    for gradient, setting in zip(steps, settings, strict=True):
        for name, parameter in parameters.items():
            parameter.grad.copy_(gradient[name])
        for tensor, value in zip((lr, scale, skip), setting, strict=True):
            tensor.fill_(value)
        graph.replay()
        take_step(*plain, gradient, *setting)
    for name, expected in snapshot(*plain).items():
        torch.testing.assert_close(snapshot(parameters, ours)[name].cpu(), expected, rtol=1e-5, atol=1e-7)
    assert float(ours.tensors()["step.b"]) == 3
