import pytest

from cache_store import CacheReader, FormatError, StoreNotFoundError, verify


def test_a_sound_store(store) -> None:
    reader = CacheReader(store)
    report = verify(store, deep=True)
    assert report.ok
    assert report.samples == 2
    assert report.size_bytes == sum(reader.size_bytes(item) for item in reader.sample_ids)
    assert (report.damaged, report.orphans, report.stale_temporaries, report.quarantined) == ((), (), 0, 0)
    assert report.deep
    assert not verify(store).deep


def test_it_lists_all_damage_and_what_is_left_over(store, kit) -> None:
    one, two = (store / CacheReader(store).record(item).folder for item in ("clip/1@5#0", "clip/2@5#0"))
    (one / "kv" / "c.0.0.0.0.0").unlink()
    (two / "hidden" / "c.0.0").write_bytes(b"short")
    (two / "small" / "zarr.json").unlink()
    (store / "samples" / "killed-writer.0123456789abcdef").mkdir()
    (store / "staging" / "temporary").write_bytes(b"")
    with kit.writer(store) as writer:
        writer.quarantine("bad", "short_clip", "3 s", "")
        writer.quarantine("worse", "short_clip", "2 s", "")
    (broken,) = (path for path in (store / "quarantine").iterdir() if path.name.startswith("worse"))
    broken.write_bytes(b"{}")
    (store / "samples" / "zarr.json").write_bytes(b"{}")
    report = verify(store)
    assert not report.ok
    assert [(item.sample_id, item.field, item.what) for item in report.damaged[1:4]] == [
        ("clip/1@5#0", "kv", "is missing."),
        ("clip/2@5#0", "", "is missing."),
        ("clip/2@5#0", "hidden", "has 5 bytes, expected 136."),
    ]
    assert [item.object for item in report.damaged[::4]] == ["samples/zarr.json", f"quarantine/{broken.name}"]
    assert (report.orphans, report.stale_temporaries) == (("killed-writer.0123456789abcdef",), 1)
    assert report.quarantined == 1


def test_damage_that_keeps_its_size_needs_deep(store) -> None:
    path = store / CacheReader(store).record("clip/1@5#0").folder / "hidden" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert verify(store).ok
    (damage,) = verify(store, deep=True).damaged
    assert (damage.sample_id, damage.field) == ("clip/1@5#0", "hidden")


def test_no_store_and_a_damaged_root(store, tmp_path) -> None:
    with pytest.raises(StoreNotFoundError):
        verify(tmp_path)
    (store / "zarr.json").write_text("{}")
    with pytest.raises(FormatError, match="not the root of a store"):
        verify(store)
