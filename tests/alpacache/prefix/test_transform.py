import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from alpacache.errors import UsageError
from alpacache.prefix.calibration import KVSample, angles_of, calibrate, turned
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.layout import PrefixLayout
from cache_store.kv.transform import TransformTables

HEADS, CHANNELS, LAYERS = 2, 16, 3
ANGLES = 1 / (100 ** (torch.arange(CHANNELS // 2) / (CHANNELS // 2)))
AXES = torch.arange(CHANNELS // 2) % 3


def make_sample(tokens: int, seed: int, *, noise: float = 0.05) -> KVSample:
    """Keys and values that follow from few numbers a token, but for noise, in the same way in every sample."""
    width = LAYERS * 2 * HEADS * CHANNELS
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, width, generator=generator) * torch.rand(24, 1, generator=generator) ** 2
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 24, generator=generator) @ mix + noise * torch.randn(tokens, width, generator=generator) + 1
    kv = x.view(tokens, LAYERS, 2, HEADS, CHANNELS).permute(1, 2, 3, 0, 4).clone()
    positions = torch.stack([torch.arange(tokens), torch.arange(tokens) // 7, torch.arange(tokens) % 7])
    angle = angles_of(positions, ANGLES, AXES)
    kv[:, 0] = turned(kv[:, 0], angle.cos(), angle.sin())
    return KVSample(kv=kv.bfloat16(), positions=positions)


def learn(rate: float, *, count: int = 8, **settings):
    samples = [make_sample(200, seed) for seed in range(count)]
    return calibrate(samples, rate=rate, angles=ANGLES, axes=AXES, device=torch.device("cpu"), **settings)


def relative(found, wanted) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(scope="module")
def codecs():
    return {rate: learn(rate) for rate in (2.0, 5.0)}


def test_samples_that_were_not_learnt_from_take_the_bits_that_were_asked_for(codecs) -> None:
    errors = []
    for rate, codec in codecs.items():
        sample = make_sample(150, 99)
        data = tensor_codec(codec).encode(sample.kv, sample.positions)
        assert len(data) * 8 / sample.kv.numel() == pytest.approx(rate + 16 / 150, rel=0.08)  # the first token is exact
        errors.append(relative(tensor_codec(codec).decode(data, tuple(sample.kv.shape)), sample.kv))
    assert errors[1] < errors[0] / 4 < 0.02


def test_keys_are_turned_back_first(codecs) -> None:
    """With wrong positions a sample takes more bits, and is no worse."""
    sample, sizes = make_sample(150, 99), []
    for positions in (sample.positions, torch.zeros_like(sample.positions)):
        data = tensor_codec(codecs[5.0]).encode(sample.kv, positions)
        assert relative(tensor_codec(codecs[5.0]).decode(data, tuple(sample.kv.shape)), sample.kv) < 0.01
        sizes.append(len(data))
    assert sizes[1] > 1.2 * sizes[0]


def test_samples_unlike_those_learnt_from_take_more_bits_and_are_no_worse(codecs) -> None:
    codec = codecs[2.0]
    errors, bits = [], []
    for noise in (0.05, 0.08, 3.0):
        sample = make_sample(150, 99, noise=noise)
        data = tensor_codec(codec).encode(sample.kv, sample.positions)
        bits.append(len(data) * 8 / sample.kv.numel())
        errors.append(relative(tensor_codec(codec).decode(data, tuple(sample.kv.shape)), sample.kv))
    assert bits[0] < bits[1] < bits[2] < 17.2
    assert max(errors) < 2.5 * errors[0]


def test_weights_move_errors_to_where_queries_are_small() -> None:
    weights = torch.ones(1, 1, CHANNELS)
    weights[..., ::2] = 25
    plain, weighed = (learn(3.0, key_weights=each) for each in (None, weights))
    sample = make_sample(150, 99)
    found = []
    for codec in (plain, weighed):
        data = tensor_codec(codec).encode(sample.kv, sample.positions)
        keys = tensor_codec(codec).decode(data, tuple(sample.kv.shape))[:, 0]
        found.append((keys.float() - sample.kv[:, 0].float()).square().mean((0, 1, 2)))
    assert found[1][::2].sum() < 0.7 * found[0][::2].sum()


def test_torch_gives_what_numpy_gives(codecs) -> None:
    codec, sample = codecs[5.0], make_sample(40, 5)
    shape = tuple(sample.kv.shape)
    data = tensor_codec(codec).encode(sample.kv, sample.positions)
    assert np.array_equal(data, codec.encode(sample.kv.view(torch.uint16).numpy(), sample.positions.numpy()))
    back = tensor_codec(codec).decode(data, shape)
    assert np.array_equal(back.view(torch.uint16), codec.decode(data.numpy(), shape))
    more = torch.cat([data, data[:100]])  # a row has room behind a sample's bytes
    assert all(torch.equal(tensor_codec(codec).decode_layer(more, i, shape), back[i]) for i in range(LAYERS))
    sample.kv[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN, infinity"):
        tensor_codec(codec).encode(sample.kv, sample.positions)


def test_what_is_learnt_is_the_same_again_and_reads_back() -> None:
    one, other = (learn(3.0, count=2) for _ in range(2))
    assert one == other
    data = one.calibrated.to_bytes()
    assert TransformTables.from_bytes(data, "here").to_bytes() == data
    split = learn(3.0, count=2, group_channels=128)
    assert split.calibrated.together == 2
    assert [len(group.mean) for group in split.calibrated.groups] == [128, 64]


def test_what_cannot_be_learnt_is_refused() -> None:
    few = [make_sample(20, 0)]
    with pytest.raises(UsageError, match="64 tokens at least"):
        calibrate(few, rate=2.0, angles=ANGLES, axes=AXES, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="too few for this model"):
        learn(0.5, count=2, group_channels=64)
    with pytest.raises(UsageError, match="whole samples"):
        tensor_codec(learn(3.0, count=2)).encode_layer(few[0].kv, 0)


def test_rows_have_room_for_the_largest_sample_that_comes(codecs) -> None:
    codec = codecs[2.0]
    layout = PrefixLayout(layers=LAYERS, kv_heads=HEADS, head_dim=CHANNELS, codec=codec, most_bytes=9000)
    assert layout.size_bytes(200) == 9000
    assert layout.can_be(9000, 200)
    assert not layout.can_be(9001, 200)
    assert not layout.can_be(codec.least_bytes(layout.shape(200)) - 1, 200)


@pytest.mark.ci
def test_kernels_against_the_reference() -> None:
    """Interpreted on the CPU; a process of its own, as Triton decides at its import."""
    pytest.importorskip("triton")
    script = Path(__file__).parents[3] / "benchmarks" / "bench_transform.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, "--quick", "--checks"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "decoded" in done.stdout
