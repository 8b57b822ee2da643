"""Attention over one part of the keys: its output with the log-sum-exp that merges parts, and its backward.

Two ways, same results: an explicit one in plain PyTorch (any device, the reference) and the flash kernels that ship
with torch (CUDA, half precision). The backward of a part takes the output and log-sum-exp of the *merged* attention:
with them `exp(scores - lse)` is the part's share of the whole softmax, so the gradients of the parts simply add up.

Query heads of one KV group are folded into the query length, `[batch, kv_heads, group * tokens, head_dim]`: without
masks heads are just more queries, and no KV head is ever repeated.
"""

import torch
from torch import Tensor

_flash_dense = torch.ops.aten._scaled_dot_product_flash_attention
_flash_dense_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
_flash_ragged = torch.ops.aten._flash_attention_forward
_flash_ragged_backward = torch.ops.aten._flash_attention_backward

Sequences = tuple[Tensor, Tensor, int, int]
"""Cumulative lengths of queries and of keys (int32), and the longest of each."""


def has_flash(query: Tensor) -> bool:
    """Whether torch's flash kernels take these queries; everything else is computed explicitly."""
    head_dim = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def explicit(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, *, lengths: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output `[B, heads, N, D]` and log-sum-exp `[B, heads, N]`, in float32, or float64 for float64 queries.

    Args:
        query: `[B, heads, N, D]`.
        keys: `[B, heads, T, D]`, like values; anything finite beyond `lengths`.
        lengths: `[B]`, at least 1; None means T for all.
        causal: N is a multiple of T, query row r is token r % T and sees keys up to its own.
    """
    scores = _scores(query, keys, scale, lengths=lengths, causal=causal)
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights @ values.to(scores.dtype) / total, (total.log() + peak)[..., 0]


def explicit_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    *,
    lengths: Tensor | None = None,
    causal: bool = False,
    frozen: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of query, keys and values from the merged `output` and `lse`; of the query alone where `frozen`."""
    share = _scores(query, keys, scale, lengths=lengths, causal=causal).sub_(lse[..., None]).exp_()
    grad, output = grad.to(share.dtype), output.to(share.dtype)
    through = grad @ values.to(share.dtype).mT
    scores_grad = through.sub_((grad * output).sum(-1, keepdim=True)).mul_(share)
    query_grad = scores_grad @ keys.to(share.dtype) * scale
    if frozen:
        return (query_grad,)
    return query_grad, scores_grad.mT @ query.to(share.dtype) * scale, share.mT @ grad


def flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    sequences: Sequences | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """As `explicit`, output in the query's dtype, and the kernel's random state, which its backward wants to see.

    Ragged keys are told by `sequences`, from `padded_sequences`, in place of lengths.
    """
    if sequences is not None:
        output, lse, *state, _ = _flash_ragged(
            _packed(query), _packed(keys), _packed(values), *sequences, 0.0, False, False, scale=scale
        )
        return output.view(query.shape), lse.view(query.shape[:3]), (state[0], state[1])
    split = _by_head(query, keys) if causal else query
    output, lse, _, _, _, _, *state, _ = _flash_dense(split, keys, values, 0.0, causal, False, scale=scale)
    return output.reshape(query.shape), lse.reshape(query.shape[:3]), (state[0], state[1])


def flash_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float,
    *,
    sequences: Sequences | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `explicit_backward`, but the kernels have no way to leave out the gradients of frozen keys."""
    if sequences is not None:
        packed = [_packed(tensor) for tensor in (grad, query, keys, values, output)]
        grads = _flash_ragged_backward(*packed, lse.reshape(1, -1), *sequences, 0.0, False, *state, scale=scale)
        return grads[0].view(query.shape), grads[1].view(keys.shape), grads[2].view(keys.shape)
    split = [_by_head(tensor, keys) if causal else tensor for tensor in (grad, query, output)]
    query_grad, keys_grad, values_grad = _flash_dense_backward(
        split[0], split[1], keys, values, split[2], lse.reshape(split[1].shape[:3]), None, None,
        split[1].shape[2], keys.shape[2], 0.0, causal, *state, scale=scale,
    )  # fmt: skip
    return query_grad.reshape(query.shape), keys_grad, values_grad


def padded_sequences(lengths: Tensor, heads: int, tokens: int, padded: int) -> Sequences:
    """How the kernels for packed sequences walk `[B, heads, padded, D]` keys, `tokens` queries each, in place.

    Their backward knows nothing of padding, only of sequences one after another. So each row and head becomes two
    sequences: the valid keys with all queries, then the padding with none. All of it stays on the device.
    """
    rows = lengths.shape[0] * heads
    index = torch.arange(2 * rows + 1, dtype=torch.int32, device=lengths.device)
    valid = lengths.to(torch.int32)[:, None, None].expand(-1, heads, 2).flatten()
    keys = index // 2 * padded
    keys[:-1] += index[:-1] % 2 * valid
    return (index + 1) // 2 * tokens, keys, tokens, padded


def _scores(query: Tensor, keys: Tensor, scale: float, *, lengths: Tensor | None, causal: bool) -> Tensor:
    """Masked scores `[B, heads, N, T]` in float32, or float64 for float64 queries."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) * scale) @ keys.to(dtype).mT
    index = torch.arange(keys.shape[2], device=keys.device)
    if lengths is not None:
        scores.masked_fill_(index >= lengths[:, None, None, None], -torch.inf)
    if causal:
        token = torch.arange(query.shape[2], device=keys.device) % keys.shape[2]
        scores.masked_fill_(index > token[:, None], -torch.inf)
    return scores


def _by_head(folded: Tensor, keys: Tensor) -> Tensor:
    """Folded queries by head again, `[B, query_heads, T, D]`: the kernel's causal mask counts rows of one head."""
    rows, heads, length, head_dim = folded.shape
    return folded.reshape(rows, heads * length // keys.shape[2], keys.shape[2], head_dim)


def _packed(tensor: Tensor) -> Tensor:
    """`[B, heads, N, D]` as the kernels' packed `[B * heads * N, 1, D]`, without moving data."""
    return tensor.reshape(-1, 1, tensor.shape[-1])
