import json

import pytest

from cache_store import FormatError, differences
from cache_store.document import MAX_DOCUMENT_BYTES, canonical_copy, check_seal, parse, seal, to_bytes


def test_seal_covers_every_bit() -> None:
    data = seal({"a": [1, "é"], "document_crc32c": "00000000"}, "it")
    check_seal(data, "it")
    assert json.loads(data)["a"] == [1, "é"]
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            check_seal(bytes(changed), "it")


def test_seal_is_the_crc_with_its_digits_as_zeros() -> None:
    import google_crc32c

    data = seal({"b": 1}, "it")
    assert data.startswith(b'{"document_crc32c":"')
    assert int(data[20:28], 16) == google_crc32c.value(data[:20] + b"00000000" + data[28:])


@pytest.mark.parametrize(
    "hostile",
    [b"", b"[]", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":' + b"[" * 100_000, b"\xff\xfe", b'{"a":' + b"9" * 5000 + b"}"],
)
def test_hostile_documents_are_refused(hostile) -> None:
    with pytest.raises(FormatError, match="here"):
        parse(hostile, "here")


def test_what_json_cannot_hold_is_refused() -> None:
    assert canonical_copy({"a": (1, 2)}, "identity") == {"a": [1, 2]}
    for value in (float("nan"), {1, 2}, object()):
        with pytest.raises(ValueError, match="identity must be plain JSON"):
            canonical_copy({"a": value}, "identity")
    with pytest.raises(ValueError, match="the limit"):
        to_bytes({"a": "x" * MAX_DOCUMENT_BYTES}, "it")


def test_numbers_beyond_the_range_are_refused() -> None:
    with pytest.raises(FormatError, match="beyond the range"):
        parse(b'{"a":1e999}', "here")
    assert parse(b'{"a":1e300}', "here") == {"a": 1e300}


def test_each_differing_key_has_a_line() -> None:
    expected = {"model": {"id": "a", "revision": "1"}, "frames": 4, "cameras": ("x", "y"), "only": None}
    actual = {"model": {"id": "a", "revision": "2"}, "frames": 4.0, "cameras": ["x", "y"], "extra": {"deep": 1}}
    assert differences(expected, actual) == [
        'extra: expected nothing, found {"deep":1}',
        "frames: expected 4, found 4.0",
        'model.revision: expected "1", found "2"',
        "only: expected null, found nothing",
    ]
    assert differences(expected, expected) == []


def test_a_value_against_a_mapping() -> None:
    assert differences({"a": {"b": 1}}, {"a": True}) == ['a: expected {"b":1}, found true']
