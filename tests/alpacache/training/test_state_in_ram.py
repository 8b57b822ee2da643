"""Optimizer state in RAM: every bit is that of state on the GPU, whenever it is looked at."""

import json
import shutil
from functools import partial

import pytest
import torch
from adamw8_reference import ReferenceAdamW8
from torch import nn

import alpacache
from alpacache.errors import DataError
from alpacache.extraction.config import ExtractConfig
from alpacache.gpu.squares import SquareSum
from alpacache.planning.workload import STATE_PLACES
from alpacache.training import train as training
from alpacache.training.adamw8_update import Hyperparameters
from alpacache.training.config import TrainConfig
from alpacache.training.optimizers import make_optimizer
from alpacache.training.state_in_ram import spread
from alpacache.training.streamed_optimizer import StreamedOptimizer
from alpacache.training.two_backwards import TwoBackwards

MAKERS = {
    "adamw8": partial(ReferenceAdamW8, hyper=Hyperparameters(betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)),
    "adamw": partial(make_optimizer, "adamw", betas=(0.9, 0.999), weight_decay=0.01),
}
LAYERS = 4
SHAPES = {"norm.weight": (30,), "mlp.up.weight": (64, 30), "mlp.down.weight": (30, 64), "attn.q.weight": (40, 30)}


def parameters():
    torch.manual_seed(0)
    names = {f"expert.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    names = {"action_in_proj.weight": (7, 5)} | names | {"expert.norm.weight": (30,)}
    return {name: nn.Parameter(torch.randn(shape).bfloat16()) for name, shape in names.items()}


class Loop:
    """Steps as `TrainStep` takes them: the gradients of a loss come from autograd, in so many micro-batches."""

    def __init__(self, make, layers=(), *, keep_gradients=False, parts=2):
        self.parameters, self.parts = parameters(), parts
        self.optimizer = make(self.parameters)
        if layers:
            self.optimizer = StreamedOptimizer(make, self.parameters, layers, keep_gradients=keep_gradients)
        self.streamed = self.optimizer if layers else None

    def step(self, number, *, skip=False):
        for name, parameter in self.parameters.items():
            if self.streamed is None or name not in self.streamed.waiting:
                parameter.grad = None
        if self.streamed is not None:
            self.streamed.begin()
        torch.manual_seed(number)
        found = []
        for _ in range(self.parts):
            loss = self.loss(number)
            loss.backward()
            found.append(loss.item())
        squared_norm = SquareSum(torch.device("cpu"))([p.grad for p in self.parameters.values() if p.grad is not None])
        self.optimizer.step(**self.scalars(number, squared_norm, skip=skip))
        if self.streamed is not None:
            self.streamed.stepped()
            self.streamed.end()
        return found

    def loss(self, number):
        loss = torch.zeros(())
        for name, parameter in self.parameters.items():
            if self.streamed is not None and "layers" in name:
                self.streamed.before_layer(int(name.split(".")[2]))
            if number % 2 or "attn" not in name:  # a gradient is missing in every other step
                loss = loss + (parameter.float() * torch.randn(parameter.shape)).tanh().sum()
        return loss

    def scalars(self, number, squared_norm, *, skip):
        scale = (1.0 / squared_norm.sqrt()).clamp(max=1.0)
        return {"lr": torch.tensor(1e-3 * number), "scale": scale, "skip": torch.tensor(skip)}

    def state(self):
        if self.optimizer is self.streamed:
            self.optimizer.settle()
        values = {**self.parameters, **self.optimizer.tensors()}
        return {name: value.detach().clone() for name, value in values.items()}


class TwiceLoop(Loop):
    """The same with two backwards."""

    def __init__(self, make, layers):
        super().__init__(make, parts=1)
        self.optimizer = TwoBackwards(make, self.parameters, layers)

    def step(self, number, *, skip=False):
        for parameter in self.parameters.values():
            parameter.grad = None
        self.optimizer.begin()
        torch.manual_seed(number)
        loss = self.loss(number)
        with self.optimizer.summing():
            loss.backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in self.optimizer.in_layers)
        scalars = self.scalars(number, self.optimizer.squared_norm(), skip=skip)
        with self.optimizer.updating(**scalars):
            loss.backward(inputs=self.optimizer.in_layers)
        assert all(parameter.grad is None for parameter in self.optimizer.in_layers)
        self.optimizer.step(**scalars)
        self.optimizer.end()
        return [loss.item()]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3], [3]], ids=str)
