from cache_store import differences


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
