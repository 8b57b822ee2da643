import numpy as np
import pytest
import torch

from alpacache.prefix import codec_passes, layered
from alpacache.prefix.codecs import TENSOR_CODECS, tensor_codec
from cache_store import CODECS
from cache_store.kv.affine import AffineCodec
from cache_store.kv.registry import KINDS

EXTRA = {
    "mixed": AffineCodec(key_bits=(8, 3, 6), value_bits=(4, 7, 5), key_group=48, value_group=16),
    "long groups": AffineCodec(key_bits=(6,), value_bits=(5,), key_group=500, value_group=64),
    "two bits": AffineCodec(key_bits=(2,), value_bits=(2,), spread=False),
}


def test_every_kind_has_a_counterpart_in_torch() -> None:
    assert set(TENSOR_CODECS) == set(KINDS)


def make(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[:, 0] = x[:, 0] * torch.randn(shape[-1], generator=generator).exp() + torch.randn(shape[-1], generator=generator)
    x[:, :, 0, 0] = 0
    x[:, :, 0, -1] *= 1e-6
    x[..., 3] = 2.5
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(3, 2, 2, 1, 64), (3, 2, 2, 130, 128), (3, 2, 1, 64, 32)])
@pytest.mark.parametrize("name", [*CODECS, *EXTRA])
def test_bit_equal_to_the_numpy_reference(name, shape) -> None:
    codec = {**CODECS, **EXTRA}[name]
    for seed in range(3):
        kv = make(shape, seed)
        reference = codec.encode(kv.view(torch.uint16).numpy())
        data = tensor_codec(codec).encode(kv)
        assert np.array_equal(data.numpy(), reference)
        back = tensor_codec(codec).decode(data, shape)
        assert np.array_equal(back.view(torch.uint16).numpy(), codec.decode(reference, shape))
        more = torch.cat([data, data[:100]])  # a row has room behind a sample's bytes
        assert all(torch.equal(tensor_codec(codec).decode_layer(more, i, shape), back[i]) for i in (0, shape[0] - 1))


@pytest.mark.parametrize("name", ["int8", "fp8", "mixed"])
def test_how_many_layers_are_encoded_at_once_changes_no_byte(name, monkeypatch) -> None:
    codec, shape = {**CODECS, **EXTRA}[name], (6, 2, 2, 70, 64)
    if name == "mixed":
        codec = AffineCodec(key_bits=(8, 8, 3, 3, 3, 6), value_bits=(4, 4, 7, 7, 7, 5))
    kv = make(shape, 0)
    kv[1::2] *= 100  # other scales in every other layer
    reference = codec.encode(kv.view(torch.uint16).numpy())
    groups = []
    for values in (1, 2 * 2 * 70 * 64, 2**24):
        monkeypatch.setattr(codec_passes, "AT_ONCE", values)
        assert np.array_equal(tensor_codec(codec).encode(kv).numpy(), reference)
        groups.append([count for _, count in layered.alike(codec, shape, values)])
    assert groups[0] == [1] * 6
    assert groups[1:] == ([[2, 2, 1, 1], [2, 3, 1]] if name == "mixed" else [[2, 2, 2], [6]])


def test_refusals() -> None:
    kv = make((1, 2, 1, 4, 64), 0)
    with pytest.raises(ValueError, match=r"takes .* bytes"):
        tensor_codec(CODECS["int8"]).decode(torch.zeros(3, dtype=torch.uint8), tuple(kv.shape))
    kv[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN, infinity"):
        tensor_codec(CODECS["int8"]).encode(kv)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "mixed"])
def test_layers_of_several_samples_have_the_bytes_of_whole_samples(name) -> None:
    codec, shape = {**CODECS, **EXTRA}[name], (3, 2, 2, 70, 64)
    samples = [make(shape, seed) for seed in range(3)]
    made = [tensor_codec(codec).encode_layer(torch.stack([kv[i] for kv in samples]), i) for i in range(3)]
    for number, kv in enumerate(samples):
        assert torch.equal(torch.cat([data[number] for data, _ in made]), tensor_codec(codec).encode(kv))
    assert all(bool(good.all()) for _, good in made)
    samples[1][2, 0, 0, 0, 0] = float("nan")
    _, good = tensor_codec(codec).encode_layer(torch.stack([kv[2] for kv in samples]), 2)
    assert good.tolist() == [True, False, True]