@pytest.mark.parametrize("keep_gradients", [False, True])
def test_the_bits_of_resident_state(make, layers, keep_gradients):
    resident, streamed = Loop(make), Loop(make, layers, keep_gradients=keep_gradients)
    steps = [1, 3, 5, 7, 9] if keep_gradients else [1, 2, 3, 4, 5]  # a graph has the same gradients in every step
    for place, number in enumerate(steps):
        skip = place == 2
        assert resident.step(number, skip=skip) == streamed.step(number, skip=skip)
        if place in (1, 4):  # looked at in between and at the end, twice
            assert same(resident.state(), streamed.state())
            assert same(resident.state(), streamed.state())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("layers", [[], [0, 1, 2, 3], [1, 3], [2]], ids=str)
def test_the_bits_of_one_backward(make, layers):
    once, twice = Loop(make, parts=1), TwiceLoop(make, layers)
    for place, number in enumerate([1, 2, 3, 4, 5]):
        skip = place == 2
        assert once.step(number, skip=skip) == twice.step(number, skip=skip)
        assert same(once.state(), twice.state())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_either_goes_on_from_the_other(make):
    once = partial(Loop, parts=1)
    whole = once(make)
    for number in (1, 2, 3, 4):
        whole.step(number)
    ways = [(once, [], once, [0, 2, 3]), (once, [1, 2, 3], once, []), (once, [1, 3], once, [0, 1, 2, 3])]
    ways += [(once, [0, 2], TwiceLoop, [1, 2]), (TwiceLoop, [0, 3], once, [3]), (TwiceLoop, [1], TwiceLoop, [0, 1])]
    for loop_before, layers_before, loop_after, layers_after in ways:
        before, after = loop_before(make, layers_before), loop_after(make, layers_after)
        before.step(1)
        before.step(2)
        saved = before.state()
        after.step(7)
        after.state()
        after.optimizer.load_tensors({name: saved[name] for name in after.optimizer.tensors()})
        with torch.no_grad():
            for name, parameter in after.parameters.items():
                parameter.copy_(saved[name])
        after.step(3)
        after.step(4)
        assert same(whole.state(), after.state())


def test_a_step_that_ended_early_leaves_no_update_to_the_next():
    """Its learning rate and scale stayed, and the next first backward updated layers with them."""
    once, twice = Loop(MAKERS["adamw"], parts=1), TwiceLoop(MAKERS["adamw"], [1])
    loss = twice.loss(1)
    with (
        pytest.raises(KeyboardInterrupt),
        twice.optimizer.updating(**twice.scalars(1, torch.ones(()), skip=False)),
    ):
        raise KeyboardInterrupt
    del loss
    once.step(3)
    twice.step(3)
    assert same(once.state(), twice.state())


def test_a_state_of_other_shapes_is_refused():
    for loop in (Loop, TwiceLoop):
        streamed = loop(MAKERS["adamw"], [0, 1]).optimizer
        with pytest.raises(DataError, match="has no tensor"):
            streamed.load_tensors({})


def test_groups_are_no_larger_than_the_largest_parameter_and_places_are_few():
    groups = Loop(MAKERS["adamw8"], [0, 1, 2, 3]).optimizer._in_ram.groups
    assert len(groups) == 3 * LAYERS
    assert max(sum(p.numel() for p in group.parameters.values()) for group in groups) == 64 * 30
    assert len({group.place.data_ptr() for group in groups}) == STATE_PLACES
    with pytest.raises(ValueError, match="no trained parameter"):
        Loop(MAKERS["adamw8"], [9])


