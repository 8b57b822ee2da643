"""Ways of `bench_prefill_turns`: the VLM's layers as `extract` compiles them, each with a change or several.

A kind is a function in place of `compiled_layers.text_layer` or `vision_block`. It is compiled once, however many ways
take it; a way takes one of each, and may change what is around the layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from bench_prefill import Joined
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from alpacache.alpamayo import FrozenVLM, compiled_layers
from alpacache.alpamayo import vlm as vlm_module
from alpacache.alpamayo.compiled_layers import CompiledLayers, _rms_norm, _rotated
from alpacache.alpamayo.prompt_rows import PromptRows
from alpacache.alpamayo.text_layers import LayerKV, run_layer

_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What takes a group of samples through the VLM."""

    text: str = "plain"
    """Words of `text_kind`; empty: as transformers has it, and the tower too."""
    vision: str = "plain"
    """Words of `vision_kind`."""
    keys_alone: bool = False
    """The last layer makes keys and values only; there are no hidden states."""
    no_wait: bool = False
    """Positions are sent from page-locked memory, so that nobody waits for the tower."""
    mergers: bool = False
    """What is behind the tower's blocks is compiled too."""


WAYS = {
    "eager": Way(text=""),
    "compiled": Way(),
    "best": Way(text="joined cudnn", vision="gelu flip cudnn", keys_alone=True, no_wait=True),
    "gelu": Way(vision="gelu"),
    "keys alone": Way(keys_alone=True),
    "flip": Way(vision="flip"),
    "added": Way(text="added"),
    "no wait": Way(no_wait=True),
    "halves": Way(vision="halves"),
    "best added": Way(text="joined added", vision="gelu flip cudnn", keys_alone=True, no_wait=True),
    "mergers": Way(mergers=True),
}
"""`gelu`: bias and activation in the epilogue of the tower's inner product. `keys alone`: the last text layer makes
keys and values only. `flip`, `halves`: queries and keys of the tower are turned together and in the order of the
product's values, the partner of a channel found by a flip, or two halves computed. `added`: text layers add to the
hidden states within the products. `no wait`, `mergers`: see `Way`. `best`: all but the last four, with joined products
and cuDNN's attention; `best added` with `added` too."""


@torch.library.custom_op("alpacache_bench::add_product", mutates_args=("to",))
def _add_product(to: Tensor, values: Tensor, weight: Tensor) -> None:
    """`to += values @ weight.T`, the sum rounded once."""
    to.flatten(0, -2).addmm_(values.flatten(0, -2), weight.t())


@_add_product.register_fake
def _(to: Tensor, values: Tensor, weight: Tensor) -> None:
    return None


def other_text_layer(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Any,
    *,
    epsilon: float,
    activation: Callable[[Tensor], Tensor],
    joined: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`text_layer` whose products add to `hidden` in place; `joined`: `weights` are those of `Joined`."""
    if joined:
        norm, into, query_norm, key_norm, output, post_norm, gate_up, down = weights
        width = query_norm.shape[0]
        queries = output.shape[1] // width
        groups = (into.shape[0] // width - queries) // 2
        all_heads = F.linear(_rms_norm(hidden, norm, epsilon), into).unflatten(2, (-1, width))
        query, key, value = all_heads.split([queries, groups, groups], dim=2)
    else:
        norm, output, post_norm, down = weights.input_norm, weights.output, weights.post_norm, weights.down
        query_norm, key_norm = weights.query_norm, weights.key_norm
        inner = _rms_norm(hidden, norm, epsilon)
        into = (weights.query, weights.key, weights.value)
        query, key, value = (F.linear(inner, one).unflatten(2, (-1, query_norm.shape[0])) for one in into)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query = _rotated(_rms_norm(query, query_norm, epsilon).transpose(1, 2), cos, sin)
    key = _rotated(_rms_norm(key, key_norm, epsilon).transpose(1, 2), cos, sin)
    value = value.transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.ops.alpacache_bench.add_product(hidden, attended.transpose(1, 2).flatten(2), output)
    inner = _rms_norm(hidden, post_norm, epsilon)
    if joined:
        gate, up = F.linear(inner, gate_up).chunk(2, dim=-1)
    else:
        gate, up = F.linear(inner, weights.gate), F.linear(inner, weights.up)
    torch.ops.alpacache_bench.add_product(hidden, activation(gate) * up, down)
    return hidden, key, value


def other_block(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Any,
    *,
    heads: int,
    epsilon: float,
    activation: Any,
    gelu: bool,
    turn: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """`vision_block` with the activation in the product's epilogue, or queries and keys turned otherwise."""
    norm = partial(F.layer_norm, normalized_shape=(hidden.shape[-1],), eps=epsilon)
    inner = norm(hidden, weight=weights.norm1, bias=weights.norm1_bias)
    qkv = F.linear(inner, weights.qkv, weights.qkv_bias).view(*hidden.shape[:2], 3, heads, -1)
    if turn is None:
        query, key, value = qkv.transpose(1, 3).unbind(2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query, key = (_rotated(each.float(), cos, sin).to(hidden.dtype) for each in (query, key))
    else:
        both = turn(qkv[:, :, :2].float(), cos[:, :, None, None], sin[:, :, None, None]).to(hidden.dtype)
        query, key = both.transpose(1, 3).unbind(2)
        value = qkv[:, :, 2].transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, key, value)
    hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), weights.output, weights.output_bias)
    inner = norm(hidden, weight=weights.norm2, bias=weights.norm2_bias)
    if gelu and inner.is_cuda:  # elsewhere this product's activation is the exact one
        flat = torch._addmm_activation(weights.inner_bias, inner.flatten(0, 1), weights.inner.t(), use_gelu=True)
        inner = flat.view(*inner.shape[:2], -1)
    else:
        inner = activation(F.linear(inner, weights.inner, weights.inner_bias))
    return hidden + F.linear(inner, weights.outer, weights.outer_bias)


