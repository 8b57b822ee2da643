"""The expert's layers, compiled for steps of one backward or of two.

A compiled backward may write over what its forward has kept, which a second backward would then read. torch has a
setting against it, but looks at it when a graph is compiled alone: graphs of the same layer that were compiled without
it, in this process or into the cache on the disk, would be used again, and their second backward is wrong without a
word. So layers for two backwards are compiled by a backend of their own, and into entries of their own in the cache.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_CACHE_TAG = "alpacache: a second backward"


def compile_for(layers: nn.ModuleList, *, backwards: int) -> None:
    """Have each layer compiled when it is first called; its graph can then be gone back through so many times."""
    for layer in layers:
        if backwards == 1:
            layer.compile()
        else:
            layer.compile(backend=_for_two_backwards)


def _for_two_backwards(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """Compile as torch does by default, but so that a backward leaves alone what its forward has kept."""
    import torch._functorch.config as functorch
    from torch._inductor.compile_fx import compile_fx

    with _apart(), functorch.patch(donated_buffer=False):
        return compile_fx(graph, inputs, inner_compile=_compile_inner)


def _compile_inner(*args: Any, **options: Any) -> Any:
    """Compile a forward, or a backward when it is first called for: behind the call that made the layer's."""
    from torch._inductor.compile_fx import compile_fx_inner

    with _apart():
        return compile_fx_inner(*args, **options)


def _apart() -> AbstractContextManager[None]:
    """Graphs of the cache have the tag. New each time: one of an older torch may not be entered twice."""
    tagged: AbstractContextManager[None] = torch.compiler.config.patch(cache_key_tag=_CACHE_TAG)  # type: ignore[attr-defined]
    return tagged
