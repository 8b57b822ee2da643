"""Attention over one part of the keys: its output, the log-sum-exp by which parts are merged, and its backward.

Plain PyTorch for any device and dtype: the reference of the Triton kernels. The backward of a part takes the output
and log-sum-exp of the *merged* attention: with them `exp(scores - lse)` is the part's share of the whole softmax, so
the gradients of the parts simply add up.

Query heads of one KV group are folded into the query length, `[batch, kv_heads, group * tokens, head_dim]`: without
masks heads are just more queries, and no KV head is ever repeated.
"""

import torch
from torch import Tensor


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
    """Gradients of query, keys and values from the merged `output` and `lse`; with `frozen` of the query alone."""
    share = _scores(query, keys, scale, lengths=lengths, causal=causal).sub_(lse[..., None]).exp_()
    grad, output = grad.to(share.dtype), output.to(share.dtype)
    through = grad @ values.to(share.dtype).mT
    scores_grad = through.sub_((grad * output).sum(-1, keepdim=True)).mul_(share)
    query_grad = scores_grad @ keys.to(share.dtype) * scale
    if frozen:
        return (query_grad,)
    return query_grad, scores_grad.mT @ query.to(share.dtype) * scale, share.mT @ grad


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
