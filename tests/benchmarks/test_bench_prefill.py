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
    """All are compared within the same rounds, and none is less exact than what is not compiled."""
    rows = quick("bench_prefill_turns.py")
    assert [(row["way"], row["cameras"], row["batch"]) for row in rows] == [
        (way, cameras, batch)
        for way in ("eager", "compiled", "gelu", "all together")
        for cameras in (1, 4)
        for batch in (2, 4)
    ]
    for row, eager in zip(rows, rows[:4] * 4, strict=True):
        assert row["rounds"] == 3
        assert min(row["over_eager"], row["over_compiled"]) > 0
        assert ("hidden_error" in row) == (row["way"] != "all together")
        for name in ("keys_error", "values_error", "hidden_error"):
            assert 0 < row.get(name, eager[name]) < 1.02 * eager[name]
