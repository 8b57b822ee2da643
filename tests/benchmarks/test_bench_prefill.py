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
