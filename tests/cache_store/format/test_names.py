import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_store.format.names import is_attempt, is_key, sample_key


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_any_id_becomes_a_safe_name(sample_id) -> None:
    key = sample_key(sample_id)
    assert is_key(key)
    assert len(key) <= 65
    assert key.isascii()


def test_similar_ids_stay_apart() -> None:
    ids = ["a/b", "a_b", "A/b", "a/b/", "..", ".", "a" * 300, "a" * 301, "é", "e\u0301"]
    assert len({sample_key(item).casefold() for item in ids}) == len(ids)


def test_key_is_stable() -> None:
    assert sample_key("clip-7@5100000#0") == "clip-7_5100000_0-5812a53403950232b6e178782b70f7f1"


@pytest.mark.parametrize("bad", ["", "\ud800", "x" * 5000, None, 3])
def test_what_is_no_id(bad) -> None:
    with pytest.raises(ValueError, match="sample id"):
        sample_key(bad)


def test_names_from_records() -> None:
    assert is_attempt("0123456789abcdef")
    assert not any(
        is_attempt(name) for name in ("", "..", "0123456789abcde/", "0123456789ABCDEF", "0123456789abcdef\n")
    )
    assert not any(is_key(name) for name in ("", "..", "../" + "0" * 32, "a-" + "0" * 31))
