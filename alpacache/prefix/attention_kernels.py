"""Triton kernels of the two-part attention.

torch's flash kernels compute and write gradients of a prefix that is frozen, and keep half of the multiprocessors idle:
a sample's K draws, and the query heads of one KV head, are just more queries, but few (128 a draw). Here the prefix is
split over programs, each of which writes its own share, and the backward computes the gradient of the queries alone. A
second kernel attends to the action tokens themselves and merges all shares.

An encoded layer is first decoded into scratch, in forward and again in backward. Decoding tiles inside the attention
was slower (measured: 31 against 18 ms for all layers, forward and backward, of 8 samples of 4 cameras on an H100).

Only features of compute capability 8.0 are used, and at most 99 KB of shared memory, so that the same code runs on an
RTX 3090, a 4090 and an H100.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpacache.prefix.layers_ahead import decode
from alpacache.prefix.packed import PackedPrefixes

_LOG2_E = 1.4426950408889634
_BLOCK_M, _BLOCK_N, _WARPS, _STAGES = 64, 32, 4, 4
"""Queries and tokens of a tile of the kernels over the prefix, on which results depend in rounding only.

Of 48 settings these were the best or next to it for 4 cameras and for 1 (forward and backward of 36 layers, 8 and 16
samples, on an H100: 4.3 and 3.5 ms, against 6.2 and 4.4 with tiles of 64 tokens in two stages).
"""
# An argument of 1 would become a constant without `.to`, so counts are not specialised.


@triton.jit
def _prefix_part(  # type: ignore[no-untyped-def]
    data,  # uint8 [rows, row_bytes], plain or decoded layers of samples
    rows,  # int64 [B], each sample's row of data
    lengths,  # int64 [B], tokens of each sample's prefix
    row_bytes,  # bytes of a row of data
    capacity,  # tokens that each head has room for in a row; 0: as many as the sample has
    before,  # blocks `[kv_head, token, D]` in a row before this layer's keys: 2 for each layer
    order_at,  # byte of a row where the order of key channels begins, if ORDERED
    sample,  # number of the sample in the batch
    head,  # KV head
    split,  # number of the split
    splits,  # programs that share a sample's prefix
    DIM: tl.constexpr,  # D, channels of a head
    HEADS: tl.constexpr,  # KV heads
    ORDERED: tl.constexpr,  # whether keys have their channels in an order of their own
    BLOCK_N: tl.constexpr,  # prefix tokens of a tile
):
    """Offsets of a head's keys and values in a layer, the channel at each place of a key, and a split's tokens."""
    tokens = tl.load(lengths + sample).to(tl.int32)
    wide = tl.where(capacity > 0, capacity, tokens)
    at = data + tl.load(rows + sample) * row_bytes
    stored = tl.arange(0, DIM)
    if ORDERED:
        stored = tl.load(at + order_at + head * DIM + stored).to(tl.int32)
    keys_at = at.to(tl.pointer_type(tl.bfloat16)) + (before * wide.to(tl.int64) * HEADS + head * wide) * DIM
    values_at = keys_at + HEADS * wide * DIM
    steps = tl.cdiv(tl.cdiv(tokens, BLOCK_N), splits)
    begin = split * steps * BLOCK_N
    return keys_at, values_at, stored, begin, tl.minimum(begin + steps * BLOCK_N, tokens)


@triton.jit
def _query_rows(  # type: ignore[no-untyped-def]
    tile,  # number of the tile of queries
    sample,  # number of the sample in the batch
    head,  # KV head
    draws,  # K
    query_row,  # elements from one row [B K] of queries to the next
    query_head,  # ... from one head to the next
    query_token,  # ... from one token to the next
    TOKENS: tl.constexpr,  # S, action tokens
    HEAD_GROUP: tl.constexpr,  # query heads of a KV head
    BLOCK_M: tl.constexpr,  # queries of a tile
):
    """Offsets of a tile's queries, which of them exist, and their places in `[B K, kv_head, group, S]`."""
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    per_draw: tl.constexpr = TOKENS * HEAD_GROUP
    draw, rest = index // per_draw, index % per_draw
    row = (sample * draws + draw).to(tl.int64)
    exists = draw < draws
    where = row * query_row + (head * HEAD_GROUP + rest // TOKENS) * query_head + (rest % TOKENS) * query_token
    packed = (row * tl.num_programs(1) + head) * per_draw + rest
    return where, exists, packed


@triton.jit(do_not_specialize=["samples", "draws"])
def prefix_forward(  # type: ignore[no-untyped-def]
    query,  # bfloat16 [B K, heads, S, D], any strides with channels next to each other
    partial,  # float32 [splits, B K, heads, S, D], written
    partial_lse,  # float32 [splits, B K, heads, S], written
    data,  # uint8 [rows, row_bytes], plain or decoded layers of samples
    rows,  # int64 [B], each sample's row of data
    lengths,  # int64 [B], tokens of each sample's prefix
    row_bytes,  # bytes of a row of data
    capacity,  # tokens that each head has room for in a row; 0: as many as the sample has
    before,  # blocks `[kv_head, token, D]` in a row before this layer's keys: 2 for each layer
    order_at,  # byte of a row where the order of key channels begins, if ORDERED
    query_row,  # elements from one row [B K] of queries to the next
    query_head,  # ... from one head to the next
    query_token,  # ... from one token to the next
    samples,  # B
    draws,  # K
    splits,  # programs that share a sample's prefix
    scale,  # factor of scores, times log2(e)
    DIM: tl.constexpr,  # D, channels of a head
    TOKENS: tl.constexpr,  # S, action tokens
    HEADS: tl.constexpr,  # KV heads
    HEAD_GROUP: tl.constexpr,  # query heads of a KV head
    ORDERED: tl.constexpr,  # whether keys have their channels in an order of their own
    BLOCK_M: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,  # prefix tokens of a tile
):
    """One split's share: output `[split, B K, kv_head, group S, D]` float32, and its log-sum-exp in base 2."""
    tile, head = tl.program_id(0), tl.program_id(1)
    sample, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    channel = tl.arange(0, DIM)
    keys_at, values_at, stored, begin, end = _prefix_part(
        data, rows, lengths, row_bytes, capacity, before, order_at, sample, head, split, splits,
        DIM, HEADS, ORDERED, BLOCK_N,
    )  # fmt: skip
    where, exists, packed = _query_rows(
        tile, sample, head, draws, query_row, query_head, query_token, TOKENS, HEAD_GROUP, BLOCK_M
    )
    q = tl.load(query + where[:, None] + stored[None, :], mask=exists[:, None], other=0.0)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        valid = token < end
        keys = tl.load(keys_at + token[:, None] * DIM + channel[None, :], mask=valid[:, None], other=0.0)
        scores = tl.where(valid[None, :], tl.dot(q, tl.trans(keys)) * scale, -float("inf"))
        values = tl.load(values_at + token[:, None] * DIM + channel[None, :], mask=valid[:, None], other=0.0)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, 1)
        output = tl.dot(weights.to(tl.bfloat16), values, output * fade[:, None])
        peak = higher
    some = total > 0
    output = output / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), -float("inf"))
    share = packed + split * (samples * draws).to(tl.int64) * HEADS * HEAD_GROUP * TOKENS
    tl.store(partial_lse + share, lse, mask=exists)
    tl.store(partial + share[:, None] * DIM + channel[None, :], output, mask=exists[:, None])


