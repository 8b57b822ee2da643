import os
import shutil
import time

import pytest

from cache_store import CacheReader, CacheStoreError, CacheWriter, collect_garbage, verify
from cache_store.storage.local_storage import LocalStorage
from cache_store.writer import CacheWriter as Writer


def age(path, seconds: float) -> None:
    then = time.time() - seconds
    for item in [path, *path.rglob("*")]:
        os.utime(item, (then, then))


def test_only_old_attempts_without_a_record_and_old_temporaries_go(store, kit, monkeypatch) -> None:
    monkeypatch.setattr(LocalStorage, "extent", lambda self, name: (7, (self.root / name).stat().st_mtime))
    reader = CacheReader(store)
    kept = store / reader.record("clip/1@5#0").folder
    old, young = (kept.with_name(f"{kept.stem}.{digit * 16}") for digit in "ab")
    for folder in (old, young):
        shutil.copytree(kept, folder)
    for name in ("1" * 32, "2" * 32):
        (store / "staging" / name).write_bytes(b"x" * 5)
    for item in (old, kept, store / "staging" / ("1" * 32)):
        age(item, 100)
    dry = collect_garbage(store, min_age_s=50, dry_run=True)
    assert (dry.attempts, dry.temporaries, dry.kept_young) == ((old.name,), 1, 2)
    assert old.exists()
    report = collect_garbage(store, min_age_s=50)
    assert (report.attempts, report.temporaries, report.size_bytes, report.kept_young) == ((old.name,), 1, 14, 2)
    assert (old.exists(), young.exists(), kept.exists()) == (False, True, True)
    assert verify(store, deep=True).ok
    assert verify(store).orphans == (young.name,)
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))


def test_sizes_and_a_fresh_attempt_is_young(store) -> None:
    kept = store / CacheReader(store).record("clip/1@5#0").folder
    shutil.copytree(kept, kept.with_name(f"{kept.stem}.{'a' * 16}"))
    assert collect_garbage(store).kept_young == 1
    size = CacheReader(store).size_bytes("clip/1@5#0")
    assert collect_garbage(store, min_age_s=-1).size_bytes == size
    assert verify(store).orphans == ()


def test_a_sample_committed_at_the_last_moment_is_moved_back(store, kit) -> None:
    reader = CacheReader(store)
    group = store / reader.record("clip/1@5#0").folder
    group.rename(store / "staging" / f"garbage.{group.name}")  # as a killed collector leaves it
    (store / "staging" / "garbage.nothing").mkdir()
    assert collect_garbage(store, min_age_s=1000).attempts == ()
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))
    assert list((store / "staging").iterdir()) == []


def test_a_writer_whose_attempt_was_collected_fails_and_leaves_no_record(store, kit, monkeypatch) -> None:
    publish = Writer._publish

    def collected(self, record, data):
        assert collect_garbage(store, min_age_s=-1).attempts != ()
        return publish(self, record, data)

    monkeypatch.setattr(Writer, "_publish", collected)
    with kit.writer(store) as writer, pytest.raises(CacheStoreError, match=r"was not written: .* collected as garbage"):
        writer.write("new", kit.sample(3))
    monkeypatch.undo()
    assert "new" not in CacheReader(store)
    with kit.writer(store) as writer:
        assert writer.write("new", kit.sample(3))


def test_attempts_at_a_sample_whose_record_is_damaged_are_kept(store) -> None:
    record = next((store / "commits").glob("clip_1*"))
    record.write_bytes(b"{" + record.read_bytes())
    old = next((store / "samples").glob("clip_2*"))
    shutil.copytree(old, old.with_name(f"{old.stem}.{'a' * 16}"))
    report = collect_garbage(store, min_age_s=-1)
    assert (report.attempts, report.kept_unclear) == ((f"{old.stem}.{'a' * 16}",), 1)
    assert len(list((store / "samples").iterdir())) == 3


def test_a_record_that_is_not_there_for_a_moment_loses_no_sample(store, monkeypatch) -> None:
    real = LocalStorage.read_document

    def absent(self, relative, limit_bytes):
        if relative.startswith("commits/"):
            raise FileNotFoundError(relative)
        return real(self, relative, limit_bytes)

    monkeypatch.setattr(LocalStorage, "read_document", absent)
    report = collect_garbage(store, min_age_s=-1)
    assert (report.attempts, report.kept_unclear) == ((), 2)
    monkeypatch.undo()
    assert verify(store, deep=True).ok


def test_what_repair_has_set_aside_is_kept_until_told_to_drop_it(store, kit) -> None:
    folder = store / CacheReader(store).record("clip/1@5#0").folder
    (folder / "hidden" / "c.0.0").write_bytes(b"")
    assert len(verify(store, repair=True).repaired) == 1
    report = collect_garbage(store, min_age_s=-1)
    assert (report.attempts, report.set_aside) == ((), 1)
    assert folder.exists()
    assert collect_garbage(store, min_age_s=-1, drop_set_aside=True, dry_run=True).attempts == (folder.name,)
    assert folder.exists()
    report = collect_garbage(store, min_age_s=-1, drop_set_aside=True)
    assert (report.attempts, report.set_aside) == ((folder.name,), 1)
    assert (folder.exists(), verify(store).set_aside) == (False, 0)
    assert verify(store, deep=True).samples == 1


def test_repair_drops_what_is_damaged_and_nothing_else(store, kit) -> None:
    reader = CacheReader(store)
    chunk = store / reader.record("clip/1@5#0").folder / "kv" / "c.0.0.0.0.0"
    chunk.write_bytes(b"\0" + chunk.read_bytes()[1:])
    with kit.writer(store) as writer:
        writer.write("third", kit.sample(3))
        writer.quarantine("q", "k", "r", "t")
    quarantined = next((store / "quarantine").iterdir())
    quarantined.write_text("?")
    record = next((store / "commits").glob("third*"))
    record.write_text("{}")
    (store / "samples" / "zarr.json").unlink()
    report = verify(store, deep=True, repair=True)
    damaged = next((store / "samples").glob("clip_1*")).name.partition(".")[0]
    assert set(report.repaired) == {
        f"commits/{damaged}.json",
        f"commits/{record.name}",
        f"quarantine/{quarantined.name}",
        "samples/zarr.json",
    }
    after = verify(store, deep=True)
    assert (after.ok, after.samples, after.orphans, after.set_aside) == (True, 1, (), 2)
    kit.assert_equal(CacheReader(store).read("clip/2@5#0", ["kv"]), {"kv": reader.read("clip/2@5#0", ["kv"])["kv"]})
    with kit.writer(store) as writer:
        assert writer.write("clip/1@5#0", kit.sample(1))
        assert writer.write("third", kit.sample(3))
        assert not writer.write("clip/2@5#0", kit.sample(2))
    assert verify(store, deep=True).samples == 3
    assert verify(store, deep=True, repair=True).repaired == ()
    assert isinstance(writer, CacheWriter)
