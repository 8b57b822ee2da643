import errno
import os
from pathlib import Path

import pytest

from cache_store import CacheReader, FormatError, StoreNotFoundError, verify
from cache_store.document import MAX_DOCUMENT_BYTES
from cache_store.storage.local_storage import LocalStorage


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


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


@pytest.mark.parametrize("damage", ["record", "sample"])
@pytest.mark.parametrize("anew", [True, False], ids=["anew", "gone"])
def test_a_record_that_is_not_what_was_judged_any_more_is_left_alone(store, kit, monkeypatch, damage, anew) -> None:
    """Someone drops the damaged sample while this looks at the others, and `extract` makes it again."""
    record = next((store / "commits").glob("clip_1*"))
    if damage == "record":
        record.write_bytes(b"{" + record.read_bytes())
    else:
        (next((store / "samples").glob("clip_1*")) / "hidden" / "c.0.0").unlink()
    names = LocalStorage.names

    def meanwhile(self, folder, *, flat=False):
        if folder == "quarantine":  # listed once all samples have been judged
            record.unlink()
            if anew:
                with kit.writer(store) as writer:
                    assert writer.write("clip/1@5#0", kit.sample(1))
        return names(self, folder, flat=flat)

    monkeypatch.setattr(LocalStorage, "names", meanwhile)
    report = verify(store, repair=True)
    assert (len(report.damaged), report.repaired) == (1, ())
    monkeypatch.undo()
    assert record.exists() == anew
    assert verify(store, deep=True).ok
    assert len(CacheReader(store)) == 1 + anew


def test_records_that_are_refused_unread_are_dropped(store, tmp_path) -> None:
    link, huge = sorted((store / "commits").iterdir())
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    with huge.open("r+b") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    assert verify(store, repair=True).repaired == (f"commits/{link.name}", f"commits/{huge.name}")
    assert verify(store).ok
    assert (tmp_path / "elsewhere").exists()


def test_a_sound_record_in_another_order_is_dropped_with_its_sample(store) -> None:
    """What is compared is what was read, not what this library would have written."""
    record = next((store / "commits").glob("clip_1*"))
    spaced = record.read_bytes().replace(b'","', b'", "', 1)
    record.write_bytes(spaced)
    computed = next(item.what for item in verify(store).damaged).partition("computed ")[2][:8]
    at = spaced.index(b"crc32c") + 9
    record.write_bytes(spaced[:at] + computed.encode() + spaced[at + 8 :])
    assert verify(store, deep=True).ok
    (next((store / "samples").glob("clip_1*")) / "hidden" / "c.0.0").unlink()
    assert verify(store, repair=True).repaired == (f"commits/{record.name}",)


def silence(monkeypatch, parts: list[str]) -> None:
    """A disk that gives an I/O error for the files with these in their path."""
    real = os.open

    def failing(path, flags, *args, **kwargs):
        if any(part in os.fspath(path) for part in parts):
            raise OSError(errno.EIO, "Input/output error", os.fspath(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)


@pytest.mark.parametrize("part", ["/hidden/c.", "/commits/clip_1", "/quarantine/", "samples/zarr.json"])
def test_a_disk_that_does_not_answer_proves_no_damage(store, kit, monkeypatch, part) -> None:
    with kit.writer(store) as writer:
        writer.quarantine("bad", "kind", "reason", "trace")
    before = contents(store)
    with monkeypatch.context() as patch:
        silence(patch, [part])
        report = verify(store, deep=True, repair=True)
    assert not report.ok
    assert report.samples == 2
    assert {item.what.partition(";")[0] for item in report.damaged} == {"cannot be read (Input/output error)"}
    assert [item.proven for item in report.damaged] == [False] * (2 if part == "/hidden/c." else 1)
    assert all(part.strip("/") in item.object for item in report.damaged)
    if part == "/hidden/c.":
        assert [(item.sample_id, item.field) for item in report.damaged] == [
            ("clip/1@5#0", "hidden"),
            ("clip/2@5#0", "hidden"),
        ]
    assert report.repaired == ()
    assert contents(store) == before


def test_damage_beside_a_file_that_cannot_be_read_is_still_repaired(store, monkeypatch) -> None:
    one, two = (CacheReader(store).record(item).folder for item in ("clip/1@5#0", "clip/2@5#0"))
    (store / two / "kv" / "c.0.0.0.0.0").unlink()
    silence(monkeypatch, [f"{one}/hidden/c."])
    report = verify(store, deep=True, repair=True)
    assert [(item.sample_id, item.proven) for item in report.damaged] == [("clip/1@5#0", False), ("clip/2@5#0", True)]
    assert [name[:14] for name in report.repaired] == ["commits/clip_2"]


def test_a_store_that_cannot_be_repaired_is_reported_all_the_same(store, monkeypatch) -> None:
    record = next((store / "commits").glob("clip_1*"))
    record.write_bytes(b"")
    (store / "samples" / "zarr.json").unlink()

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(LocalStorage, "delete", read_only)
    monkeypatch.setattr(LocalStorage, "put", read_only)
    report = verify(store, repair=True)
    assert (len(report.damaged), report.repaired) == (4, ())
    assert [(item.object, item.what[:47]) for item in report.damaged[2:]] == [
        (f"commits/{record.name}", "could not be repaired (Read-only file system); "),
        ("samples/zarr.json", "could not be repaired (Read-only file system); "),
    ]
