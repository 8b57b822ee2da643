import hashlib
from dataclasses import replace

import numpy as np
import pytest

from cache_store import CODECS, FormatError, TransformCodec, codec_from_json, codec_named
from cache_store.kv.layered import from_bfloat16, to_bfloat16
from cache_store.kv.registry import codec_name
from cache_store.kv.transform import SIZES, SYMBOLS, TOTAL, TransformGroup, TransformTables

LAYERS, HEADS, CHANNELS = 3, 2, 8


def table(deviation: float) -> np.ndarray:
    """Frequencies of Laplacian codes from -40 to 40."""
    code = np.arange(SYMBOLS) - 127
    share = np.exp(-1.4 * np.abs(code) / deviation)
    found = np.where(np.abs(code) <= 40, np.maximum(1, np.rint(share / share.sum() * TOTAL)), 0).astype(np.int64)
    found[127] += TOTAL - found.sum()
    return found.astype(np.uint16)


def make_tables(*, parts: int = 1, together: int = 2, angle: float = 0.0) -> TransformTables:
    """Channels in another order stand for components, so that every sum has one term and machines agree to the bit."""
    rng = np.random.default_rng(0)
    groups = []
    for first in range(0, LAYERS, together):
        width = min(together, LAYERS - first) * 2 * HEADS * CHANNELS
        order = rng.permutation(width)[: width - 3]
        basis = np.zeros((width, width - 3), np.float16)
        basis[order, np.arange(width - 3)] = 1
        groups.append(
            TransformGroup(
                mean=rng.integers(-4, 5, width).astype(np.float32) / 4,
                scale=np.full(width, 0.25, np.float32),
                basis=basis,
                classes=np.sort(rng.integers(0, 3, width - 3)).astype(np.uint8),
                limit=6.0,
            )
        )
    return TransformTables(
        layers=LAYERS, heads=HEADS, channels=CHANNELS, together=together, parts=parts,
        angles=np.full(CHANNELS // 2, angle, np.float32), axes=np.array([0, 1, 2, 0], np.uint8),
        low=np.array([2, 0, 0], np.uint8), shift=np.array([[0, 0], [0.125, 0.0625], [0.25, 0.125]], np.float32),
        frequency=np.stack([table(3.0), table(4.0), table(1.5)]), groups=tuple(groups),
    )  # fmt: skip


def make_codec(**settings) -> TransformCodec:
    return TransformCodec.of(4.0, make_tables(**settings))


def sample(tokens: int, seed: int = 0, *, spread: float = 1.0) -> np.ndarray:
    """Small multiples of a sixteenth, all of which bfloat16 holds."""
    rng = np.random.default_rng(seed)
    x = np.rint(rng.laplace(0, spread, (LAYERS, 2, HEADS, tokens, CHANNELS)) * 16) / 16
    x[:, 1] = np.where(x[:, 1] == 0, 1 / 16, x[:, 1])
    return to_bfloat16(np.clip(x, -7, 7).astype(np.float32))


def error_of(codec, bits, positions=None) -> float:
    data = codec.encode(bits, positions)
    back = from_bfloat16(codec.decode(data, bits.shape))
    return float(np.sqrt(np.square(back - from_bfloat16(bits)).mean()))


def test_bytes_and_what_they_decode_to_are_the_same_everywhere() -> None:
    found = {}
    for name, codec in (("one", make_codec()), ("two parts", make_codec(parts=2))):
        bits = sample(11)
        bits[:, :, :, 3] = to_bfloat16(np.full((LAYERS, 2, HEADS, CHANNELS), 300, np.float32))  # stored as it is
        data = codec.encode(bits)
        decoded = codec.decode(data, bits.shape)
        assert np.array_equal(decoded[:, :, :, 3], bits[:, :, :, 3])
        found[name] = [hashlib.sha256(one.tobytes()).hexdigest()[:16] for one in (data, decoded)]
    assert found == GOLDEN


GOLDEN = {
    "one": ["f766eaaa6eb3e8ea", "17fff95ca7d76a80"],
    "two parts": ["60234222a607ba3b", "17fff95ca7d76a80"],
}
"""Of the encoded bytes, and of what they decode to."""


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_what_is_decoded_is_near_what_was_encoded(tokens, parts) -> None:
    codec = make_codec(parts=parts, angle=0.3)
    bits = sample(tokens, parts)
    data = codec.encode(bits)
    assert codec.least_bytes(bits.shape) <= len(data) <= codec.encoded_bytes(bits.shape)
    group = codec.decode_group(data, 1, bits.shape)
    assert np.array_equal(group, codec.decode(data, bits.shape)[2:])
    assert error_of(codec, bits) < 0.6
    assert (codec.streams(data, bits.shape).states[:, 0] != 0).mean() > 0.5


def test_positions_decide_how_many_bytes_not_what_comes_back() -> None:
    """Keys that turn with their positions are alike once they are turned back."""
    codec = make_codec(angle=0.7)
    bits = sample(30)
    other = np.random.default_rng(1).integers(0, 1000, (3, 30))
    assert error_of(codec, bits) < 0.6
    assert error_of(codec, bits, other) < 0.6
    assert len(codec.encode(bits, other)) != len(codec.encode(bits))
    for wrong in (other[:2], other - 2000):
        with pytest.raises(ValueError, match="positions are"):
            codec.encode(bits, wrong)


def test_a_token_that_the_basis_does_not_fit_is_stored_as_it_is() -> None:
    codec = make_codec()
    bits = sample(20)
    x = from_bfloat16(bits).copy()
    x[:, :, :, 5] *= 100
    x[1, 0, 0, 9, 2] = 1e30  # overflows in steps
    odd = to_bfloat16(x)
    data = codec.encode(odd)
    back = codec.decode(data, odd.shape)
    assert np.array_equal(back[:, :, :, 5], odd[:, :, :, 5])
    assert np.array_equal(back[:2, :, :, 9], odd[:2, :, :, 9])
    assert len(data) > len(codec.encode(bits))
    everything = to_bfloat16(x * 0 + np.random.default_rng(0).normal(0, 1e4, x.shape).astype(np.float32))
    data = codec.encode(everything)
    assert np.array_equal(codec.decode(data, odd.shape), everything)
    assert len(data) == codec.encoded_bytes(odd.shape)


def test_the_error_of_a_coded_token_is_within_the_limit() -> None:
    codec, found = make_codec(), []
    tables = codec.calibrated
    for spread in (0.1, 1.0, 3.0):
        bits = sample(60, spread=spread)
        data = codec.encode(bits)
        back, x = (from_bfloat16(one).copy() for one in (codec.decode(data, bits.shape), bits))
        for one in (back, x):  # values are coded as shares of their sizes
            raw = data[codec.sections(bits.shape).scales :][: LAYERS * 60].reshape(LAYERS, 60)
            one[:, 1] /= SIZES[raw][:, None, :, None]
        for index, group in enumerate(tables.groups):
            layers = tables.layers_of(index)
            steps = ((back - x)[layers.start : layers.stop] / 0.25) ** 2
            found.append(steps.mean((0, 1, 2, 4)).max() / group.limit)
    assert 0.05 < max(found) < 1.1  # rounding to bfloat16 comes on top


def test_streams_that_do_not_decode_are_refused() -> None:
    codec = make_codec(parts=2)
    bits = sample(9)
    bits[:, :, :, 3] = to_bfloat16(np.full((LAYERS, 2, HEADS, CHANNELS), 300, np.float32))
    good = codec.encode(bits)
    sections = codec.sections(bits.shape)
    for wrong in (good[:-1], good[: sections.words - 4], good[:0], good[: sections.ends]):
        with pytest.raises(ValueError, match=r"takes at least|beyond their bytes|takes .* bytes"):
            codec.decode(wrong, bits.shape)
    least = codec.sections(bits.shape).words
    with pytest.raises(ValueError, match=f"takes from {least} to {least + 2 * bits.size} bytes in this codec, got"):
        codec.check_size((least - 1,), bits.shape)
    with pytest.raises(ValueError, match="takes"):
        codec.decode(np.append(good, np.zeros(10**5, np.uint8)), bits.shape)
    with pytest.raises(ValueError, match="calibrated for"):
        codec.decode(good, (LAYERS, 2, HEADS, 9, CHANNELS * 2))
    caught = 0
    for seed in range(300):  # nothing but a refusal or an answer may come of any bytes
        rng = np.random.default_rng(seed)
        bad = good.copy()
        at = rng.integers(0, len(bad), rng.integers(1, 6))
        bad[at] = rng.integers(0, 256, len(at))
        if seed % 3 == 0:
            bad = bad[: rng.integers(0, len(bad))]
        try:
            codec.decode(bad, bits.shape)
        except ValueError:
            caught += 1
    assert caught > 150
    for at, value in ((sections.states, 0xFF), (sections.ends + 3, 0xFF), (3, 0xFF)):
        bad = good.copy()
        bad[at] ^= value
        with pytest.raises(ValueError, match=r"stream|positions"):
            codec.decode(bad, bits.shape)


def test_numbers_that_are_not_finite_are_refused() -> None:
    bits = sample(4)
    bits[0, 0, 0, 0, 0] = 0x7F80
    with pytest.raises(ValueError, match="NaN, infinity"):
        make_codec().encode(bits)


def test_tables_come_back_from_their_bytes_and_others_are_refused() -> None:
    tables = make_tables(parts=2, angle=0.5)
    data = tables.to_bytes()
    assert TransformTables.from_bytes(data, "here").to_bytes() == data
    for wrong in (data[:-1], data + b"\0", b"", b"x" + data[1:], data[:8] + b"\2" + data[9:]):
        with pytest.raises(FormatError, match="here is not what a calibration"):
            TransformTables.from_bytes(wrong, "here")
    group = tables.groups[0]
    for change in (
        {"frequency": tables.frequency + np.uint16(1)},
        {"frequency": np.roll(tables.frequency, 128, 1)},
        {"low": np.full(3, 9, np.uint8)},
        {"axes": np.full(4, 3, np.uint8)},
        {"angles": np.full(4, np.nan, np.float32)},
        {"shift": np.full((3, 2), 2, np.float32)},
        {"parts": 9},
        {"together": 1},
        {"layers": 10**6},
        {"groups": (replace(group, mean=group.mean * np.float32("nan")), tables.groups[1])},
        {"groups": (replace(group, scale=group.scale * 0), tables.groups[1])},
        {"groups": (replace(group, classes=group.classes + np.uint8(3)), tables.groups[1])},
        {"groups": (replace(group, limit=-1.0), tables.groups[1])},
        {"groups": (replace(group, limit=float("inf")), tables.groups[1])},
    ):
        with pytest.raises(FormatError, match="is not what"):
            TransformTables.from_bytes(replace(tables, **change).to_bytes(), "here")
    for seed in range(200):
        rng = np.random.default_rng(seed)
        bad = bytearray(data)
        bad[int(rng.integers(len(bad)))] ^= int(rng.integers(1, 256))
        try:
            codec = TransformCodec.of(4.0, TransformTables.from_bytes(bytes(bad), "here"))
        except FormatError:
            continue
        bits = sample(3)
        if codec.calibrated.layers == LAYERS and codec.calibrated.channels == CHANNELS:
            codec.decode(codec.encode(bits), bits.shape)  # other numbers, and nothing worse


def test_names_and_documents() -> None:
    assert codec_named("bf16") is None
    assert codec_named("int8") == CODECS["int8"]
    assert codec_named("transform:2.2") == TransformCodec(2.2)
    for name in (
        "transform",
        "transform:",
        "transform:0.2",
        "transform:99",
        "transform:2.225",
        "transform:nan",
        "int9",
    ):
        with pytest.raises(ValueError, match="transform:RATE"):
            codec_named(name)
    for written in ("transform:2", "transform:2.0", "transform:02", "transform:2.00"):
        assert codec_name(written) == "transform:2"
    assert [codec_name(each) for each in ("bf16", "int8", "transform:12", "transform:2.50", "transform:0.75")] == [
        "bf16",
        "int8",
        "transform:12",
        "transform:2.5",
        "transform:0.75",
    ]
    for name in ("transform:0.1", "transform:123", "transform:2.225"):
        with pytest.raises(ValueError, match=r"0\.5 to 12 bits a value, to two decimals"):
            codec_named(name)
    codec = make_codec()
    document, data = codec.to_json(), codec.calibrated.to_bytes()
    assert codec_from_json(document, "here", lambda name: data) == codec
    with pytest.raises(FormatError, match="damaged"):
        codec_from_json(document, "here", lambda name: data + b"x")
    for change in ({"rate": "2"}, {"rate": float("nan")}, {"version": 2}, {"tables_sha256": "../x"}, {"more": 1}):
        with pytest.raises(FormatError, match="here: "):
            codec_from_json(document | change, "here")
    empty = TransformCodec(4.0)
    assert empty.encoded_bytes((36, 2, 8, 100, 128)) == 36 * 2 * 8 * 100 * 128 // 2
    with pytest.raises(ValueError, match="no tables yet"):
        empty.encode(sample(3))


def test_a_device_decodes_streams_of_more_groups_in_one_go_where_each_has_fewer_tokens() -> None:
    codec = TransformCodec(2.2)
    assert [codec.groups_at_once(tokens) for tokens in (1, 8 * 880, 16 * 880, 24_400, 70_000)] == [4, 4, 4, 2, 1]
    for layers, all_layers, together in ((36, True, 4), (1, True, 1), (36, False, 1)):
        expected = layers * 2048 * 2048 * 2 + 2 * (14_080 + 8) * (2048 + together * (2048 + 8))
        assert codec.decoding_bytes((layers, 2, 8, 14_080, 128), all_layers=all_layers) == expected
