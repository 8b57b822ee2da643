"""The expert's attention: 64 action tokens over a frozen prefix and over each other.

Stock attention concatenates prefix and own keys, repeats the prefix for every noise draw and every query head of a KV
group, and computes in full a gradient that nobody uses. Here the two parts are attended separately, the prefix in place
and as it is encoded, and merged by log-sum-exp, which is exact (`docs/decisions/0007-two-part-attention.md`).

The unmodified Qwen3-VL text model uses it as an attention implementation of transformers named `PREFIX_ATTENTION`; the
model's forward hands `prefix_call` down to every layer. bfloat16 on a GPU takes the Triton kernels, everything else the
reference in plain PyTorch.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from alpacache.prefix import partial_attention as part
from alpacache.prefix.packed import NoPrefix, PackedPrefixes

PREFIX_ATTENTION = "prefix"


class Prefix(Protocol):
    """The prefixes of B samples, layer by layer: plain, or decoded when asked for."""

    @property
    def lengths(self) -> Tensor:
        """`[B]` int64 on the device, each at least 1 but for `NoPrefix`."""

    @property
    def starts(self) -> Tensor:
        """`[B]` int64 position of each sample's first action token."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, kv_heads, T, head_dim]` of one layer, anything finite beyond `lengths`.

        Asked for in forward and again in backward, and not kept in between: they may lie in scratch memory that the
        next call overwrites.
        """


@dataclass(slots=True, kw_only=True)
class PrefixCall:
    """Arguments that one forward of the expert hands to all of its layers.

    Not frozen: torch.compile would take what stands in it apart, down to a codec's tables, and compile for its numbers.
    """

    prefix: Prefix
    causal: bool
    """True if an action token sees only itself and earlier ones, beside the whole prefix."""


def attend(query: Tensor, key: Tensor, value: Tensor, call: PrefixCall, layer: int, scale: float) -> Tensor:
    """Attention of action tokens over prefix and action tokens, `[N, heads, S, D]`; no gradient into the prefix.

    Args:
        query: `[N, heads, S, D]`, N = B K: the K noise draws of a sample stand together and share its prefix.
        key: `[N, kv_heads, S, D]`, like value.
        layer: which of the prefix's layers.

    Raises `ValueError` if shapes or dtypes of the prefix do not fit.
    """
    if isinstance(call.prefix, NoPrefix):
        own: Tensor = nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scale, is_causal=call.causal, enable_gqa=True
        )
        return own
    kernels = query.is_cuda and query.dtype == torch.bfloat16 and isinstance(call.prefix, PackedPrefixes)
    function = _KernelAttention if kernels else _ExplicitAttention
    output: Tensor = function.apply(query, key, value, call, layer, scale)  # type: ignore[no-untyped-call]
    return output


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: PrefixCall, layer: int, scale: float
    ) -> Tensor:
        from alpacache.prefix import attention_kernels

        query, key, value = (_channels_together(tensor) for tensor in (query, key, value))
        assert isinstance(call.prefix, PackedPrefixes)
        _check_packed(query, key, call.prefix)
        output, lse = attention_kernels.forward(query, key, value, call.prefix, layer, scale, causal=call.causal)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.call, ctx.layer, ctx.scale = call, layer, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from alpacache.prefix import attention_kernels

        query, key, value, output, lse = ctx.saved_tensors
        call: PrefixCall = ctx.call
        assert isinstance(call.prefix, PackedPrefixes)
        grad = _channels_together(grad)
        grads = attention_kernels.backward(
            grad, query, key, value, output, lse, call.prefix, ctx.layer, ctx.scale, causal=call.causal
        )
        return *grads, None, None, None


class _ExplicitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: PrefixCall, layer: int, scale: float
    ) -> Tensor:
        keys, values = call.prefix.layer(layer)
        _check(query, key, keys, values)
        own_query = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        with torch.autocast(query.device.type, enabled=False):
            there, there_lse = part.explicit(
                _share(own_query, len(keys)), keys, values, scale, lengths=call.prefix.lengths
            )
            own, own_lse = part.explicit(own_query, key, value, scale, causal=call.causal)
        there, there_lse = _unshare(there, own.shape), _unshare(there_lse, own_lse.shape)
        lse = torch.logaddexp(there_lse, own_lse)
        weight = torch.sigmoid(there_lse - own_lse)[..., None]  # exp(there_lse - lse)
        output = torch.lerp(own, there, weight).to(query.dtype)
        ctx.save_for_backward(own_query, key, value, output, lse)
        ctx.call, ctx.layer, ctx.scale = call, layer, scale
        return output.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        call, scale = ctx.call, ctx.scale
        keys, values = call.prefix.layer(ctx.layer)
        shape, grad = grad.shape, grad.reshape(query.shape)
        # Both parts get the merged output and log-sum-exp: their own would know nothing of the other part.
        there_grad, there_query, there_output, there_lse = (
            _share(tensor, len(keys)) for tensor in (grad, query, output, lse)
        )
        lengths = call.prefix.lengths
        with torch.autocast(query.device.type, enabled=False):
            there = part.explicit_backward(
                there_grad, there_query, keys, values, there_output, there_lse, scale, lengths=lengths, frozen=True
            )[0]
            own, *own_kv = part.explicit_backward(grad, query, key, value, output, lse, scale, causal=call.causal)
        query_grad = (own + _unshare(there, own.shape)).to(query.dtype)
        return query_grad.reshape(shape), *(tensor.to(query.dtype) for tensor in own_kv), None, None, None


def _channels_together(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _check_packed(query: Tensor, key: Tensor, prefix: PackedPrefixes) -> None:
    layout = prefix.layout
    fits = (layout.kv_heads, layout.head_dim) == (key.shape[1], key.shape[3])
    plain = layout.codec is not None or layout.dtype == torch.bfloat16
    if not fits or not plain or query.shape[0] % len(prefix.rows) or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{len(prefix.rows)} prefixes of {layout} do not fit queries {list(query.shape)} and own keys "
            f"{list(key.shape)}; expected bfloat16 or a codec, the same heads and channels, and a multiple of "
            "B query rows."
        )


def _check(query: Tensor, key: Tensor, keys: Tensor, values: Tensor) -> None:
    fits = keys.shape == values.shape and (keys.shape[1], keys.shape[3]) == (key.shape[1], key.shape[3])
    if not fits or query.shape[0] % keys.shape[0] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"prefix keys {list(keys.shape)} and values {list(values.shape)} do not fit queries {list(query.shape)} "
            f"and own keys {list(key.shape)}; expected [B, kv_heads, T, D] with a multiple of B query rows."
        )
    if not query.dtype == key.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"prefix is {keys.dtype}, queries are {query.dtype}; hand the prefix over in the expert's dtype."
        )


def _share(tensor: Tensor, samples: int) -> Tensor:
    """`[B K, kv_heads, N, ...]` to `[B, kv_heads, K N, ...]`: draws of a sample are more queries of its prefix."""
    draws = tensor.shape[0] // samples
    return tensor.view(samples, draws, *tensor.shape[1:]).transpose(1, 2).flatten(2, 3).contiguous()


def _unshare(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_share`, to `shape`."""
    samples, heads = tensor.shape[:2]
    return tensor.reshape(samples, heads, -1, *shape[2:]).transpose(1, 2).reshape(shape)


def _layer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    prefix_call: PrefixCall | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls, with more keywords than matter here.

    Under autocast, rotary embedding leaves float32 queries and keys beside bfloat16 values; autocast casts them for
    sdpa, here it is done by hand. A compiled layer casts in the kernel that rotates. Code that launches kernels of its
    own stays out of the compilation, and tensors cross that border contiguous, as `[N, S, heads, D]`: a compiled
    backward may copy any others.
    """
    if prefix_call is None or attention_mask is not None or dropout:
        raise ValueError(f"{PREFIX_ATTENTION!r} attention needs prefix_call, and takes neither a mask nor dropout.")
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _attend_by_token(module, query, key, value, prefix_call, scaling), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_token(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: PrefixCall, scale: float
) -> Tensor:
    """`attend` with tensors `[N, S, heads, D]`."""
    layer: int = module.prefix_layer  # type: ignore[assignment]  # read in compiled code, each layer would be compiled apart
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return attend(query, key, value, call, layer, scale).transpose(1, 2)


AttentionInterface.register(PREFIX_ATTENTION, _layer_attention)
# No mask: lengths say what is padding. Without an entry transformers would not call its mask functions at all.
AttentionMaskInterface.register(PREFIX_ATTENTION, lambda *_, **__: None)
