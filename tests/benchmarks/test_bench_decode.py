"""The decoding benchmark reads films as extraction does, and a pass decodes fewer frames than samples alone."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("av")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_decode


@pytest.mark.system
def test_a_pass_decodes_fewer_frames_than_samples_alone(tmp_path):
    source = bench_decode.write_clip(tmp_path, bench_decode.QUICK, 12, 250)
    one, many = (bench_decode.measure(source, bench_decode.QUICK, 12, moments) for moments in (1, 10))
    assert one["alone_decoded"] == one["one_pass_decoded"]
    assert many["one_pass_decoded"] < 0.3 * many["alone_decoded"]
    assert many["of_alone"] == many["one_pass_ms"] / many["alone_ms"]


@pytest.mark.ci
def test_the_quick_run(quick):
    rows = quick("bench_decode.py")
    assert [row["t0s"] for row in rows] == [1, 10]
