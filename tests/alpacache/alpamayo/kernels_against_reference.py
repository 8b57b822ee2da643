"""Run by test_prefix_kernels.py: the kernels against the reference, interpreted on the CPU or on a GPU.

`python kernels_against_reference.py cpu|cuda` exits with an assertion where they differ. Triton decides at its import
whether it interprets, so this is a process of its own.
"""

import os
import sys
from dataclasses import replace

DEVICE = sys.argv[1]
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from alpacache import codecs
from alpacache.alpamayo import prefix_kernels
from alpacache.alpamayo.packed_prefix import pack
from alpacache.alpamayo.prefix import EncodedPrefix, PrefixFeatures
from alpacache.alpamayo.prefix_attention import PrefixCall, _ExplicitAttention
from alpacache.alpamayo.prefix_decoding import decode
from cache_store import CODECS


def widened(handle):
    bits = handle.data
    return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits


def dot(self, a, b, accumulator, *_):
    """The interpreter multiplies the bit patterns of bfloat16 as integers."""
    product = np.matmul(widened(a), widened(b), dtype=np.float32) + accumulator.data
    return interpreter.TensorHandle(product, accumulator.dtype.scalar)


def prefix(codec, tokens, kv_heads, dim):
    kv = torch.randn(2, 2, kv_heads, tokens, dim).bfloat16() * torch.rand(1, 2, kv_heads, 1, dim).bfloat16()
    kv[:, 0] += 1.5 * torch.randn(2, kv_heads, 1, dim).bfloat16()
    places = {"rope_delta": 0, "prefix_len": tokens, "start_position": tokens}
    if codec is None:
        return PrefixFeatures(keys=kv[:, 0], values=kv[:, 1], hidden=None, **places)
    data = codecs.encode(CODECS[codec], kv)
    return EncodedPrefix(data=data, codec=CODECS[codec], shape=tuple(kv.shape), **places)


def error(got, expected):
    return float(((got.double() - expected.double()).norm() / expected.double().norm()).detach())


def check(codec, lengths, draws, causal, *, heads=4, kv_heads=2, dim=128, tokens=16):
    packed = pack([prefix(codec, n, kv_heads, dim) for n in lengths], device=torch.device(DEVICE), dtype=torch.bfloat16)
    if codec is not None:
        check_decoded(packed, dim)
    rows, scale = len(lengths) * draws, dim**-0.5
    query, key, value, grad = (
        torch.randn(rows, tokens, count, dim, device=DEVICE).bfloat16().transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    output, lse = prefix_kernels.forward(query, key, value, packed, 1, scale, causal=causal)
    grads = prefix_kernels.backward(grad, query, key, value, output, lse, packed, 1, scale, causal=causal)
    own = [tensor.float().requires_grad_() for tensor in (query, key, value)]
    call = PrefixCall(prefix=replace(packed, dtype=torch.float32), causal=causal)
    expected = _ExplicitAttention.apply(*own, call, 1, scale)
    for got, wanted in zip(
        (output, *grads), (expected, *torch.autograd.grad(expected, own, grad.float())), strict=True
    ):
        # The interpreter cuts float32 to bfloat16 instead of rounding.
        assert error(got, wanted) <= (2e-2 if DEVICE == "cpu" else 4e-3), (codec, lengths, error(got, wanted))


def check_decoded(packed, dim):
    """What lies in scratch is what the reference decodes (the interpreter is off by its cut, one unit at most)."""
    scratch, order_at = decode(packed, 1)
    heads = packed.layout.kv_heads
    for place, count in enumerate(packed.lengths.tolist()):
        expected = packed.layout.decode(packed.data[place], 1, count)
        got = scratch[place, :order_at].view(torch.bfloat16).view(2, heads, packed.longest, dim)[:, :, :count]
        if packed.layout.codec.kind != "fp8":
            order = scratch[place, order_at : order_at + heads * dim].view(heads, 1, dim).long()
            expected[0] = torch.gather(expected[0], 2, order.expand(-1, count, -1))
        if DEVICE == "cuda":
            assert torch.equal(got, expected)
        assert error(got, expected) <= 1e-2


if __name__ == "__main__":
    if DEVICE == "cpu":
        interpreter.InterpreterBuilder.create_dot = dot
    torch.manual_seed(0)
    size = {} if DEVICE == "cpu" else {"heads": 16, "kv_heads": 8, "tokens": 64}
    for name in (None, "int8", "fp8", "int5", "int4"):
        check(name, [75, 200, 1], 1, False, **size)
        check(name, [150, 33], 3, True, **size)
    if DEVICE == "cuda":
        check("int8", [3050, 2900, 809, 1], 1, False, **size)
        check("int8", [809], 1, False, **size)
