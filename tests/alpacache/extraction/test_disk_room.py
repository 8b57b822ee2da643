"""A store that cannot fit is refused before anything is written."""

import re

import pytest

import alpacache
from alpacache.errors import BadClipError, UsageError
from alpacache.extraction import disk_room
from alpacache.extraction.config import ExtractConfig
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource
from cache_store import CacheReader, info

pytestmark = pytest.mark.system


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


def test_rollouts_count_at_their_longest(settings, tmp_path, monkeypatch):
    """What is needed bounds what is then written, and is not far above it where texts run to their end."""
    settings |= {"reasoning": "rollout", "rollouts": 2, "samples": 1}
    alpacache.extract(ExtractConfig(**settings | {"store": str(tmp_path / "other")}))
    reader, written = CacheReader(tmp_path / "other"), info(tmp_path / "other").size_bytes
    stored = reader.read(reader.sample_ids[0])
    spare = sum(257 - len(stored[f"tail.{number}.input_ids"]) + 24 for number in range(2))
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: 1000)
    message = r"\(at most: 2 reasoning rollouts of 256 tokens\) need .* fewer --rollouts"
    with pytest.raises(UsageError, match=message) as caught:
        alpacache.extract(ExtractConfig(**settings))
    needed = int(re.search(r"need ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    a_token = 4 * 2 * 2 * 32 * 2
    assert written <= needed <= written + spare * (a_token + 8) + 2 * 8 * 256 + 1000
    assert needed > info_without_tails(written, stored) + 2 * 255 * a_token
    alpacache.extract(ExtractConfig(**settings, force=True))
    assert len(CacheReader(settings["store"])) == 1


def info_without_tails(size_bytes, stored):
    """Bytes of a store of one sample but for what its rollouts take."""
    return size_bytes - sum(stored[f"tail.{number}.kv"].nbytes for number in range(2))


def test_each_view_needs_room(settings, monkeypatch):
    alpacache.extract(ExtractConfig(**settings, views=2, samples=1))
    one = info(settings["store"]).size_bytes // 2
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: round(5.5 * one))
    with pytest.raises(UsageError, match="6 samples of"):
        alpacache.extract(ExtractConfig(**settings, views=2))


def test_views_of_a_prepared_dataset_need_room_too(settings, tmp_path, monkeypatch):
    """It holds the pictures as they are only, and the size of a view is known from them."""
    source = open_source("synthetic:2")
    prepare(source, select(source)[0], tmp_path / "samples", cameras=source.cameras, frames=1)
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: 1000)
    with pytest.raises(UsageError, match="2 samples of"):
        alpacache.extract(ExtractConfig(**settings | {"source": str(tmp_path / "samples")}, views=2, shard=(1, 2)))


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