@triton.jit(do_not_specialize=["samples", "draws"])
def prefix_backward(  # type: ignore[no-untyped-def]
    query,  # bfloat16 [B K, heads, S, D], any strides with channels next to each other
    grad,  # bfloat16 [B K, heads, S, D], gradient of the output
    delta,  # float32 [B K, heads, S], sum over channels of grad * output
    lse,  # float32 [B K, heads, S], log-sum-exp in base 2 of all scores
    partial,  # float32 [splits, B K, heads, S, D], written
    data,  # uint8 [rows, row_bytes], plain or decoded layers of samples
    rows,  # int64 [B], each sample's row of data
    lengths,  # int64 [B], tokens of each sample's prefix
    row_bytes,  # bytes of a row of data
    capacity,  # tokens that each head has room for in a row; 0: as many as the sample has
    before,  # blocks `[kv_head, token, D]` in a row before this layer's keys: 2 for each layer
    order_at,  # byte of a row where the order of key channels begins, if ORDERED
    query_row,  # elements from one row [B K] of queries to the next
    query_head,  # ... from one head to the next
    query_token,  # ... from one token to the next
    grad_row,  # elements from one row [B K] of the gradient to the next
    grad_head,  # ... from one head to the next
    grad_token,  # ... from one token to the next
    samples,  # B
    draws,  # K
    splits,  # programs that share a sample's prefix
    scale,  # factor of scores, times log2(e)
    DIM: tl.constexpr,  # D, channels of a head
    TOKENS: tl.constexpr,  # S, action tokens
    HEADS: tl.constexpr,  # KV heads
    HEAD_GROUP: tl.constexpr,  # query heads of a KV head
    ORDERED: tl.constexpr,  # whether keys have their channels in an order of their own
    BLOCK_M: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,  # prefix tokens of a tile
):
    """One split's share of the queries' gradient, from merged log-sum-exp and `delta = sum(grad * output)`."""
    tile, head = tl.program_id(0), tl.program_id(1)
    sample, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    channel = tl.arange(0, DIM)
    keys_at, values_at, stored, begin, end = _prefix_part(
        data, rows, lengths, row_bytes, capacity, before, order_at, sample, head, split, splits,
        DIM, HEADS, ORDERED, BLOCK_N,
    )  # fmt: skip
    where, exists, packed = _query_rows(
        tile, sample, head, draws, query_row, query_head, query_token, TOKENS, HEAD_GROUP, BLOCK_M
    )
    q = tl.load(query + where[:, None] + stored[None, :], mask=exists[:, None], other=0.0)
    where, exists, packed = _query_rows(
        tile, sample, head, draws, grad_row, grad_head, grad_token, TOKENS, HEAD_GROUP, BLOCK_M
    )
    g = tl.load(grad + where[:, None] + channel[None, :], mask=exists[:, None], other=0.0)
    merged = tl.load(lse + packed, mask=exists, other=0.0)
    dot = tl.load(delta + packed, mask=exists, other=0.0)
    query_grad = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        valid = token < end
        values = tl.load(values_at + token[:, None] * DIM + channel[None, :], mask=valid[:, None], other=0.0)
        through = tl.dot(g, tl.trans(values)) - dot[:, None]
        keys = tl.load(keys_at + token[:, None] * DIM + channel[None, :], mask=valid[:, None], other=0.0)
        scores = tl.where(valid[None, :], tl.dot(q, tl.trans(keys)) * scale, -float("inf"))
        share_of = tl.exp2(scores - merged[:, None])
        query_grad = tl.dot((share_of * through).to(tl.bfloat16), keys, query_grad)
    share = packed + split * (samples * draws).to(tl.int64) * HEADS * HEAD_GROUP * TOKENS
    tl.store(partial + share[:, None] * DIM + stored[None, :], query_grad, mask=exists[:, None])


