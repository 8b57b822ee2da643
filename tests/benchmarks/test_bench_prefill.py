"""The prefill benchmark measures every way that it names, on the same prompts."""

import pytest


@pytest.mark.slow
def test_the_quick_benchmark(quick):
    rows = quick("bench_prefill.py")
    assert [(row["cameras"], row["way"]) for row in rows[:8]] == [
        (cameras, way) for cameras in (1, 4) for way in ("eager", "compiled", "cudnn", "joined")
    ]
    for row in rows:
        eager = next(one for one in rows if one["cameras"] == row["cameras"])
        assert row["over_eager"] == pytest.approx(row["samples_s"] / eager["samples_s"])
        assert row.get("graphs", 2) == (3 if row["way"] == "fixed sizes" else 2)
        for name in ("layer_error", "keys_error", "values_error", "hidden_error"):
            assert 0 < row[name] < 1.02 * eager[name]


@pytest.mark.slow
def test_ways_take_turns(quick):
    """None fails, none is less exact than what is not compiled, and all are compared within the same rounds."""
    rows = quick("bench_prefill_turns.py")
    first = [row for row in rows if row["batch"] == 2]
    assert {(row["way"], row["cameras"]) for row in first} >= {
        (way, 4) for way in ("eager", "compiled", "best", "gelu")
    }
    for row in first:
        eager = next(one for one in first if (one["way"], one["cameras"]) == ("eager", row["cameras"]))
        assert row["over_eager"] > 0
        for name in ("keys_error", "values_error", "hidden_error"):
            assert 0 < row.get(name, eager[name]) < 1.05 * eager[name]
        assert ("hidden_error" in row) == (row["way"] not in ("keys alone", "best", "best added"))
