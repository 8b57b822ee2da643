"""Results as JSON that strict readers accept."""

import json
from dataclasses import dataclass

import pytest

from alpacache import strict_json


@dataclass(frozen=True)
class Found:
    slope: float
    horizons: dict


def test_what_is_not_finite_is_null_however_deep():
    value = {"found": Found(slope=float("nan"), horizons={6.4: (1.5, float("-inf"))}), 3: [None, True, "é"]}
    expected = {"found": {"slope": None, "horizons": {"6.4": [1.5, None]}}, "3": [None, True, "é"]}
    assert strict_json.plain(value) == expected
    for indent in (None, 1):
        text = strict_json.dumps(value, indent=indent)
        assert json.loads(text, parse_constant=pytest.fail) == expected
    assert "\n" not in strict_json.dumps(value)


def test_what_json_does_not_know_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        strict_json.dumps({"path": object()})


@pytest.mark.parametrize(
    "text",
    [
        "[NaN]",
        "[-Infinity]",
        "[1e999]",
        "[1" + 400 * "0" + "]",
        100_000 * "[",
        "[1",
        b"\xff",
        '{"a": 1, "a": 1}',
        "[]".encode("utf-16"),
    ],
)
def test_what_is_no_json_is_not_read(text):
    with pytest.raises(ValueError):
        strict_json.loads(text)


def test_a_key_that_stands_twice_is_named():
    with pytest.raises(ValueError, match="the key 'fx' 2 times in one object"):
        strict_json.loads('{"a": {"fx": 1, "fy": 2, "fx": 3}, "b": {"fx": 1}}')


def test_values_are_read_as_json_reads_them():
    text = '{"a": [1, -2.5e3, null, true, "\\u00e9"], "b": 9007199254740993}'
    assert strict_json.loads(text) == strict_json.loads(text.encode()) == json.loads(text)


def test_an_object_has_no_more_keys_than_allowed():
    assert strict_json.loads('{"a": 1, "b": {}}', most_keys=2) == {"a": 1, "b": {}}
    with pytest.raises(ValueError, match="an object of 2 keys, expected at most 1"):
        strict_json.loads('{"a": 1, "b": {}}', most_keys=1)