@triton.jit(do_not_specialize=["rows"])
def merge_forward(  # type: ignore[no-untyped-def]
    query,  # bfloat16 [B K, heads, S, D], any strides with channels next to each other
    key,  # bfloat16 [B K, kv_heads, S, D]
    value,  # bfloat16 [B K, kv_heads, S, D]
    partial,  # float32 [splits, B K, heads, S, D], what each split of the prefix contributes
    partial_lse,  # float32 [splits, B K, heads, S], log-sum-exp in base 2 of the split's scores
    output,  # bfloat16 [B K, heads, S, D], written
    lse,  # float32 [B K, heads, S], written
    query_row,  # elements from one row [B K] of queries to the next
    query_head,  # ... from one head to the next
    query_token,  # ... from one token to the next
    key_row,  # elements from one row [B K] of keys to the next
    key_head,  # ... from one head to the next
    key_token,  # ... from one token to the next
    value_row,  # elements from one row [B K] of values to the next
    value_head,  # ... from one head to the next
    value_token,  # ... from one token to the next
    output_row,  # elements from one row [B K] of the output to the next
    output_head,  # ... from one head to the next
    output_token,  # ... from one token to the next
    rows,  # B K
    scale,  # factor of scores, times log2(e)
    DIM: tl.constexpr,  # D, channels of a head
    TOKENS: tl.constexpr,  # S, action tokens
    HEAD_GROUP: tl.constexpr,  # query heads of a KV head
    SPLITS: tl.constexpr,  # splits of the prefix
    CAUSAL: tl.constexpr,  # whether an action token sees earlier ones only
    BLOCK: tl.constexpr,  # S rounded up to a power of 2, at least 16
):
    """Attention of one head's action tokens to each other, merged with the shares of the prefix."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own_head = head // HEAD_GROUP
    token, channel = tl.arange(0, BLOCK), tl.arange(0, DIM)
    exists = token < TOKENS
    q = tl.load(
        query + row * query_row + head * query_head + token[:, None] * query_token + channel[None, :],
        mask=exists[:, None], other=0.0,
    )  # fmt: skip
    k = tl.load(
        key + row * key_row + own_head * key_head + token[:, None] * key_token + channel[None, :],
        mask=exists[:, None], other=0.0,
    )  # fmt: skip
    v = tl.load(
        value + row * value_row + own_head * value_head + token[:, None] * value_token + channel[None, :],
        mask=exists[:, None], other=0.0,
    )  # fmt: skip
    allowed = exists[None, :] & (token[None, :] <= token[:, None] if CAUSAL else exists[None, :])
    scores = tl.where(allowed, tl.dot(q, tl.trans(k)) * scale, -float("inf"))
    packed = (row * tl.num_programs(1) + head) * TOKENS + token
    stride = rows.to(tl.int64) * tl.num_programs(1) * TOKENS
    peak = tl.max(scores, 1)
    for split in tl.static_range(SPLITS):
        there = tl.load(partial_lse + packed + split * stride, mask=exists, other=-float("inf"))
        peak = tl.maximum(peak, there)
    peak = tl.where(exists, peak, 0.0)
    weights = tl.exp2(scores - peak[:, None])
    total = tl.sum(weights, 1)
    sums = tl.dot(weights.to(tl.bfloat16), v)
    for split in tl.static_range(SPLITS):
        there = tl.load(partial_lse + packed + split * stride, mask=exists, other=-float("inf"))
        weight = tl.exp2(there - peak)
        part = tl.load(
            partial + (packed + split * stride)[:, None] * DIM + channel[None, :], mask=exists[:, None], other=0.0
        )
        total += weight
        sums += part * weight[:, None]
    total = tl.where(exists, total, 1.0)
    tl.store(
        output + row * output_row + head * output_head + token[:, None] * output_token + channel[None, :],
        (sums / total[:, None]).to(output.dtype.element_ty),
        mask=exists[:, None],
    )
    tl.store(lse + packed, peak + tl.log2(total), mask=exists)


@triton.jit
def row_delta(  # type: ignore[no-untyped-def]
    grad,  # bfloat16 [B K, heads, S, D], gradient of the output
    output,  # bfloat16 [B K, heads, S, D]
    delta,  # float32 [B K, heads, S], written
    grad_row,  # elements from one row [B K] of the gradient to the next
    grad_head,  # ... from one head to the next
    grad_token,  # ... from one token to the next
    output_row,  # elements from one row [B K] of the output to the next
    output_head,  # ... from one head to the next
    output_token,  # ... from one token to the next
    DIM: tl.constexpr,  # D, channels of a head
    TOKENS: tl.constexpr,  # S, action tokens
    BLOCK: tl.constexpr,  # S rounded up to a power of 2, at least 16
):
    """`sum(grad * output)` over channels, `[B K, head, S]` float32."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, channel = tl.arange(0, BLOCK), tl.arange(0, DIM)
    exists = (token < TOKENS)[:, None]
    g = tl.load(
        grad + row * grad_row + head * grad_head + token[:, None] * grad_token + channel[None, :],
        mask=exists, other=0.0,
    )  # fmt: skip
    o = tl.load(
        output + row * output_row + head * output_head + token[:, None] * output_token + channel[None, :],
        mask=exists, other=0.0,
    )  # fmt: skip
    dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + (row * tl.num_programs(1) + head) * TOKENS + token, dot, mask=token < TOKENS)


