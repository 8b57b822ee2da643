"""What the extraction benchmark reads is what `extract` reads, and its rates are samples a second."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from alpacache.driving.cameras import CAMERAS
from alpacache.extraction.config import ExtractConfig
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_extract  # noqa: E402
import bench_extract_scaling  # noqa: E402
import full_size  # noqa: E402

sys.path.remove(str(BENCHMARKS))

NAMES = CAMERAS[:2]


@pytest.fixture(scope="module", params=["tree", "folder"])
def drives(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("drives") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        if request.param == "folder":
            patch.setattr(bench_extract.importlib.util, "find_spec", lambda module: None)
        return bench_extract.write_drives(root, bench_extract.QUICK, NAMES)


@pytest.mark.system
def test_drives_give_samples_of_different_pictures(drives):
    assert drives.partition(":")[0] in ("pai", "folder")
    source = open_source(drives, cameras=NAMES)
    refs, rejected = select(source, t0=bench_extract.T0, samples=48)
    # A folder's film is longer than a tree's.
    assert (len(refs), rejected) == (bench_extract.MOMENTS if drives.startswith("pai") else 48, [])
    one, other = (source.load(ref, cameras=NAMES, frames=4) for ref in refs[:2])  # 0.15 s apart
    assert one.frames.shape == (2, 4, 3, 108, 192)
    assert np.abs(one.frames.astype(int) - other.frames).mean() > 0.5


@pytest.mark.system
@pytest.mark.parametrize("family", ["r1", "2"])
def test_the_tokenizer_keeps_image_tokens(family, tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "_expert_state", lambda small, family: {"vlm.placeholder": torch.zeros(1)})
    checkpoint = full_size.write_checkpoint(tmp_path / "model", small=True, family=family)
    config = ExtractConfig(source="synthetic:2", model=str(checkpoint), store="store", samples=2, workers=1)
    with bench_extract.begun_reading(config, torch.device("cpu")) as (_, inputs, rate):
        assert rate > 0
    for one in inputs:
        merged = int(one.image_grid_thw.prod(-1).sum()) // 4
        assert int((np.diff(one.image_spans)).sum()) == merged
        assert merged < len(one.input_ids) < merged + 80


def test_write_rate_is_in_files_a_second(tmp_path):
    rate = bench_extract.write_rate(tmp_path / "raw", 100_000, writers=2)
    assert 1 < rate < 1e5
    assert not (tmp_path / "raw").exists()


@pytest.mark.slow
def test_the_quick_benchmark(quick):
    rows = quick("bench_extract.py")
    assert [(row["cameras"], row["codec"]) for row in rows] == [
        (cameras, codec) for cameras in (1, 4) for codec in (None, "int8", "bf16", "int8")
    ]
    for row in rows:
        assert (row["batch"], row["source"]) == (1 if row["note"] else 2, "pai")
        if row["note"]:
            assert (row["note"], row["same_bytes"]) == ("--deterministic", True)
        elif row["codec"]:
            limit = min(row["prefill_s"], row["write_s"], row["decode_s"])
            assert row["of_limit"] == pytest.approx(row["samples_s"] / limit)
        else:
            assert 0 <= row["neighbour_error"] < 0.03


def test_scaling_counts_while_all_processes_are_at_work():
    # One begins at 0 and ends at 10, the other begins at 4 and ends at 14: between 4 and 10 both commit one a second.
    one, other = list(range(11)), list(range(4, 15))
    assert bench_extract_scaling.rate_together([one, other], ahead=0) == pytest.approx(2, rel=0.1)
    assert bench_extract_scaling.rate_together([one], ahead=0) == pytest.approx(1)
    assert bench_extract_scaling.rate_together([[0.0, 1.0], [2.0, 3.0]], ahead=0) is None
    assert bench_extract_scaling.rate_together([[1.0], [1.0]], ahead=0) is None


def test_what_was_read_ahead_does_not_count():
    # Three are there at once, and the last three come as fast as the others were ahead of them.
    moments = [0.0, 0.01, 0.02, 1.0, 2.0, 3.0, 4.0, 5.0, 5.01, 5.02]
    assert bench_extract_scaling.rate_together([moments], ahead=2) == pytest.approx(1, rel=0.01)
    assert bench_extract_scaling.rate_together([moments], ahead=0) > 1.2


@pytest.mark.slow
def test_the_quick_scaling_benchmark(quick):
    one, two = quick("bench_extract_scaling.py")
    assert [(row["gpus"], row["samples"]) for row in (one, two)] == [(1, 6), (2, 12)]
    assert all(row["decode_s"] > 0 and row["workers"] == 2 * row["gpus"] for row in (one, two))
    if one["samples_s"] and two["samples_s"]:  # so few samples have no rate where the processes do not overlap
        assert two["efficiency"] == pytest.approx(two["samples_s"] / one["samples_s"] / 2)
        assert one["of_decoding"] == pytest.approx(one["samples_s"] / one["decode_s"])
    else:
        assert two["efficiency"] is None
