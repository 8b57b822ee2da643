"""The how-to on adding a source, followed step by step: its module, its line, then the commands on its drives."""

import json
import runpy

import numpy as np
import pytest
from markdown_pages import ROOT, blocks

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, DataError, UsageError
from alpacache.sources import registry
from alpacache.sources.source import EventSource, FixedSource, RecordedSource
from alpacache.sources.synthetic import SyntheticSource
from cache_store import CacheReader
from cli.main import app

pytestmark = pytest.mark.system

PAGE = ROOT / "docs/how-to/add-a-source.md"
REF = SampleRef(clip_id="synthetic-0-000001", t0_us=5_100_000)


@pytest.fixture
def npz(tmp_path, monkeypatch, capsys):
    """The page's module, run where it may write its drives, and registered."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "npz.py").write_text(blocks(PAGE, "python")[0].code)
    (tmp_path / "drives").mkdir()  # as when a reader runs it again
    module = runpy.run_path("npz.py", run_name="__main__")
    assert capsys.readouterr().out.startswith("12 [] synthetic-0-000000@2000000#0 ")
    monkeypatch.setitem(registry.KINDS, "npz", module["KIND"])
    return module


def test_the_line_to_change_is_there():
    module = (ROOT / "alpacache/sources/registry.py").read_text().splitlines()
    diff = blocks(PAGE, "diff")[0].code.splitlines()
    assert [line[1:] for line in diff if line.startswith("-") and line[1:] not in module] == []


@pytest.mark.ci
def test_samples_are_those_that_were_written(npz):
    source = registry.open_source("npz:drives")
    assert isinstance(source, RecordedSource)
    assert not isinstance(source, EventSource | FixedSource)
    drives = SyntheticSource(2)
    ours, theirs = (each.load(REF, cameras=[FRONT_CAMERA], frames=4) for each in (source, drives))
    np.testing.assert_array_equal(ours.future_xyz, theirs.future_xyz)
    np.testing.assert_array_equal(ours.frames, theirs.frames)
    with pytest.raises(UsageError, match="npz:DIR"):
        registry.open_source("npz:")


@pytest.mark.ci
def test_bad_clips_and_a_source_that_has_gone_are_told_apart(npz, tmp_path):
    source = registry.open_source("npz:drives")
    (tmp_path / "drives" / f"{REF.clip_id}.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(BadClipError, match="cannot be read"):
        source.load(REF, cameras=[FRONT_CAMERA], frames=4)
    with pytest.raises(BadClipError, match="leave it out with --cameras"):
        source.frame_times_us("synthetic-0-000000", "camera_front_tele_30fov")
    registry.check_still_there("npz:drives", kept="")
    (tmp_path / "drives").rename(tmp_path / "away")
    with pytest.raises(DataError, match="is not any more"):
        registry.check_still_there("npz:drives", kept="")


def test_the_commands_take_it(npz, tmp_path, capsys):
    app(["check", "npz:drives", "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert {check["name"]: check["status"] for check in report["checks"]} == dict.fromkeys(
        (check["name"] for check in report["checks"]), "ok"
    )
    make_tiny_checkpoint(tmp_path / "tiny")
    options = ["--model", "tiny", "--store", "cache", "--frames", "1", "--device", "cpu"]
    app(["extract", "npz:drives", *options], standalone_mode=False)
    assert REF.sample_id in CacheReader(tmp_path / "cache").sample_ids
