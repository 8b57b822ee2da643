import dataclasses
import json
import time

import pytest

from alpacache.errors import DataError, UsageError
from alpacache.sources import registry
from alpacache.sources.registry import KINDS, check_still_there, is_streamed, open_source
from alpacache.sources.source import EventSource, FixedSource, GroupedSource, RecordedSource
from alpacache.sources.synthetic import SyntheticSource


@pytest.mark.parametrize(
    "spec", ["", "nonsense", "folder:", "folder", "synthetic", "pai:", "hf:", "hf", "zip:x", "/no/such/dir"]
)
def test_unknown_sources_name_the_known_kinds(spec):
    with pytest.raises(UsageError, match=r"folder:DIR, synthetic:N, pai, pai:DIR, hf:REPO-OR-PATH, or a directory"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["synthetic:", "synthetic:many", "synthetic:-3", "synthetic:²"])
def test_synthetic_wants_a_number(spec):
    with pytest.raises(UsageError, match="synthetic:N"):
        open_source(spec)


def test_folder_spec_opens_and_a_bare_directory_gets_a_hint(folder, tmp_path):
    assert open_source(f"folder:{folder}").name == "folder:circles"
    with pytest.raises(UsageError, match=rf"a directory that folder:DIR reads; write folder:{folder}"):
        open_source(str(folder))
    (tmp_path / "features.csv").touch()
    with pytest.raises(UsageError, match=rf"a directory that pai:DIR reads; write pai:{tmp_path}"):
        open_source(str(tmp_path))


def test_a_new_kind_is_one_entry(monkeypatch):
    opened = []
    kind = dataclasses.replace(
        KINDS["synthetic"],
        prefix="toy",
        usage=("toy:COLOUR",),
        open=lambda place, cameras: opened.append((place, cameras)) or SyntheticSource(1),
        is_streamed=lambda place: place == "far",
    )
    monkeypatch.setitem(registry.KINDS, "toy", kind)
    assert open_source("toy:red", cameras=["camera_front_wide_120fov"]).clip_ids == ["synthetic-0-000000"]
    assert opened == [("red", ["camera_front_wide_120fov"])]
    assert [is_streamed(spec) for spec in ("toy:far", "toy:red")] == [True, False]
    with pytest.raises(UsageError, match="hf:REPO-OR-PATH, toy:COLOUR, or a directory"):
        open_source("toy:")


def test_what_comes_through_the_network(folder):
    streamed = {"pai": True, "pai:tree": False, "hf:who/what": True, f"hf:{folder}": False, "synthetic:2": False}
    assert {spec: is_streamed(spec) for spec in streamed} == streamed


def test_what_each_kind_offers():
    drives = open_source("synthetic:1")
    offers = (RecordedSource, FixedSource, EventSource, GroupedSource)
    assert {protocol for protocol in offers if isinstance(drives, protocol)} == {RecordedSource, EventSource}


@pytest.fixture
def places(folder, tmp_path):
    """A spec and the directory behind it, of each kind that may vanish."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "features.csv").write_text("feature\n")
    for name in ("saved", "splits"):
        (tmp_path / name).mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({}))
    (tmp_path / "splits" / "dataset_dict.json").write_text(json.dumps({}))
    return {
        f"folder:{folder}": folder,
        f"pai:{tmp_path / 'tree'}": tmp_path / "tree",
        f"hf:{tmp_path / 'saved'}": tmp_path / "saved",
        f"hf:{tmp_path / 'splits'}": tmp_path / "splits",
        str(tmp_path / "saved"): tmp_path / "saved",
    }


def test_a_source_that_has_gone_is_told_from_one_that_is_there(places, tmp_path):
    for spec, directory in places.items():
        check_still_there(spec, kept="All is kept.")
        directory.rename(tmp_path / "away")
        with pytest.raises(DataError) as error:
            check_still_there(spec, kept="All is kept.")
        assert str(error.value).startswith(f"{spec} was there when the run began and is not any more (")
        assert str(error.value).endswith(" All is kept.")
        (tmp_path / "away").rename(directory)
    for spec in ("synthetic:3", "pai", "hf:who/what"):  # generated, or told by their own readers
        check_still_there(spec, kept="")


def test_looking_whether_a_source_is_there_opens_none_of_them(places, monkeypatch):
    def refuse(place, cameras):
        raise AssertionError("the source was opened again")

    for prefix, kind in KINDS.items():
        monkeypatch.setitem(registry.KINDS, prefix, dataclasses.replace(kind, open=refuse))
    started = time.process_time()
    for spec in places:
        for _ in range(200):
            check_still_there(spec, kept="")
    assert time.process_time() - started < 1.0  # 1,000 bad clips


def test_a_mistyped_kind_is_told_the_nearest():
    with pytest.raises(UsageError, match=r"'fodler:drives' is no data source. Did you mean folder:drives\?"):
        open_source("fodler:drives")
    with pytest.raises(UsageError, match="expected folder:DIR"):
        open_source("nothing-like-it:drives")
