"""`alpacache prepare`: what it chooses is what `extract` chooses, and what it writes `extract` takes."""

import json
from functools import partial

import numpy as np
import pytest
from datasets import load_from_disk

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.extract import extract
from alpacache.sources.synthetic import SyntheticSource
from benchmarks.pai_tree import write_tree
from cache_store import CacheReader

pytestmark = pytest.mark.system  # whole commands

FRONT = "camera_front_wide_120fov"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("prepare") / "Tiny-R1")


@pytest.fixture
def run(run_here):
    return partial(run_here, "prepare")


def extracted(source, model, store, **options):
    config = ExtractConfig(source=str(source), model=str(model), store=str(store), frames=1, device="cpu", **options)
    return extract(config), sorted(CacheReader(store).sample_ids)


@pytest.mark.parametrize(
    ("t0", "moments"), [("events", [3_000_000]), ("every:2.0", [2_000_000, 4_000_000]), ("2.5", [2_500_000])]
)
def test_prepare_and_extract_choose_the_same_moments(model, tmp_path, t0, moments, run):
    """Of PhysicalAI-AV, whose index knows events; the last one of each clip is too late for a sample."""
    pytest.importorskip("physical_ai_av")
    drives = SyntheticSource(2, seed=6, size=(64, 32))
    write_tree(tmp_path / "tree", source=drives, cameras=[FRONT])
    source = f"pai:{tmp_path / 'tree'}"
    run(source, "--out", tmp_path / "samples", "--t0", t0, "--frames", 1)
    prepared = sorted(load_from_disk(str(tmp_path / "samples"))["sample_id"])
    assert prepared == sorted(f"{clip_id}@{moment}#0" for clip_id in drives.clip_ids for moment in moments)
    assert extracted(source, model, tmp_path / "direct", t0=t0)[1] == prepared
    assert extracted(tmp_path / "samples", model, tmp_path / "through")[1] == prepared


def test_extract_takes_the_same_from_recordings_rows_and_a_stream_of_rows(model, tmp_path, run):
    """The KV is equal bit for bit: at original size nothing is lost on the way."""
    run("synthetic:3", "--out", tmp_path / "samples", "--frames", 1)
    (tmp_path / "repository").mkdir()
    load_from_disk(str(tmp_path / "samples")).to_parquet(str(tmp_path / "repository/train.parquet"))
    stores = []
    for number, source in enumerate(("synthetic:3", tmp_path / "samples", f"hf:{tmp_path / 'repository'}")):
        report, names = extracted(source, model, tmp_path / f"store{number}", deterministic=True)
        assert (report.extracted, len(names)) == (3, 3)
        reader = CacheReader(tmp_path / f"store{number}")
        stores.append({name: reader.read(name, fields=["kv", "future_xyz"]) for name in names})
    for name, wanted in stores[0].items():
        for other in stores[1:]:
            for field, values in wanted.items():
                np.testing.assert_array_equal(other[name][field], values)


def test_quota_seed_and_processor_size(model, tmp_path, run):
    out = tmp_path / "samples"
    arguments = ("synthetic:30", "--frames", 1, "--seed", 4, "--quota", "straight=3,gentle=2,sharp=99", "--json")
    done = run(*arguments, "--size", "processor", "--out", out)
    report = json.loads(done.stdout)
    strata = report["provenance"]["strata"]
    assert (strata["straight"], strata["gentle"]) == (3, 2)
    assert 0 < strata["sharp"] < 99
    assert f"note: {strata['sharp']} of 99 sharp samples: the source has no more" in done.stderr
    assert report["samples"] == strata["all"] == 5 + strata["sharp"]
    settings = report["provenance"]["settings"]
    assert (settings["seed"], settings["quota"]) == (4, "straight=3,gentle=2,sharp=99")
    assert settings["fit"] == {"patch": 16, "merge": 2, "min_pixels": 163_840, "max_pixels": 196_608}
    assert 0 < report["provenance"]["pixel_deviation"]["mean"] < report["provenance"]["pixel_deviation"]["max"]
    small = json.loads(run(*arguments, "--size", "processor", "--model", model, "--out", tmp_path / "tiny").stdout)
    assert small["provenance"]["settings"]["fit"]["max_pixels"] == 128 * 256
    assert small["provenance"]["pixel_deviation"] == {"max": 0.0, "mean": 0.0}  # they have that size already


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quota", "left=3"], "expected such as straight=200"),
        (["--quota", "sharp=3", "--samples", "3"], "leave samples out"),
        (["--size", "small"], "size is 'small'; expected 'original' or 'processor'"),
        (["--model", "x"], "--size processor only"),
        (["--split", "test"], "split is 'test'; expected 'train', 'val' or 'all'"),
        (["--frames", "0"], "frames is 0; expected 1, 2, 3 or 4."),
        (["--frames", "5"], "frames is 5; expected 1, 2, 3 or 4."),
    ],
)
def test_bad_usage_is_exit_2_and_nothing_is_written(arguments, said, tmp_path, run):
    done = run("synthetic:3", "--out", tmp_path / "out", *arguments, code=2)
    assert said in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []
