"""The VLM's layers as functions of their weights, each kind compiled once for all layers.

transformers runs them operation by operation, and a GPU spends a third of a prefill on moving what norms, rotations and
gates read and write. torch.compile fuses these, which also leaves out roundings between them. Weights are arguments, so
that all layers, and weights that arrive just before their layer, share one piece of code; numbers of rows and tokens
are symbols in it, so that no other length is compiled again.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alpacache.alpamayo.text_layers import LayerKV, run_layer

_log = logging.getLogger(__name__)

Activation = Callable[[Tensor], Tensor]


class CompiledLayers:
    """Runs text layers and vision blocks compiled; what the compiled code is not for goes as transformers has it."""

    def __init__(self, model: Any, *, backend: str = "inductor") -> None:
        """`model`: transformers' Qwen3-VL without its head. What its vision tower runs is replaced; weights stay."""
        text, vision = model.language_model, model.visual
        compiled = partial(torch.compile, fullgraph=True, backend=backend)
        act = text.layers[0].mlp.act_fn
        self._text = compiled(partial(text_layer, epsilon=text.config.rms_norm_eps, activation=act))
        block = vision.blocks[0]
        heads, epsilon, act = block.attn.num_heads, block.norm1.eps, block.mlp.act_fn
        self._vision = compiled(partial(vision_block, heads=heads, epsilon=epsilon, activation=act))
        self._batched = False
        self._failed = False
        for block in vision.blocks:
            block.forward = partial(self._run_block, block, block.forward)
        vision.patch_embed.forward = partial(_patch_embedding, vision.patch_embed.proj)

    def run_layer(
        self, layer: nn.Module, hidden: Tensor, angles: tuple[Tensor, Tensor], kv: LayerKV, mask: Tensor | None
    ) -> Tensor:
        """What `text_layers.run_layer` gives, to rounding."""
        if mask is None and not kv.tokens and self._takes(hidden):
            made = self._compiled(self._text, hidden, *angles, weights=TextWeights.of(layer))
            if made is not None:
                kv.update(*made[1:])
                after: Tensor = made[0]
                return after
        return run_layer(layer, hidden, angles, kv, mask)

    def _run_block(
        self,
        block: nn.Module,
        forward: Callable[..., Tensor],
        hidden_states: Tensor,
        *args: Any,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        images: int = 1,
        **named: Any,
    ) -> Tensor:
        """Takes the place of a block's forward; `images` of one size, or 1 and `cu_seqlens` tells the images apart."""
        if images > 1 and not self._failed:
            apart = (each.view(images, -1, each.shape[1]) for each in (hidden_states, *position_embeddings))
            made = self._compiled(self._vision, *apart, weights=VisionWeights.of(block))
            if made is not None:
                together: Tensor = made.flatten(0, 1)
                return together
        named |= {"cu_seqlens": cu_seqlens, "position_embeddings": position_embeddings, "images": images}
        return forward(hidden_states, *args, **named)

    def _takes(self, hidden: Tensor) -> bool:
        """Tell whether rows are compiled for: one alone is not, behind groups of several, as it would be code anew."""
        self._batched |= len(hidden) > 1
        return not self._failed and len(hidden) > self._batched

    def _compiled(self, function: Any, *tensors: Tensor, weights: tuple[Tensor | None, ...]) -> Any:
        """What the compiled function returns; None where this machine cannot compile it."""
        for tensor in tensors:
            for dim in range(2):
                if tensor.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
        try:
            return function(*tensors, weights)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._failed = True
            told = " ".join(str(error).split())
            _log.warning("the VLM's layers cannot be compiled on this machine; they run as they are: %s", told[:300])
            return None


class TextWeights(NamedTuple):
    """Weights of a layer of the text model; biases are None where it has none."""

    input_norm: Tensor
    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    query_norm: Tensor
    key_norm: Tensor
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: Any) -> Self:
        """The weights that a layer of transformers' text model has now."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            layer.input_layernorm.weight,
            attention.q_proj.weight,
            attention.q_proj.bias,
            attention.k_proj.weight,
            attention.k_proj.bias,
            attention.v_proj.weight,
            attention.v_proj.bias,
            attention.q_norm.weight,
            attention.k_norm.weight,
            attention.o_proj.weight,
            attention.o_proj.bias,
            layer.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        )


def text_layer(
    hidden: Tensor, cos: Tensor, sin: Tensor, weights: TextWeights, *, epsilon: float, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers' text layer computes of prompts from their first token on.

    Args:
        hidden: `[B, T, C]`.
        cos, sin: `[B, T, head_dim]` of the rotary embedding.

    Returns hidden states `[B, T, C]`, and keys (rotated) and values `[B, kv_heads, T, head_dim]`.
    """
    heads = (*hidden.shape[:2], -1, weights.query_norm.shape[0])
    inner = _rms_norm(hidden, weights.input_norm, epsilon)
    query = F.linear(inner, weights.query, weights.query_bias).view(heads)
    key = F.linear(inner, weights.key, weights.key_bias).view(heads)
    value = F.linear(inner, weights.value, weights.value_bias).view(heads).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query = _rotated(_rms_norm(query, weights.query_norm, epsilon).transpose(1, 2), cos, sin)
    key = _rotated(_rms_norm(key, weights.key_norm, epsilon).transpose(1, 2), cos, sin)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), weights.output, weights.output_bias)
    inner = _rms_norm(hidden, weights.post_norm, epsilon)
    gated = activation(F.linear(inner, weights.gate)) * F.linear(inner, weights.up)
    return hidden + F.linear(gated, weights.down), key, value


class VisionWeights(NamedTuple):
    """Weights of a block of the vision tower."""

    norm1: Tensor
    norm1_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    output: Tensor
    output_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor

    @classmethod
    def of(cls, block: Any) -> Self:
        """The weights that a block of transformers' vision tower has now."""
        parts = (block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.linear_fc1, block.mlp.linear_fc2)
        return cls(*(tensor for part in parts for tensor in (part.weight, part.bias)))


def vision_block(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: VisionWeights,
    *,
    heads: int,
    epsilon: float,
    activation: Activation,
) -> Tensor:
    """What transformers' vision block computes of images of one size.

    Args:
        hidden: `[images, patches, C]`; so is the result.
        cos, sin: float32 `[images, patches, head_dim]` of the rotary embedding.
    """
    width = hidden.shape[-1]
    inner = F.layer_norm(hidden, (width,), weights.norm1, weights.norm1_bias, epsilon)
    qkv = F.linear(inner, weights.qkv, weights.qkv_bias).view(*hidden.shape[:2], 3, heads, -1)
    query, key, value = qkv.transpose(1, 3).unbind(2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query, key = (_rotated(each.float(), cos, sin).to(hidden.dtype) for each in (query, key))
    attended = F.scaled_dot_product_attention(query, key, value)
    hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), weights.output, weights.output_bias)
    inner = F.layer_norm(hidden, (width,), weights.norm2, weights.norm2_bias, epsilon)
    inner = activation(F.linear(inner, weights.inner, weights.inner_bias))
    return hidden + F.linear(inner, weights.outer, weights.outer_bias)


def _rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    exact = values.float()
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)).to(values.dtype)


def _rotated(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = values.chunk(2, dim=-1)
    return values * cos + torch.cat((-second, first), dim=-1) * sin


def _patch_embedding(projection: nn.Conv3d, patches: Tensor) -> Tensor:
    """Embeddings `[patches, C]`. Strides are as long as the kernel, so it is a product of matrices."""
    weight = projection.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), projection.bias)
