"""The Triton kernels: interpreted on the CPU, compiled for the cards that users own, run where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.packed import PackedPrefixes
from cache_store import CODECS

pytest.importorskip("triton", reason="triton is not installed; CPU-only installs do not need it")

SCRIPT = Path(__file__).with_name("kernels_against_reference.py")
SHARED_LIMIT = 99 * 1024
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def run(device):
    done = subprocess.run([sys.executable, str(SCRIPT), device], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ci
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels on")
def test_interpreted_kernels_equal_the_reference():
    run("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_reference():
    run("cuda")


def launches(record_launches, codec, samples):
    """The launches of one layer, forward and backward, at the released size."""
    from alpacache.prefix import attention_kernels, decode_kernels

    record_launches(decode_kernels, "decode_affine_layer", "decode_fp8_layer")
    names = ("prefix_forward", "merge_forward", "row_delta", "prefix_backward", "merge_backward")
    found = record_launches(attention_kernels, *names)
    layout = PrefixLayout(layers=36, kv_heads=8, head_dim=128, codec=CODECS.get(codec))
    packed = PackedPrefixes(
        layout=layout,
        data=torch.empty(1, 256, dtype=torch.uint8),
        rows=torch.zeros(samples, dtype=torch.int64),
        lengths=torch.full((samples,), 3000),
        starts=torch.zeros(samples, dtype=torch.int64),
        longest=3050,
        dtype=torch.bfloat16,
    )
    query, key = (torch.empty(samples, 64, heads, 128, dtype=torch.bfloat16).transpose(1, 2) for heads in (16, 8))
    output, lse = attention_kernels.forward(query, key, key, packed, 3, 0.1, causal=False)
    attention_kernels.backward(query, query, key, key, output, lse, packed, 3, 0.1, causal=False)
    return found


def compiled(kernel, arguments, options, capability):
    import triton
    from triton.backends.compiler import GPUTarget

    options = dict(options)
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature = {
        name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        for name, value in zip(kernel.arg_names, arguments, strict=False)
    } | dict.fromkeys(options, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in options.items()}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        if isinstance(value, int) and value == 1 and not parameter.do_not_specialize:  # as a launch does
            signature[parameter.name], constants[place,] = "constexpr", 1
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


@pytest.mark.ci
@pytest.mark.parametrize("capability", [86, 89])
@pytest.mark.parametrize(("codec", "samples"), [("bf16", 2), ("int8", 1), ("fp8", 2)])
def test_kernels_compile_for_consumer_cards(codec, samples, capability, record_launches):
    """An RTX 3090 (8.6) and a 4090 (8.9): no feature they lack, no more shared memory than they have."""
    found = launches(record_launches, codec, samples)
    assert len({kernel.__name__ for kernel, *_ in found}) == (5 if codec == "bf16" else 6)
    for kernel, arguments, options in found:
        result = compiled(kernel, arguments, options, capability)
        assert result.asm["cubin"]
        assert result.metadata.shared <= SHARED_LIMIT, kernel.__name__
