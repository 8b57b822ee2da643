import hashlib

import google_crc32c
import numpy as np
import pytest

from cache_store import CODECS, FormatError, codec_from_json
from cache_store.kv import affine
from cache_store.kv.affine import AffineCodec, planes
from cache_store.kv.fp8 import Fp8Codec, fp8_values
from cache_store.kv.layered import MANTISSAS, scale_table, to_bfloat16
from cache_store.kv.registry import KINDS

SHAPE = (2, 2, 3, 100, 64)


def to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def make_kv(shape=SHAPE, seed: int = 0) -> np.ndarray:
    """Keys with an offset and a range of their own in each channel, values without."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    x[:, 0] *= np.exp(rng.standard_normal((*shape[2:3], 1, shape[4])).astype(np.float32))
    x[:, 0] += 3 * rng.standard_normal((*shape[2:3], 1, shape[4])).astype(np.float32)
    return to_bfloat16(x)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("name", "bits", "key_error", "value_error"),
    [
        ("int8", 8.6, 0.0018, 0.0052),
        ("int5", 5.6, 0.015, 0.04),
        ("int4", 4.6, 0.031, 0.082),
        ("fp8", 8.2, 0.029, 0.029),
    ],
)
def test_size_and_error_of_the_named_codecs(name, bits, key_error, value_error) -> None:
    kv = make_kv()
    data = CODECS[name].encode(kv)
    assert len(data) * 8 / kv.size < bits
    back, expected = to_float(CODECS[name].decode(data, kv.shape)), to_float(kv)
    assert key_error * 0.7 < relative(back[:, 0], expected[:, 0]) < key_error
    assert value_error * 0.7 < relative(back[:, 1], expected[:, 1]) < value_error


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_value_is_further_off_than_its_step(bits) -> None:
    codec = AffineCodec(key_bits=(bits,), value_bits=(bits,), key_group=7, value_group=16, spread=False)
    kv = make_kv((1, 2, 2, 23, 48))
    back, x = to_float(codec.decode(codec.encode(kv), kv.shape)), to_float(kv)
    groups = x[0, 1].reshape(2, 23, 3, 16)
    span = np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)
    error = np.abs(back[0, 1] - x[0, 1]).reshape(groups.shape).max(-1)
    assert (error <= 1.15 * span / (2**bits - 1) + 2**-8 * np.abs(groups).max(-1)).all()


def test_layers_may_have_bits_of_their_own() -> None:
    codec = AffineCodec(key_bits=(8, 4), value_bits=(6,))
    kv = make_kv()
    sizes = [codec.layer_bytes(layer, SHAPE) for layer in (0, 1)]
    assert sizes[0][0] - sizes[1][0] == 4 * kv[0, 0].size // 8
    assert sizes[0][1] == sizes[1][1]
    data = codec.encode(kv)
    assert len(data) == sum(map(sum, sizes)) == codec.encoded_bytes(SHAPE)
    back, x = to_float(codec.decode(data, SHAPE)), to_float(kv)
    assert relative(back[0, 0], x[0, 0]) < 0.004 < 0.02 < relative(back[1, 0], x[1, 0]) < 0.06
    with pytest.raises(ValueError, match="bits for 2 layers, the sample has 3"):
        codec.encoded_bytes((3, *SHAPE[1:]))


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("fill", [0.0, 5.0, -1e-20, 3e37])
def test_constants_come_back_nearly_exact(name, fill) -> None:
    kv = to_bfloat16(np.full((1, 2, 1, 3, 64), fill, np.float32))
    back, x = to_float(CODECS[name].decode(CODECS[name].encode(kv), kv.shape)), to_float(kv)
    assert np.all(np.abs(back - x) <= (0.07 if name in ("int4", "fp8") else 0.04) * np.abs(x))


def test_refusals() -> None:
    bad = make_kv()
    bad[0, 0, 0, 0, 0] = 0x7F80
    with pytest.raises(ValueError, match="NaN, infinity"):
        CODECS["int8"].encode(bad)
    with pytest.raises(ValueError, match=r"takes .* bytes in this codec"):
        CODECS["int8"].decode(np.zeros(3, np.uint8), SHAPE)
    for shape in [(1, 1, 1, 1, 64), (1, 2, 1, 1, 60), (1, 2, 1, 0, 64), (1, 2, 1, 1, 40), (1, 2, 1, 1, 512)]:
        with pytest.raises(ValueError, match="multiple of 8"):
            CODECS["int8"].encoded_bytes(shape)
    for wrong in ({"key_bits": (9,)}, {"key_group": 0}, {"value_bits": ()}):
        with pytest.raises(ValueError):
            AffineCodec(**wrong)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("int8", {"kind": "zip"}, "here: a codec is an object with a kind among affine, fp8, transform, got 'zip'"),
        ("int8", {"kind": ["affine"]}, r"a kind among affine, fp8, transform, got \['affine'\]"),
        ("int8", {"level": 1}, "here: an affine codec has exactly the keys key_bits, key_group, kind, spread, value"),
        ("int8", {"spread": 1}, "here: 'spread' should be bool, got int"),
        ("int8", {"key_bits": 3}, "here: 'int' object is not iterable"),
        ("int8", {"key_bits": [1]}, "here: a code has 2 to 8 bits"),
        ("fp8", {"value_bits": [4]}, r"here: a code of fp8 has 8 bits, got \[\[8\], \[4\]\]"),
        ("fp8", {"value_bits": [8.0]}, "here: a code of fp8 has 8 bits"),
        ("fp8", {"level": 1}, "here: an fp8 codec has exactly the keys"),
    ],
)
def test_documents_are_not_trusted(name, change, message) -> None:
    with pytest.raises(FormatError, match=message):
        codec_from_json(CODECS[name].to_json() | change, "here")


def test_the_registry_is_whole() -> None:
    assert {codec.kind for codec in CODECS.values()} | {"transform"} == set(KINDS)  # which has no settings of its own
    with pytest.raises(FormatError, match="here: a codec is an object"):
        codec_from_json(["affine"], "here")


def test_an_early_fp8_document_is_the_same_codec() -> None:
    """Its groups mean nothing; the first stores have keys in groups of 64."""
    assert codec_from_json(CODECS["fp8"].to_json() | {"key_group": 64}, "here") == CODECS["fp8"]


def test_json_planes_and_tables() -> None:
    for codec in CODECS.values():
        assert codec_from_json(codec.to_json(), "here") == codec
    assert [planes(width) for width in (1, 5, 7, 8, 10)] == [[1], [4, 1], [4, 2, 1], [8], [8, 2]]
    assert [value.hex() for value in map(float, MANTISSAS[:2])] == ["0x1.0000000000000p+0", "0x1.0b55860000000p+0"]
    table = scale_table(-3)
    assert (table[0], table[16], table[255] / table[239]) == (0.125, 0.25, 2.0)
    assert fp8_values()[[0, 1, 8, 126]].tolist() == [0.0, 2**-9, 2**-6, 448.0]


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_no_group_is_worse_than_with_the_first_scale_that_covers_it(bits, monkeypatch) -> None:
    codec, kv = AffineCodec(key_bits=(bits,), value_bits=(bits,), spread=False), make_kv((1, 2, 2, 100, 64))
    x = to_float(kv)[0]

    def errors() -> list[np.ndarray]:
        squares = (to_float(codec.decode(codec.encode(kv), kv.shape))[0] - x) ** 2
        groups = np.add.reduceat(squares[0], [0, codec.key_group], axis=1)
        return [groups, squares[1].reshape(2, 100, 2, 32).sum(-1)]

    searched = errors()
    monkeypatch.setattr(affine, "TRIED", (0,))
    for found, first in zip(searched, errors(), strict=True):
        assert (found <= 1.01 * first).all()  # sums of rounded squares decided
        assert found.sum() < 0.98 * first.sum()


def test_keys_get_their_bits_where_large_queries_meet_wide_spans() -> None:
    kv = make_kv((1, 2, 1, 100, 64))
    kv[:, 0, ..., [7, 39, 20]] = kv[:, 0, ..., [7, 39, 20]] + (4 << 7)  # sixteen times
    kv[:, 0, ..., 20] = kv[:, 0, ..., :1, 20]
    [order] = [s for s in CODECS["int8"].segments("key", 0, (1, 100, 64)) if s.name == "order"]
    places = CODECS["int8"].encode(kv)[order.offset : order.offset + 64]
    assert set(places[:2]) == {7, 39}
    assert places[-1] == 20, "a constant channel has no errors"


def test_decoding_never_changes() -> None:
    """A store of today must be readable tomorrow: these digests are part of format version 1."""
    shape = (2, 2, 2, 70, 64)
    digests = {}
    for name, codec in FIRST_CODECS.items():
        data = (np.arange(codec.encoded_bytes(shape), dtype=np.uint64) * 2654435761 >> 13).astype(np.uint8)
        end = 0
        for layer in range(2):
            for what, size in zip(("key", "value"), codec.layer_bytes(layer, shape), strict=True):
                part = data[end : (end := end + size)]
                part[0] = 250 - 10 * layer if what == "key" else 3
                for segment in codec.segments(what, layer, shape[2:]):
                    if segment.name == "order":
                        part[segment.offset :][: segment.size_bytes] = (np.arange(128) * 29 + 5) % 64
        digests[name] = hashlib.sha256(codec.decode(data, shape).tobytes()).hexdigest()[:16]
    assert digests == DECODED


FIRST_CODECS = {
    "int8": AffineCodec(key_group=64),
    "int5": AffineCodec(key_bits=(5,), value_bits=(5,), key_group=64),
    "int4": AffineCodec(key_bits=(4,), value_bits=(4,), spread=False, key_group=64),
    "fp8": Fp8Codec(),
    "keys 4, values 3": AffineCodec(key_bits=(4,), value_bits=(3,)),
}
DECODED = {
    "int8": "7f46826530301aac",
    "int5": "134cd633914e5a84",
    "int4": "388d035a7aa681a8",
    "fp8": "b9d2bf3bb63b3ca0",
    "keys 4, values 3": "dc90c0f609aa23ae",
}


def test_the_encoded_bytes_are_the_same_everywhere() -> None:
    """A better encoder may change these digests, another machine or numpy must not."""
    kv = np.arange(2 * 2 * 2 * 70 * 64, dtype=np.uint32).reshape(2, 2, 2, 70, 64)
    kv = (0x3F80 + (kv * 2654435761 >> 20) % 256 + ((kv * 40503 >> 7) % 2) * 0x8000).astype(np.uint16)
    digests = {name: hashlib.sha256(codec.encode(kv).tobytes()).hexdigest()[:16] for name, codec in CODECS.items()}
    assert digests == DIGESTS


DIGESTS = {
    "int8": "8c36ccdcb2be0c6c",
    "int5": "8df859aa4ee00c42",
    "int4": "55fba40879bd4bcc",
    "fp8": "4710f7936a6c761e",
}


def test_bytes_are_those_of_the_first_release() -> None:
    """Checksums taken before codecs became classes: neither what is stored nor what it decodes to may change."""
    random, shape = np.random.RandomState(26), (2, 2, 2, 75, 64)
    kv = (random.randint(0x3E00, 0x4200, shape) | random.randint(0, 2, shape) << 15).astype(np.uint16)
    checksums = {}
    for name, codec in {**CODECS, **GOLDEN_CODECS}.items():
        data = codec.encode(kv)
        decoded = codec.decode(data, shape)
        checksums[name] = (len(data), *(google_crc32c.value(array.tobytes()) for array in (data, decoded)))
    assert checksums == GOLDEN


GOLDEN_CODECS = {
    "mixed": AffineCodec(key_bits=(8, 3), value_bits=(4, 7), key_group=48, value_group=16),
    "int6 without spread": AffineCodec(key_bits=(6,), value_bits=(6,), spread=False),
}
GOLDEN = {
    "int8": (41696, 0x8B2F9DEF, 0x02A37DCB),
    "int5": (27296, 0xF4FFCF14, 0x90F119B9),
    "int4": (22496, 0xA33BFCAD, 0x9355CC4A),
    "fp8": (39004, 0x9B1B8568, 0xA335FE46),
    "mixed": (30896, 0x9E0AB272, 0xEBE95126),
    "int6 without spread": (31540, 0xCB0A35A3, 0xE2F8FA74),
}
