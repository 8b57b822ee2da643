import errno
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cache_store import (
    CacheReader,
    CacheWriter,
    CorruptSampleError,
    Field,
    StoreFullError,
    UnreadableSampleError,
    build_index,
)
from cache_store.format import index
from cache_store.format.index import SampleIds
from cache_store.storage.local_storage import LocalStorage


def settle(store: Path) -> None:
    then = time.time() - 10
    os.utime(store / "commits", (then, then))


def test_a_fresh_index_spares_listing_and_reading_records(store, kit, monkeypatch) -> None:
    settle(store)
    assert build_index(store) == 2
    monkeypatch.setattr(index, "list_ids", None)
    reader = CacheReader(store)
    assert reader.sample_ids == ("clip/1@5#0", "clip/2@5#0")
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))


def test_a_stale_index_is_noticed_and_spares_only_the_reading_of_known_records(store, kit, monkeypatch) -> None:
    settle(store)
    build_index(store)
    with kit.writer(store) as writer:
        writer.write("new", kit.sample(5))
    next((store / "commits").glob("clip_2*")).unlink()
    read = []
    real = index.commit_record.read
    monkeypatch.setattr(
        index.commit_record,
        "read",
        lambda storage, root, key, **how: read.append(key[:3]) or real(storage, root, key, **how),
    )
    reader = CacheReader(store)
    assert reader.sample_ids == ("clip/1@5#0", "new")
    assert read == ["new"]
    kit.assert_equal(reader.read("new"), kit.sample(5))


def test_an_index_made_while_commits_change_is_never_fresh(store, monkeypatch) -> None:
    monkeypatch.setattr(index.time, "sleep", lambda seconds: None)
    build_index(store)
    loaded = index.read(LocalStorage(store))
    assert loaded is not None
    assert (loaded.listed_ns, loaded.is_fresh(LocalStorage(store))) == (0, False)
    monkeypatch.undo()
    started = time.monotonic()
    build_index(store)
    assert time.monotonic() - started < 3
    loaded = index.read(LocalStorage(store))
    assert loaded is not None
    assert loaded.is_fresh(LocalStorage(store))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "link"])
def test_a_damaged_index_is_as_none(store, damage) -> None:
    settle(store)
    build_index(store)
    path = store / "index"
    data = path.read_bytes()
    if damage == "link":
        path.rename(store.parent / "elsewhere")
        path.symlink_to(store.parent / "elsewhere")
    else:
        path.write_bytes({"flip": data[:-1] + b"!", "cut": data[:-1], "empty": b"", "text": b"x" * 500}[damage])
    assert index.read(LocalStorage(store)) is None
    assert CacheReader(store).sample_ids == ("clip/1@5#0", "clip/2@5#0")


def test_an_index_takes_the_memory_of_its_size_and_not_of_its_limit(store) -> None:
    settle(store)
    build_index(store)
    tracemalloc.start()
    loaded = index.read(LocalStorage(store))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded is not None
    assert peak < 2**20 < index.MAX_BYTES


def test_a_full_disk_is_named(store, monkeypatch) -> None:
    settle(store)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalStorage, "put", full)
    with pytest.raises(StoreFullError, match=r"cannot write the index to .*: the disk is full"):
        build_index(store)


def test_the_record_is_the_truth(store) -> None:
    settle(store)
    build_index(store)
    record = next((store / "commits").glob("clip_1*"))
    record.write_bytes(record.read_bytes().replace(b"clip/1", b"clip/7"))
    reader = CacheReader(store)
    with pytest.raises(CorruptSampleError, match="does not match its own checksum"):
        reader.read("clip/1@5#0")
    record.unlink()
    with pytest.raises(UnreadableSampleError, match="was removed"):
        reader.read("clip/1@5#0")


def test_ids_are_a_sorted_sequence(tmp_path) -> None:
    names = ["b", "ä", "前", "a", "aa", "🚗", "a"]
    ids = SampleIds.of(names)
    assert list(ids) == sorted(set(names)) == list(ids[:]) == [ids[i] for i in range(-6, 0)]
    assert (len(ids), "ä" in ids, "c" in ids, 3 in ids, "\udc80" in ids) == (6, True, False, False, False)
    assert ids == tuple(sorted(set(names)))
    assert ids != ("a",)
    assert SampleIds.of([]) == ()
    with pytest.raises(IndexError):
        ids[6]


def test_records_are_kept_within_bounds(store, monkeypatch) -> None:
    monkeypatch.setattr("cache_store.reader._MAX_RECORDS", 1)
    reader = CacheReader(store)
    for sample_id in [*reader.sample_ids, *reader.sample_ids]:
        assert reader.record(sample_id).sample_id == sample_id
    assert len(reader._records) == 1


def simulate_large_store(path: Path, count: int) -> None:
    """A store whose index names `count` samples; its records were never written, as opening does not need them."""
    with CacheWriter(path, fields=[Field(name="x", dtype="int8")], identity={}):
        pass
    ids = SampleIds.of(f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}-1e2f-4a5b@{5_100_000 + i}#0" for i in range(count))
    settle(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "list_ids", lambda *_: (ids, ()))
        build_index(path)


@pytest.mark.system
@pytest.mark.ci
def test_a_million_samples_take_a_hundred_bytes_each(tmp_path) -> None:
    simulate_large_store(tmp_path / "s", 1_000_000)
    tracemalloc.start()
    reader = CacheReader(tmp_path / "s")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(reader) == 1_000_000
    assert reader.sample_ids[500_000] in reader
    assert held <= 100 * len(reader)
    assert len(np.unique([len(reader.sample_ids[i]) for i in range(100)])) == 1