@triton.jit(do_not_specialize=["rows"])
def merge_backward(  # type: ignore[no-untyped-def]
    query,  # bfloat16 [B K, heads, S, D], any strides with channels next to each other
    key,  # bfloat16 [B K, kv_heads, S, D]
    value,  # bfloat16 [B K, kv_heads, S, D]
    grad,  # bfloat16 [B K, heads, S, D], gradient of the output
    delta,  # float32 [B K, heads, S], sum over channels of grad * output
    lse,  # float32 [B K, heads, S], log-sum-exp in base 2 of all scores
    partial,  # float32 [splits, B K, heads, S, D], what each split of the prefix contributes
    query_grad,  # bfloat16 [B K, S, heads, D], written
    key_grad,  # bfloat16 [B K, S, kv_heads, D], written
    value_grad,  # bfloat16 [B K, S, kv_heads, D], written
    query_row,  # elements from one row [B K] of queries to the next
    query_head,  # ... from one head to the next
    query_token,  # ... from one token to the next
    key_row,  # elements from one row [B K] of keys to the next
    key_head,  # ... from one head to the next
    key_token,  # ... from one token to the next
    value_row,  # elements from one row [B K] of values to the next
    value_head,  # ... from one head to the next
    value_token,  # ... from one token to the next
    grad_row,  # elements from one row [B K] of the gradient to the next
    grad_head,  # ... from one head to the next
    grad_token,  # ... from one token to the next
    rows,  # B K
    scale,  # factor of scores, times log2(e)
    plain_scale,  # factor of scores
    DIM: tl.constexpr,  # D, channels of a head
    TOKENS: tl.constexpr,  # S, action tokens
    HEAD_GROUP: tl.constexpr,  # query heads of a KV head
    SPLITS: tl.constexpr,  # splits of the prefix
    CAUSAL: tl.constexpr,  # whether an action token sees earlier ones only
    BLOCK: tl.constexpr,  # S rounded up to a power of 2, at least 16
):
    """Gradients of one KV head's action tokens, the prefix's shares of the queries' gradient added.

    Gradients are stored as `[B K, S, head, D]`, the order in which the projections want them.
    """
    row, own_head, own_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    heads = own_heads * HEAD_GROUP
    token, channel = tl.arange(0, BLOCK), tl.arange(0, DIM)
    exists = token < TOKENS
    k = tl.load(
        key + row * key_row + own_head * key_head + token[:, None] * key_token + channel[None, :],
        mask=exists[:, None], other=0.0,
    )  # fmt: skip
    v = tl.load(
        value + row * value_row + own_head * value_head + token[:, None] * value_token + channel[None, :],
        mask=exists[:, None], other=0.0,
    )  # fmt: skip
    k_grad = tl.zeros([BLOCK, DIM], tl.float32)
    v_grad = tl.zeros([BLOCK, DIM], tl.float32)
    allowed = exists[None, :] & (token[None, :] <= token[:, None] if CAUSAL else exists[None, :])
    for member in range(HEAD_GROUP):
        head = own_head * HEAD_GROUP + member
        q = tl.load(
            query + row * query_row + head * query_head + token[:, None] * query_token + channel[None, :],
            mask=exists[:, None], other=0.0,
        )  # fmt: skip
        g = tl.load(
            grad + row * grad_row + head * grad_head + token[:, None] * grad_token + channel[None, :],
            mask=exists[:, None], other=0.0,
        )  # fmt: skip
        packed = (row * heads + head) * TOKENS + token
        merged = tl.load(lse + packed, mask=exists, other=0.0)
        dot = tl.load(delta + packed, mask=exists, other=0.0)
        scores = tl.where(allowed, tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        share = tl.exp2(scores - merged[:, None])
        v_grad = tl.dot(tl.trans(share.to(tl.bfloat16)), g, v_grad)
        through = (share * (tl.dot(g, tl.trans(v)) - dot[:, None])).to(tl.bfloat16)
        k_grad = tl.dot(tl.trans(through), q, k_grad)
        q_grad = tl.dot(through, k)
        stride = rows.to(tl.int64) * heads * TOKENS
        for split in tl.static_range(SPLITS):
            q_grad += tl.load(
                partial + (packed + split * stride)[:, None] * DIM + channel[None, :], mask=exists[:, None], other=0.0
            )
        where = ((row * TOKENS + token) * heads + head)[:, None] * DIM + channel[None, :]
        tl.store(query_grad + where, (q_grad * plain_scale).to(query_grad.dtype.element_ty), mask=exists[:, None])
    where = ((row * TOKENS + token) * own_heads + own_head)[:, None] * DIM + channel[None, :]
    tl.store(key_grad + where, (k_grad * plain_scale).to(key_grad.dtype.element_ty), mask=exists[:, None])
    tl.store(value_grad + where, v_grad.to(value_grad.dtype.element_ty), mask=exists[:, None])


def forward(
    query: Tensor, key: Tensor, value: Tensor, prefixes: PackedPrefixes, layer: int, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention over prefix and action tokens.

    Args:
        query: `[B K, heads, S, D]` bfloat16, any strides with channels next to each other; key and value likewise,
            `[B K, kv_heads, S, D]`.

    Returns output `[B K, heads, S, D]`, in memory `[B K, S, heads, D]`, and log-sum-exp in base 2 `[B K, heads, S]`.
    """
    call = _prepare(query, key, prefixes, layer, then=layer + 1)
    (rows, heads, tokens, dim), splits = query.shape, call.counts[2]
    partial = query.new_empty((splits, rows, heads, tokens, dim), dtype=torch.float32)
    partial_lse = query.new_empty((splits, rows, heads, tokens), dtype=torch.float32)
    prefix_forward[call.grid](
        query, partial, partial_lse, *call.source, *query.stride()[:3], *call.counts, scale * _LOG2_E, **call.options
    )
    output = query.new_empty((rows, tokens, heads, dim)).transpose(1, 2)
    lse = query.new_empty((rows, heads, tokens), dtype=torch.float32)
    merge_forward[(rows, heads)](
        query, key, value, partial, partial_lse, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], rows, scale * _LOG2_E,
        CAUSAL=causal, SPLITS=splits, **call.own_options,
    )  # fmt: skip
    return output, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    prefixes: PackedPrefixes,
    layer: int,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `output` and `lse` are those of the merged attention."""
    call = _prepare(query, key, prefixes, layer, then=layer - 1)
    (rows, heads, tokens, dim), splits = query.shape, call.counts[2]
    delta = torch.empty_like(lse)
    row_delta[(rows, heads)](
        grad, output, delta, *grad.stride()[:3], *output.stride()[:3],
        DIM=dim, TOKENS=tokens, BLOCK=call.own_options["BLOCK"],
    )  # fmt: skip
    partial = query.new_empty((splits, rows, heads, tokens, dim), dtype=torch.float32)
    prefix_backward[call.grid](
        query, grad, delta, lse, partial, *call.source, *query.stride()[:3], *grad.stride()[:3],
        *call.counts, scale * _LOG2_E, **call.options,
    )  # fmt: skip
    query_grad = query.new_empty((rows, tokens, heads, dim)).transpose(1, 2)
    key_grad, value_grad = (query.new_empty((rows, tokens, key.shape[1], dim)).transpose(1, 2) for _ in range(2))
    merge_backward[(rows, key.shape[1])](
        query, key, value, grad, delta, lse, partial, query_grad, key_grad, value_grad,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3],
        rows, scale * _LOG2_E, scale, CAUSAL=causal, SPLITS=splits, **call.own_options,
    )  # fmt: skip
    return query_grad, key_grad, value_grad


class _Call(NamedTuple):
    """How the kernels are launched for one layer of one batch."""

    grid: tuple[int, int, int]
    counts: tuple[int, int, int]
    """Samples, draws, and programs that share a sample's prefix."""
    source: tuple[Any, ...]
    """Arguments that say where the prefix lies, `data` to `order_at`."""
    options: dict[str, Any]
    own_options: dict[str, Any]
    """Options of the kernels that attend to the action tokens."""


def _prepare(query: Tensor, key: Tensor, prefixes: PackedPrefixes, layer: int, *, then: int) -> _Call:
    layout, samples = prefixes.layout, len(prefixes.rows)
    rows, heads, tokens, dim = query.shape
    draws, group = rows // samples, heads // key.shape[1]
    tiles = triton.cdiv(draws * group * tokens, _BLOCK_M)
    wanted = triton.cdiv(_multiprocessors(query.device), samples * layout.kv_heads * tiles)
    splits = max(1, min(wanted, triton.cdiv(prefixes.longest, 4 * _BLOCK_N), 16))
    shape = {"DIM": dim, "TOKENS": tokens, "HEAD_GROUP": group}
    tile = {"BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "num_warps": _WARPS, "num_stages": _STAGES}
    return _Call(
        grid=(tiles, layout.kv_heads, samples * splits),
        counts=(samples, draws, splits),
        source=_source(prefixes, layer, then),
        options={**shape, "HEADS": layout.kv_heads, "ORDERED": layout.is_ordered, **tile},
        own_options={**shape, "BLOCK": max(16, triton.next_power_of_2(tokens)), "num_warps": 8, "num_stages": 1},
    )


def _source(prefixes: PackedPrefixes, layer: int, then: int) -> tuple[Any, ...]:
    """`data` to `order_at` of the kernels: where a layer lies in the rows themselves, or decoded in scratch."""
    layout, ahead = prefixes.layout, prefixes.ahead
    if layout.codec is None:
        return prefixes.data, prefixes.rows, prefixes.lengths, prefixes.data.stride(0), 0, 2 * layer, 0
    scratch = decode(prefixes, layer) if ahead is None else ahead.layer(prefixes, layer, then=then)
    index = layer % layout.tensor_codec.layers_together
    places, order_at = _places(len(prefixes.rows), scratch.device), layout.order_at(prefixes.longest, index)
    return scratch, places, prefixes.lengths, scratch.stride(0), prefixes.longest, 2 * index, order_at


@lru_cache(maxsize=8)
def _places(count: int, device: torch.device) -> Tensor:
    """Rows of scratch: sample after sample."""
    return torch.arange(count, device=device)


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
