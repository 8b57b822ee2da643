"""Compiled layers whose graphs are gone back through twice."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from alpacache.training.compiled_expert import compile_for


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(64, 64), nn.Parameter(torch.randn(64))

    def forward(self, x):
        return x + torch.sin(self.inner(x)) * self.scale


def gradients(*, backwards):
    """The gradients of each backward through layers that were compiled for so many."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(3))
    compile_for(layers, backwards=backwards)
    x = torch.randn(8, 64)
    for layer in layers:
        x = layer(x)
    loss, parameters = x.square().sum(), list(layers.parameters())
    return [torch.autograd.grad(loss, parameters, retain_graph=number + 1 < backwards) for number in range(backwards)]


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own use of torch.jit
@pytest.mark.parametrize("same_process", [True, False], ids=["same-process", "cache-on-disk"])
def test_a_second_backward_finds_what_the_forward_has_kept(same_process):
    """Graphs that were compiled for one backward were used again, and the second one's gradients were wrong."""
    setting = torch._functorch.config.donated_buffer
    with fresh_cache():
        torch._dynamo.reset()
        (once,) = gradients(backwards=1)
        if not same_process:
            torch._dynamo.reset()
        counters.clear()
        first, second = gradients(backwards=2)
        assert counters["inductor"]["fxgraph_cache_hit"] == 0
        (again,) = gradients(backwards=1)
    torch._dynamo.reset()
    for others in (first, second, again):
        assert all(map(torch.equal, once, others))
    assert torch._functorch.config.donated_buffer == setting