def turned_by_halves(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `_rotated` gives, each half of the channels computed from both."""
    (first, second), (cos1, cos2), (sin1, sin2) = (each.chunk(2, dim=-1) for each in (values, cos, sin))
    return torch.cat((first * cos1 - second * sin1, second * cos2 + first * sin2), dim=-1)


def turned_by_flip(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `_rotated` gives: the halves change places by their index, and the sign is the sine's."""
    half = values.shape[-1] // 2
    partner = values.unflatten(-1, (2, half)).flip(-2).flatten(-2)
    first = torch.arange(2 * half, device=sin.device) < half
    return values * cos + partner * torch.where(first, -sin, sin)


def vision_kind(words: str) -> Callable[..., Tensor]:
    if not set(words.split()) & {"gelu", "flip", "halves"}:
        return compiled_layers.vision_block
    turn = turned_by_flip if "flip" in words else turned_by_halves if "halves" in words else None
    return partial(other_block, gelu="gelu" in words, turn=turn)


def text_kind(words: str) -> Callable[..., Any]:
    if "added" in words:
        return partial(other_text_layer, joined="joined" in words)
    return Joined.layer if "joined" in words else compiled_layers.text_layer


class Turns:
    """One VLM that goes all ways, one after the other."""

    def __init__(self, vlm: FrozenVLM, *, backend: str) -> None:
        self.vlm = vlm
        self._compiled = partial(torch.compile, fullgraph=True, backend=backend)
        self._layers = CompiledLayers(vlm.model, backend=backend)
        visual = vlm.model.visual
        self._replaced = [(one, one.__dict__["forward"]) for one in (visual.patch_embed, *visual.blocks)]
        self._kinds: dict[str, Any] = {}
        self._joined = Joined()
        torch._dynamo.config.recompile_limit = 64  # kinds share functions
        self._leave()

    @contextmanager
    def going(self, way: Way) -> Iterator[None]:
        """Within it the VLM goes this way."""
        self._layers._failed = self._layers._batched = False
        with ExitStack() as stack:
            stack.callback(self._leave)
            if way.text:
                self.vlm._run_layer = self._layers.run_layer
                for module, forward in self._replaced:
                    module.forward = forward
                self._layers._text, self._layers._vision = self._text(way.text), self._vision(way.vision)
            if "joined" in way.text:
                stack.enter_context(mock.patch.object(compiled_layers, "TextWeights", self._joined))
            if "cudnn" in way.text + way.vision:
                stack.enter_context(sdpa_kernel(_CUDNN_FIRST, set_priority=True))
            if way.keys_alone:
                stack.enter_context(mock.patch.object(FrozenVLM, "_through", through_keys))
            if way.no_wait:
                stack.enter_context(mock.patch.object(FrozenVLM, "_embedded", embedded_without_waiting))
            if way.mergers:
                stack.enter_context(self._mergers())
            yield

    @property
    def failed(self) -> bool:
        """Whether something could not be compiled."""
        return self._layers._failed

    def _leave(self) -> None:
        self.vlm._run_layer = run_layer
        for module, _ in self._replaced:
            module.__dict__.pop("forward", None)

    def _text(self, words: str) -> Any:
        text: Any = self.vlm.model.language_model
        settings = {"epsilon": text.config.rms_norm_eps, "activation": text.layers[0].mlp.act_fn}
        return self._kind(f"text {words}", lambda: partial(text_kind(words), **settings))

    def _vision(self, words: str) -> Any:
        block: Any = self.vlm.model.visual.blocks[0]
        settings = {"heads": block.attn.num_heads, "epsilon": block.norm1.eps, "activation": block.mlp.act_fn}
        return self._kind(f"vision {words}", lambda: partial(vision_kind(words), **settings))

    def _kind(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kinds:
            self._kinds[name] = self._compiled(make())
        return self._kinds[name]

    @contextmanager
    def _mergers(self) -> Iterator[None]:
        visual: Any = self.vlm.model.visual
        mergers = [visual.merger, *visual.deepstack_merger_list]
        for one in mergers:
            name, epsilon = f"merger {one.use_postshuffle_norm}", one.norm.eps
            how = {"behind": one.use_postshuffle_norm, "epsilon": epsilon, "activation": one.act_fn}
            kind = self._kind(name, lambda how=how: partial(merged, **how))
            one.forward = partial(_run_merger, one, kind)
        try:
            yield
        finally:
            for one in mergers:
                del one.forward


def merged(patches: Tensor, weights: Sequence[Tensor], *, behind: bool, epsilon: float, activation: Any) -> Tensor:
    """What transformers' patch merger computes; `behind`: it norms what is merged already."""
    norm, norm_bias, inner, inner_bias, outer, outer_bias = weights
    width = inner.shape[1]
    values = patches.view(-1, width) if behind else patches
    values = F.layer_norm(values, values.shape[-1:], norm, norm_bias, epsilon).view(-1, width)
    return F.linear(activation(F.linear(values, inner, inner_bias)), outer, outer_bias)


def _run_merger(merger: Any, kind: Any, patches: Tensor) -> Tensor:
    torch._dynamo.mark_dynamic(patches, 0)
    parts = (merger.norm, merger.linear_fc1, merger.linear_fc2)
    found: Tensor = kind(patches, tuple(tensor for part in parts for tensor in (part.weight, part.bias)))
    return found


def layer_kv(layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> LayerKV:
    """Keys and values of a layer of transformers' text model, and nothing behind them."""
    attention = layer.self_attn
    inner = layer.input_layernorm(hidden)
    heads = (*inner.shape[:-1], -1, attention.head_dim)
    key = attention.k_norm(attention.k_proj(inner).view(heads)).transpose(1, 2)
    cos, sin = (each.unsqueeze(1) for each in angles)
    return LayerKV(_rotated(key, cos, sin), attention.v_proj(inner).view(heads).transpose(1, 2))


@torch.inference_mode()
def through_keys(vlm: FrozenVLM, rows: PromptRows) -> Any:
    """`FrozenVLM._through` without hidden states and what only they need."""
    text: Any = vlm.model.language_model
    last: nn.Module = text.layers[-1]
    cache = [rows.advance(number, layer) for number, layer in enumerate(text.layers[:-1])]
    cache.append(layer_kv(last, rows.prompts.hidden, rows.prompts.angles))
    made = rows.features(cache, rows.prompts.hidden)
    return [(replace(prefix, hidden=None), tails) for prefix, tails in made]


@torch.inference_mode()
def embedded_without_waiting(vlm: FrozenVLM, prompts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> PromptRows:
    """`FrozenVLM._embedded`, whose positions and places are sent from page-locked memory."""

    def sent(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if vlm.device.type == "cuda" else tensor).to(vlm.device, non_blocking=True)

    ids_of_all, pixel_values, grids = zip(*prompts, strict=True)
    cut = [vlm._cut(ids) for ids in ids_of_all]
    for row, grid in zip(cut, grids, strict=True):
        vlm._check_images(row, grid)
    seen = vlm.model.visual(
        torch.cat([one.to(vlm.device, vlm.dtype, non_blocking=True) for one in pixel_values]),
        grid_thw=torch.cat(grids).cpu(),
    )
    lengths = [len(row) for row in cut]
    ids = torch.full((len(cut), max(lengths)), vlm.future_start_id)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    deltas = []
    for number, (row, grid) in enumerate(zip(cut, grids, strict=True)):
        ids[number, : len(row)] = row
        positions[:, number, : len(row)], delta = vlm._positions(row, grid.cpu())
        deltas.append(delta)
    embeddings = vlm._embed(sent(ids))
    rows = vlm_module.text_rows(vlm.model.language_model, embeddings, sent(positions))
    rows.image_places = sent((ids == vlm.model.config.image_token_id).flatten().nonzero()[:, 0])
    embeddings.flatten(0, 1).index_copy_(0, rows.image_places, seen.pooler_output.to(embeddings.dtype))
    rows.run_layer = vlm._run_layer
    rows.deepstack = [one.to(embeddings.dtype) for one in seen.deepstack_features]
    of_each = [positions[:, number, :length] for number, length in enumerate(lengths)]
    return PromptRows(prompts=rows, lengths=lengths, deltas=deltas, positions=of_each)
