"""The kernels of encoding against torch operations on the CPU and against numpy, bit for bit: interpreted on the CPU,
run where there is a GPU.

`python test_encode_kernels.py cpu|cuda` is what the tests run: Triton decides at its import whether it interprets, so
this is a process of its own.
"""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed; CPU-only installs do not need it")

from alpacache.prefix import codec_passes, encode_kernels, layered  # noqa: E402
from alpacache.prefix.codecs import tensor_codec  # noqa: E402
from cache_store import CODECS  # noqa: E402
from cache_store.kv.affine import AffineCodec  # noqa: E402

EXTRA = {
    "mixed": AffineCodec(key_bits=(8, 3, 6), value_bits=(4, 7, 5), key_group=48, value_group=16),
    "long groups": AffineCodec(key_bits=(6,), value_bits=(5,), key_group=150, value_group=64),
    "two bits": AffineCodec(key_bits=(2,), value_bits=(2,), spread=False),
    "odd groups": AffineCodec(key_bits=(7,), value_bits=(3,), key_group=7, value_group=12),
}
SHAPES = {
    "fp8": [(2, 2, 1, 3, 64)],
    "mixed": [(3, 2, 2, 50, 64)],
    "long groups": [(2, 2, 1, 155, 64)],
    "odd groups": [(2, 2, 2, 15, 24), (1, 2, 1, 1, 48)],
    "int8": [(2, 2, 2, 130, 128), (3, 2, 2, 1, 64), (2, 2, 1, 64, 32), (1, 2, 1, 3, 256), (2, 2, 2, 72, 8)],
}


def run(device):
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    done = subprocess.run([sys.executable, __file__, device], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ci
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels on")
def test_interpreted_kernels_give_the_bytes_of_the_reference():
    run("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_give_the_bytes_of_the_reference():
    run("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_asked_once_and_little_memory_is_needed():
    """An 850-token sample of the released size: all layers at once, one synchronisation, under 1.5 GiB."""
    kv = torch.randn(36, 2, 8, 850, 128, device="cuda").bfloat16()
    codec = CODECS["int8"]
    tensor_codec(codec).encode(kv)  # compiles, and fills the caches of tables
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # warns of itself, once
        try:
            tensor_codec(codec).encode(kv)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warned if "called a synchronizing" in str(w.message)]) == 1
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30


def test_both_have_the_same_functions():
    for name in ("key_extremes", "value_extremes", "energy", "fit_keys", "fit_values", "pack"):
        assert callable(getattr(codec_passes, name))
        assert callable(getattr(encode_kernels, name))
    assert encode_kernels.AT_ONCE > codec_passes.AT_ONCE


def test_int8_takes_a_plane_a_class_of_channels(record_launches, monkeypatch):
    found = record_launches(encode_kernels, "group_extremes", "group_energy", "fit", "pack_plane")
    monkeypatch.setattr(layered, "passes_on", lambda device: encode_kernels)
    tensor_codec(CODECS["int8"]).encode(torch.zeros(2, 2, 8, 100, 128, dtype=torch.bfloat16))
    planes = ["pack_plane"]
    expected = ["group_extremes", "group_energy", "fit", *planes * 8, "group_extremes", "fit", *planes]
    assert [kernel.__name__ for kernel, *_ in found] == expected


def ordinary(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[:, 0] = x[:, 0] * torch.randn(shape[-1], generator=generator).exp() + torch.randn(shape[-1], generator=generator)
    x[:, :, 0, 0] = 0
    x[:, :, 0, -1] *= 1e-6
    x[..., 3] = 2.5
    return x.to(torch.bfloat16)


def hard(shape, seed):
    """A kind of hard values a layer: see the comments."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    steps = torch.randint(-3, 4, shape, generator=generator)
    kinds = [
        torch.zeros(shape),
        torch.full(shape, -3.0),  # all the same
        1000 + 4 * steps,  # large offsets, spans of a few units of bfloat16
        -(2.0**100) * (1 + steps / 128),
        (noise * 2.0**123).clamp(-(2.0**124), 2.0**124),  # next to what is refused
        noise * 2.0**-130,  # denormals, below the least scale
        noise * 2.0**-98,
        noise * 2.0 ** torch.randint(-60, 60, shape, generator=generator),  # scales at both ends of the table
        steps.float(),  # ties of rounding
        steps * 0.5 - 0.0,
    ]
    x = torch.stack([kind[0] for kind in kinds])
    outlier = noise[0].clone()
    outlier[..., -1, -1] = 3e8
    return torch.cat([x, outlier[None]]).to(torch.bfloat16)


def encode_with_kernels(codec, kv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layered, "passes_on", lambda device: encode_kernels)
        return tensor_codec(codec).encode(kv)


def check(device, codec, kv, *, reference=True):
    expected = tensor_codec(codec).encode(kv)
    if reference:
        assert np.array_equal(expected.numpy(), codec.encode(kv.view(torch.uint16).numpy()))
    got = encode_with_kernels(codec, kv.to(device)).cpu()
    assert torch.equal(got, expected), (codec, kv.shape, (got != expected).nonzero()[:5])


def check_refusals(device):
    for kind, value in ((0, float("nan")), (1, -float("inf")), (0, 2.0**125)):
        kv = ordinary((1, 2, 1, 5, 64), 0)
        kv[0, kind, 0, 3, 5] = value
        with pytest.raises(ValueError, match="NaN, infinity"):
            encode_with_kernels(CODECS["int8"], kv.to(device))


def check_energy(device):
    x = ordinary((2, 2, 3, 70, 64), 1)[:, 0]
    largest = x.abs().amax((1, 2, 3)).float()
    assert torch.equal(encode_kernels.energy(x.to(device), largest.to(device)).cpu(), codec_passes.energy(x, largest))


if __name__ == "__main__":
    where = sys.argv[1]
    check(where, CODECS["int8"], ordinary((1, 2, 1, 75, 64), 0))
    if where == "cpu":  # the interpreter takes the same time for a large tile as for a small one
        encode_kernels._KEY_LANES = 256
        encode_kernels._KEY_MEMBERS = encode_kernels._FITTED_MEMBERS = 32
        encode_kernels._TILE = encode_kernels._PACKED = 2**13
    for name, codec in ({**CODECS, **EXTRA}).items():
        for shape in SHAPES.get(name, SHAPES["int8"][1:2]):
            check(where, codec, ordinary(shape, 0))
    for name in ("int8", "int5", "int4", "two bits"):
        codec = {**CODECS, **EXTRA}[name]
        check(where, codec, hard((1, 2, 1, 12, 64), 0))
    check(where, CODECS["int8"], hard((1, 2, 1, 75, 32), 1))
    check_refusals(where)
    check_energy(where)
    if where == "cuda":
        for seed, tokens in enumerate((1, 71, 72, 73, 850, 3000)):
            for name in CODECS:
                check(where, CODECS[name], ordinary((3, 2, 8, tokens, 128), seed), reference=tokens < 100)
        for seed in range(20):
            check(where, CODECS["int8"], hard((1, 2, 4, 150, 128), seed))
        for name, tokens in (("int8", 850), ("int4", 300)):  # many layers at once
            check(where, CODECS[name], ordinary((36, 2, 8, tokens, 128), 9), reference=False)
