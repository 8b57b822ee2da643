"""Run by test_attention_kernels.py: the kernels against the reference, interpreted on the CPU or on a GPU.

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

from alpacache.alpamayo.prefix_attention import PrefixCall, _ExplicitAttention
from alpacache.prefix import attention_kernels, decode_kernels
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.layers_ahead import LayersAhead, decode, make_places
from alpacache.prefix.packed import PackedTails, pack
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures
from cache_store import CODECS
from cache_store.kv.affine import AffineCodec


def widened(handle):
    bits = handle.data
    return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits


def dot(self, a, b, accumulator, *_):
    """The interpreter multiplies the bit patterns of bfloat16 as integers."""
    product = np.matmul(widened(a), widened(b), dtype=np.float32) + accumulator.data
    return interpreter.TensorHandle(product, accumulator.dtype.scalar)


def prefix(codec, tokens, kv_heads, dim, layers=2):
    kv = torch.randn(layers, 2, kv_heads, tokens, dim).bfloat16() * torch.rand(1, 2, kv_heads, 1, dim).bfloat16()
    kv[:, 0] += 1.5 * torch.randn(layers, kv_heads, 1, dim).bfloat16()
    places = {"rope_delta": 0, "prefix_len": tokens, "start_position": tokens}
    if codec is None:
        return PrefixFeatures(keys=kv[:, 0], values=kv[:, 1], hidden=None, **places)
    codec = CODECS.get(codec, codec)
    return EncodedPrefix(data=tensor_codec(codec).encode(kv), codec=codec, shape=tuple(kv.shape), **places)


def error(got, expected):
    return float(((got.double() - expected.double()).norm() / expected.double().norm()).detach())


def check(codec, lengths, draws, causal, *, heads=4, kv_heads=2, dim=128, tokens=16, layers=2):
    """The last layer's attention and its gradients."""
    prefixes = [prefix(codec, n, kv_heads, dim, layers) for n in lengths]
    packed, last = pack(prefixes, device=torch.device(DEVICE), dtype=torch.bfloat16), layers - 1
    if codec is not None:
        check_decoded(packed, dim)
    rows, scale = len(lengths) * draws, dim**-0.5
    query, key, value, grad = (
        torch.randn(rows, tokens, count, dim, device=DEVICE).bfloat16().transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    output, lse = attention_kernels.forward(query, key, value, packed, last, scale, causal=causal)
    grads = attention_kernels.backward(grad, query, key, value, output, lse, packed, last, scale, causal=causal)
    own = [tensor.float().requires_grad_() for tensor in (query, key, value)]
    call = PrefixCall(prefix=replace(packed, dtype=torch.float32), causal=causal)
    expected = _ExplicitAttention.apply(*own, call, last, scale)
    for got, wanted in zip(
        (output, *grads), (expected, *torch.autograd.grad(expected, own, grad.float())), strict=True
    ):
        # The interpreter cuts float32 to bfloat16 instead of rounding.
        assert error(got, wanted) <= (2e-2 if DEVICE == "cpu" else 4e-3), (codec, lengths, error(got, wanted))


def check_tails(codec, stored, stems, tails, *, heads=4, kv_heads=2, dim=128, tokens=16):
    """Stems of the first prefixes with tails behind them, 0 tokens for a prefix that keeps its own, layers ahead."""
    device = torch.device(DEVICE)
    packed = pack([prefix(codec, n, kv_heads, dim) for n in stored], device=device, dtype=torch.bfloat16)
    others = pack([prefix(codec, max(1, n), kv_heads, dim) for n in tails], device=device, dtype=torch.bfloat16)
    kept, added = torch.tensor(stems, device=device), torch.tensor(tails, device=device)
    behind = PackedTails(data=others.data, stored=packed.lengths, stems=kept, lengths=added, longest=max(1, *tails))
    longest = max(stored) + max(tails)
    packed = replace(packed, lengths=kept + added, starts=kept + added, longest=longest, tails=behind)
    places = make_places(packed.layout, len(stored), longest, device, layers=2)
    places.fill_(255)
    ahead = replace(packed, ahead=LayersAhead(places, torch.cuda.Stream() if DEVICE == "cuda" else None))
    rows, scale = len(stored), dim**-0.5
    query, key, value, grad = (
        torch.randn(rows, tokens, count, dim, device=DEVICE).bfloat16().transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    output, lse = attention_kernels.forward(query, key, value, ahead, 1, scale, causal=False)
    grads = attention_kernels.backward(grad, query, key, value, output, lse, ahead, 1, scale, causal=False)
    own = [tensor.float().requires_grad_() for tensor in (query, key, value)]
    call = PrefixCall(prefix=replace(packed, dtype=torch.float32), causal=False)
    expected = _ExplicitAttention.apply(*own, call, 1, scale)
    wanted = (expected, *torch.autograd.grad(expected, own, grad.float()))
    for got, want in zip((output, *grads), wanted, strict=True):
        assert error(got, want) <= (2e-2 if DEVICE == "cpu" else 4e-3), (codec, stored, tails, error(got, want))


def check_decoded(packed, dim):
    """What lies in scratch is what the reference decodes (the interpreter is off by its cut, one unit at most)."""
    scratch, order_at = decode(packed, 1), packed.layout.order_at(packed.longest)
    heads = packed.layout.kv_heads
    for place, count in enumerate(packed.lengths.tolist()):
        expected = packed.layout.decode(packed.data[place], 1, count)
        got = scratch[place, :order_at].view(torch.bfloat16).view(2, heads, packed.longest, dim)[:, :, :count]
        if packed.layout.is_ordered:
            order = scratch[place, order_at : order_at + heads * dim].view(heads, 1, dim).long()
            expected[0] = torch.gather(expected[0], 2, order.expand(-1, count, -1))
        if DEVICE == "cuda":
            assert torch.equal(got, expected)
        assert error(got, expected) <= 1e-2


def check_ahead(codec, lengths, order, *, dim=128):
    """Layers decoded ahead, or kept, are those decoded when asked for, in the order of a forward and its backward."""
    device = torch.device(DEVICE)
    packed = pack([prefix(codec, n, 2, dim, layers=5) for n in lengths], device=device, dtype=torch.bfloat16)
    decoded, several = [decode(packed, layer) for layer in range(5)], []
    for layers in (2, 5) if DEVICE == "cpu" else (2, 3, 5):
        places = make_places(packed.layout, len(lengths), packed.longest, device, layers=layers)
        several.append(LayersAhead(places, torch.cuda.Stream() if DEVICE == "cuda" else None))
    for layer, then in order:
        for ahead in several:
            if DEVICE == "cuda":
                torch.cuda._sleep(2_000_000)  # what still reads the place that is to be written
            got = ahead.layer(packed, layer, then=then)
            check_same(got.clone(), decoded[layer], packed, packed.layout.order_at(packed.longest), dim)


def check_same(got, expected, packed, order_at, dim):
    """The same bits in every sample's tokens and in the order of its channels."""
    for place, count in enumerate(packed.lengths.tolist()):
        shape = (2, 2, packed.longest, dim)
        one, other = (t[place, :order_at].view(torch.bfloat16).view(shape)[:, :, :count] for t in (got, expected))
        assert torch.equal(one, other)
        end = order_at + 2 * dim
        assert torch.equal(got[place, order_at:end], expected[place, order_at:end])


if __name__ == "__main__":
    if DEVICE == "cpu":
        decode_kernels._OCTETS = 256  # fewer and larger tiles: the interpreter takes as long for one as for another
        interpreter.InterpreterBuilder.create_dot = dot
    torch.manual_seed(0)
    size = {} if DEVICE == "cpu" else {"heads": 16, "kv_heads": 8, "tokens": 64}
    for name in (None, "int8", "fp8", "int5", "int4"):
        check(name, [75, 200, 1], 1, False, **size)
        if DEVICE == "cuda" or name in (None, "int8", "int4"):  # the interpreter takes ten seconds for each
            check(name, [150, 33], 3, True, **size)
    short = [5, 3] if DEVICE == "cpu" else [809, 75]
    check("int8", short, 1, False, **size | {"heads": 16, "kv_heads": 8, "layers": 64})  # 2 Super's
    if DEVICE == "cuda":
        check("int8", [3050, 2900, 809, 1], 1, False, **size)
        check("int8", [809], 1, False, **size)
    for name in ("int8",) if DEVICE == "cpu" else ("int8", "fp8", "int4"):
        check_tails(name, [75, 33], [70, 33], [40, 0], **size)
    for odd in (
        AffineCodec(key_group=24, value_group=4, spread=False),
        AffineCodec(key_bits=(3,), value_bits=(6,), key_group=9, value_group=2),
    ):
        packed = pack([prefix(odd, n, 2, 64) for n in (75, 1)], device=torch.device(DEVICE), dtype=torch.bfloat16)
        check_decoded(packed, 64)
    forward = [(layer, layer + 1) for layer in range(5)]
    backward = [(layer, layer - 1) for layer in reversed(range(5))]
    again = [step for layer in reversed(range(5)) for step in ((layer, layer + 1), (layer, layer - 1))]
    check_ahead("int4", [70, 33], forward + backward)
    check_ahead("int8", [70, 1], forward + again)
