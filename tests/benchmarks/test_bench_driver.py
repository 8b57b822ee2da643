"""Ratios are to the public path of the same kind of call, and the quick benchmark runs every case."""

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_driver  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def test_ratios_are_to_the_public_path_of_the_same_call():
    public = [
        {"case": "public", "cameras": cameras, "flow_steps": steps, "paths": 1, **times}
        for cameras, steps, times in (
            (1, 10, {"p50_ms": 400.0, "prefill_ms": 90.0, "flow_ms": 280.0}),
            (4, 10, {"p50_ms": 800.0, "prefill_ms": 200.0, "flow_ms": 300.0}),
        )
    ]
    row = {"case": "driver", "cameras": 4, "flow_steps": 10, "paths": 1, "p50_ms": 200.0}
    found = bench_driver.over_public(row, public)
    assert (found["of_public"], found["of_public_without_pictures"]) == (0.25, 0.4)
    assert bench_driver.over_public(row | {"flow_steps": 2}, public) == row | {"flow_steps": 2}
    assert bench_driver.over_public(public[0], public) == public[0]


def test_a_recording_is_one_that_a_driver_takes():
    made = bench_driver.recording(bench_driver.QUICK, 4)
    assert made.frames.shape == (4, 4, 320, 576, 3)
    assert made.times_us[-1] == made.pose_times_us[-1] == bench_driver.T0_US
    assert made.poses[-2, 0] == pytest.approx(-0.5)


@pytest.mark.slow
def test_the_quick_benchmark(quick, tmp_path):
    rows = quick("bench_driver.py", cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert [(row["case"], row["flow_steps"]) for row in rows] == [
        *(("public", steps) for steps in (10, 4, 2)),
        *(("driver", steps) for steps in (10, 4, 2)),
        ("streamed", 10),
    ]
    for row in rows:
        assert row["note"] is None
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert (row["of_public"] is None) == (row["case"] == "public")