def test_streamed_layers_are_spread_and_the_last_is_one():
    assert spread(36, 36) == list(range(36))
    assert spread(36, 12) == list(range(2, 36, 3))
    for count in range(1, 37):
        assert len(spread(36, count)) == count
        assert spread(36, count)[-1] == 35


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed") / "store"
    config = ExtractConfig(source="synthetic:6", model=str(tiny_checkpoint), store=str(path), frames=1, device="cpu")
    assert alpacache.extract(config).extracted == 6
    return path


@pytest.fixture
def train(tiny_checkpoint, store, tmp_path, monkeypatch):
    """Trains a run `name` with the state of so many layers in RAM, and one or two backwards a step."""
    settle = training.auto_settings.settle

    def run(name, streamed_layers, backwards=1, **changes):
        def planned(*args, **options):
            plan = settle(*args, **options)
            return training.replace(plan, streamed_layers=streamed_layers, backwards=backwards)

        monkeypatch.setattr(training.auto_settings, "settle", planned)
        values = {"stores": (str(store),), "model": str(tiny_checkpoint), "out": str(tmp_path / name), "steps": 5}
        values |= {"batch_size": 4, "lr": 1e-3, "warmup": 1, "save_every": 2, "keep": 9, "device": "cpu"}
        values |= {"on_overlap": "allow", "val": str(store), "val_every": 3}
        alpacache.train(TrainConfig(**values | changes))
        return tmp_path / name

    return run


def files(run):
    """The tensor files of all checkpoints."""
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("checkpoints/*/*.safetensors"))}


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[value for name, value in row.items() if "loss" in name] for row in rows]


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.5, "ema_every": 2},
        {"trainable": "lora", "lora_rank": 2},
        {"micro_batch": 2, "checkpointing": True},
        {"checkpointing": True, "draws": 2},
    ],
    ids="-".join,
)
def test_checkpoints_are_the_same_and_either_resumes(changes, train):
    resident, streamed = train("resident", 0, **changes), train("streamed", 3, **changes)
    whole = files(resident)
    assert len(whole) >= 6
    assert whole == files(streamed)
    assert losses(resident) == losses(streamed)
    ways = [(resident, 4, 1), (streamed, 0, 1)]
    if "micro_batch" not in changes:
        twice = train("twice", 2, 2, **changes)
        assert whole == files(twice)
        assert losses(resident) == losses(twice)
        ways = [(resident, 3, 2), (streamed, 0, 2), (twice, 2, 1)]
    for run, layers, backwards in ways:
        for step in (4, 5):
            shutil.rmtree(run / "checkpoints" / f"step-{step:07d}")
        train(run.name, layers, backwards, **changes, resume=True)
        assert files(run) == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream", "ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize(
    "changes",
    [
        {"compile": False},
        {"compile": False, "capture": False},
        {"compile": False, "micro_batch": 2, "checkpointing": True, "optimizer": "adamw"},
        {"compile": False, "checkpointing": True},
        {"ema": 0.5, "ema_every": 2},
        {"checkpointing": True, "clip": 0.1},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_a_gpu_makes_the_same_checkpoints(changes, train):
    """Copies and updates that overlap, in a graph and without one."""
    options = changes | {"device": "cuda", "steps": 8}
    resident, streamed = (train(f"run{layers}", layers, **options) for layers in (0, 4))
    assert files(resident) == files(streamed)
    assert losses(resident) == losses(streamed)
    if "micro_batch" not in changes:
        for layers in (0, 2, 4):
            twice = train(f"twice{layers}", layers, 2, **options)
            assert losses(resident) == losses(twice)
            assert files(resident) == files(twice)
    shutil.rmtree(streamed / "checkpoints" / "step-0000008")
    train("run4", 2, device="cuda", steps=8, **changes, resume=True)
    assert files(resident) == files(streamed)
