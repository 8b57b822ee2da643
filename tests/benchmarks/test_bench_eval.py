"""What the cached evaluation is compared with computes the same velocity, and ratios are of the same cameras."""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_eval  # noqa: E402
import full_size  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def test_stock_attention_over_a_repeated_cache_is_the_same_velocity(tmp_path):
    checkpoint = full_size.write_checkpoint(tmp_path / "model", small=True)
    sizes = {"samples": 1, "shortest": 72, "longest": 80}
    full_size.write_store(tmp_path / "store", checkpoint, cameras=1, codec="bf16", **sizes)
    prefix = CachedDataset([tmp_path / "store"], Checkpoint(str(checkpoint))).load(0).prefix
    cache = DynamicCache()
    for layer in range(4):
        cache.update(prefix.keys[None, layer].float(), prefix.values[None, layer].float(), layer)
    cache.batch_repeat_interleave(bench_eval.PATHS)
    ours, stock = (
        load_expert(str(checkpoint), dtype=torch.float32, attention=attention).eval()
        for attention in ("prefix", "sdpa")
    )
    x, t = torch.randn(bench_eval.PATHS, 64, 2), torch.full((bench_eval.PATHS,), 0.3)
    velocity = bench_eval.stock_velocity(
        stock, cache, length=prefix.prefix_len, start=prefix.start_position, paths=bench_eval.PATHS
    )
    with torch.no_grad():
        expected = ours.velocity(x[None], t[None], [prefix])[0]
        for _ in range(2):  # the cache is as before after each
            assert float((velocity(x, t) - expected).norm() / expected.norm()) < 1e-5


def test_ratios_are_to_the_public_evaluation_of_the_same_cameras():
    public = [
        {"cameras": cameras, "reasoning_tokens": tokens, "samples_s": rate}
        for cameras, tokens, rate in ((4, 0, 2.0), (4, 20, 1.0), (1, 0, 4.0), (1, 20, 2.5))
    ]
    row = bench_eval.over_public({"cameras": 1, "samples_s": 100.0}, public)
    assert (row["over_public"], row["over_public_reasoning"]) == (25.0, 40.0)
    assert bench_eval.over_public({"cameras": 4, "note": "failed"}, public) == {"cameras": 4, "note": "failed"}


@pytest.mark.slow
def test_the_quick_benchmark(quick, tmp_path):
    rows = quick("bench_eval.py", cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert [(row["case"], row["codec"], row["reasoning_tokens"]) for row in rows] == [
        *(("public", None, tokens) for tokens in (0, 20)),
        *(("cached", codec, None) for codec in ("int8", "bf16")),
    ]
    for row in rows:
        assert (row["cameras"], row["paths"], row["flow_steps"], row["captured"]) == (1, 6, 10, False)
        assert row["samples_s"] * row["ms_sample"] == pytest.approx(1000)
    for row in rows[2:]:
        assert row["samples"] == 4
        assert row["over_public"] == pytest.approx(row["samples_s"] / rows[0]["samples_s"])
