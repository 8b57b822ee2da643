"""A store that cannot fit is refused before anything is written."""

import re

import pytest

import alpacache
from alpacache import disk_room
from alpacache.config import ExtractConfig
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.synthetic import SyntheticSource
from cache_store import CacheReader, info


@pytest.fixture
def settings(tiny_checkpoint, tmp_path):
    return {
        "source": "synthetic:4",
        "model": str(tiny_checkpoint),
        "store": str(tmp_path / "store"),
        "frames": 1,
        "device": "cpu",
    }


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_what_cannot_fit_is_refused_with_needed_and_free(codec, settings, tmp_path, monkeypatch):
    settings |= {"codec": codec}
    alpacache.extract(ExtractConfig(**settings | {"store": str(tmp_path / "other"), "samples": 1}))
    one = info(tmp_path / "other").size_bytes
    free = round(3.9 * one)
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: free)
    with pytest.raises(UsageError, match=rf"4 samples of .* need .* bytes, {free:,} are free") as caught:
        alpacache.extract(ExtractConfig(**settings))
    found = int(re.search(r"need ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    assert found == pytest.approx(4 * one, rel=0.01)
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: 4 * one)
    assert alpacache.extract(ExtractConfig(**settings)).extracted == 4


def test_only_what_is_missing_of_this_share_counts(settings, monkeypatch):
    alpacache.extract(ExtractConfig(**settings, samples=3))
    one = info(settings["store"]).size_bytes // 3
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: round(1.5 * one))
    assert alpacache.extract(ExtractConfig(**settings)).extracted == 1
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: round(2.5 * one))
    more = settings | {"source": "synthetic:8"}
    with pytest.raises(UsageError, match="4 samples of"):
        alpacache.extract(ExtractConfig(**more))
    assert alpacache.extract(ExtractConfig(**more, shard=(1, 2))).extracted == 2
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: 0)
    assert alpacache.extract(ExtractConfig(**more, force=True)).extracted == 2
    assert alpacache.extract(ExtractConfig(**more)).already_there == 8


def test_a_first_clip_that_cannot_be_read_does_not_hide_the_size(settings, monkeypatch):
    good = SyntheticSource.load

    def load(self, ref, **wanted):
        if ref.clip_id.endswith("0"):
            raise BadClipError("undecodable_video", f"{ref.clip_id}: no video.")
        return good(self, ref, **wanted)

    monkeypatch.setattr(SyntheticSource, "load", load)
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: 1000)
    with pytest.raises(UsageError, match="need"):
        alpacache.extract(ExtractConfig(**settings))
    monkeypatch.undo()
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: 10**12)
    assert alpacache.extract(ExtractConfig(**settings)).extracted == 4
    assert len(CacheReader(settings["store"])) == 4
