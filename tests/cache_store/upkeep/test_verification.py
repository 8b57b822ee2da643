import errno
import hashlib
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache_store import (
    CacheReader,
    CacheWriter,
    FormatError,
    StoreNotFoundError,
    UnreachableStoreError,
    copy,
    rereading,
    verify,
)
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
    assert (report.unreadable, report.passing, report.set_aside) == ((), 0, 0)
    assert report.deep
    assert not verify(store).deep


def test_it_lists_all_damage_and_what_is_left_over(store, kit) -> None:
    one, two = (store / CacheReader(store).record(item).folder for item in ("clip/1@5#0", "clip/2@5#0"))
    (one / "kv" / "c.0.0.0.0.0").unlink()
    (two / "hidden" / "c.0.0").write_bytes(b"short")
    (two / "small" / "zarr.json").unlink()
    leftover = f"killed-{'0' * 32}.0123456789abcdef"
    (store / "samples" / leftover).mkdir()
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
    assert (report.orphans, report.stale_temporaries) == ((leftover,), 1)
    assert report.quarantined == 1


def test_damage_that_keeps_its_size_needs_deep(store) -> None:
    path = store / CacheReader(store).record("clip/1@5#0").folder / "hidden" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert verify(store).ok
    (damage,) = verify(store, deep=True).damaged
    assert (damage.sample_id, damage.field) == ("clip/1@5#0", "hidden")


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed", "missing"])
def test_tables_of_a_codec_are_always_read(kit, tmp_path, monkeypatch, damage) -> None:
    monkeypatch.setattr(rereading, "WAITS_S", (0.0,))
    tables = b"what a calibration found"
    name = hashlib.sha256(tables).hexdigest()
    identity = kit.identity | {"codec_definition": {"tables_sha256": name}}
    CacheWriter(tmp_path / "s", fields=kit.fields(), identity=identity, codec_tables=tables)
    path = tmp_path / "s" / "codecs" / name
    assert verify(tmp_path / "s").ok
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": tables[:-1], "emptied": b"", "changed": tables[::-1]}[damage])
    report = verify(tmp_path / "s")
    assert [item.object for item in report.damaged] == [f"codecs/{name}"]
    assert not report.ok


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
    assert report.repaired == ()
    if damage == "sample":
        assert [item.what for item in report.damaged] == ["is missing."]
    else:
        assert report.damaged == ()
        assert [item.what for item in report.unreadable] == ["is gone since its folder was listed; verify again."] * (
            not anew
        )
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
    assert len(list((store / "aside").iterdir())) == 2


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
    assert (report.samples, report.damaged) == (2, ())
    assert {item.what.partition(";")[0] for item in report.unreadable} == {"cannot be read (Input/output error)"}
    assert len(report.unreadable) == (2 if part == "/hidden/c." else 1)
    assert all(part.strip("/") in item.object for item in report.unreadable)
    if part == "/hidden/c.":
        assert [(item.sample_id, item.field) for item in report.unreadable] == [
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
    assert [item.sample_id for item in report.damaged] == ["clip/2@5#0"]
    assert [item.sample_id for item in report.unreadable] == ["clip/1@5#0"]
    assert [name[:14] for name in report.repaired] == ["commits/clip_2"]


def test_a_store_that_cannot_be_repaired_is_reported_all_the_same(store, monkeypatch) -> None:
    record = next((store / "commits").glob("clip_1*"))
    record.write_bytes(b"")
    (store / "samples" / "zarr.json").unlink()

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(LocalStorage, "move", read_only)
    monkeypatch.setattr(LocalStorage, "put", read_only)
    report = verify(store, repair=True)
    assert (len(report.damaged), report.repaired) == (2, ())
    assert [(item.object, item.what[:47]) for item in report.unreadable] == [
        (f"commits/{record.name}", "could not be repaired (Read-only file system); "),
        ("samples/zarr.json", "could not be repaired (Read-only file system); "),
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.fixture
def line(monkeypatch):
    """What a store is read over: `line.fault(object, number of the reading)` may bend or refuse what comes."""
    line = SimpleNamespace(fault=lambda name, number: None, readings=Counter())
    real = os.preadv

    def reading(name: str) -> object:
        line.readings[name] += 1
        return line.fault(name, line.readings[name])

    def preadv(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if reading(name) == "flip" and count:
            buffer = next(buffer for buffer in buffers if len(buffer))
            buffer[line.readings[name] % len(buffer)] ^= 1
        return count

    opened = os.open

    def open_(path, *args, **kwargs):
        if reading(f"{path}?") == "absent":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "open", open_)
    return line


def test_a_line_that_flips_one_answer_in_twenty_condemns_no_healthy_sample(store, kit, line) -> None:
    with kit.writer(store) as writer:
        for number in range(20):
            writer.write(f"more{number}", kit.sample(number))
    flip(store / CacheReader(store).record("clip/1@5#0").folder / "kv" / "c.0.0.0.0.0")
    chance = random.Random(0)
    line.fault = lambda name, number: "flip" if chance.random() < 0.05 else None
    report = verify(store, deep=True, repair=True)
    assert [item.sample_id for item in report.damaged] == ["clip/1@5#0"]
    assert len(report.repaired) == 1
    assert report.unreadable == ()
    assert report.passing > 5
    assert len(CacheReader(store)) == 21


def test_an_object_that_is_not_there_once_drops_nothing(store, line) -> None:
    line.fault = lambda name, number: "absent" if number == 1 else None
    for deep in (False, True):
        report = verify(store, deep=deep, repair=True)
        assert (report.damaged, report.unreadable, report.repaired) == ((), (), ())
        line.readings.clear()
    assert report.passing > 10
    assert CacheReader(store).unreadable == ()


def test_what_is_never_read_twice_alike_is_not_condemned(store, line) -> None:
    line.fault = lambda name, number: "flip" if "clip_1" in name and "/hidden/c." in name else None
    report = verify(store, deep=True, repair=True)
    assert (report.damaged, report.repaired) == ((), ())
    (item,) = report.unreadable
    assert (item.sample_id, item.field) == ("clip/1@5#0", "hidden")
    assert "No two readings said the same" in item.what


@pytest.mark.parametrize("where", ["all", "samples"])
def test_a_disk_that_is_not_mounted_is_no_damage(store, tmp_path, monkeypatch, where) -> None:
    before = contents(store)
    folder = store if where == "all" else store / "samples"
    folder.rename(tmp_path / "the disk")
    folder.mkdir()
    with pytest.raises((StoreNotFoundError, UnreachableStoreError), match="mount"):
        verify(store, repair=True)
    folder.rmdir()
    (tmp_path / "the disk").rename(folder)
    assert contents(store) == before


def test_a_disk_that_goes_while_it_is_verified_is_no_damage(store, tmp_path, monkeypatch) -> None:
    before, real = contents(store), LocalStorage.size_bytes

    def unmount(self, relative):
        if store.exists():
            store.rename(tmp_path / "the disk")
        return real(self, relative)

    monkeypatch.setattr(LocalStorage, "size_bytes", unmount)
    with pytest.raises(UnreachableStoreError, match=r"not there any more.*mounted"):
        verify(store, repair=True)
    (tmp_path / "the disk").rename(store)
    assert contents(store) == before


def test_what_is_set_aside_is_put_back_when_it_proves_whole(store, kit) -> None:
    before = contents(store)
    one, two = (CacheReader(store).record(item).folder for item in ("clip/1@5#0", "clip/2@5#0"))
    for folder in (one, two):
        flip(store / folder / "hidden" / "c.0.0")
    report = verify(store, deep=True, repair=True)
    assert (len(report.repaired), report.set_aside, report.orphans) == (2, 2, ())
    assert len(CacheReader(store)) == 0
    assert verify(store).set_aside == 2
    flip(store / one / "hidden" / "c.0.0")  # whole again: the disk was put into another machine, say
    report = verify(store, deep=True, restore=True)
    assert report.restored == (f"commits/{Path(one).name.partition('.')[0]}.json",)
    assert (report.samples, report.set_aside, report.ok) == (1, 1, True)
    kit.assert_equal(CacheReader(store).read("clip/1@5#0"), kit.sample(1))
    flip(store / two / "hidden" / "c.0.0")
    with kit.writer(store) as writer:
        assert writer.write("clip/2@5#0", kit.sample(9))
    assert verify(store, restore=True).restored == ()  # it was made anew
    kit.assert_equal(CacheReader(store).read("clip/2@5#0"), kit.sample(9))
    assert {name: contents(store)[name] for name in before if "clip_1" in name}.items() <= before.items()


@pytest.mark.system
def test_in_a_bucket_too(store, s3) -> None:
    copy(store, s3.uri())
    name = next(name for name in s3.objects() if "clip_1" in name and "/hidden/c." in name)
    whole = s3.objects()[name]
    s3.put(f"store/{name}", bytes([whole[0] ^ 1]) + whole[1:])
    s3.fail("404", "GET", "/commits/clip_2")
    report = verify(s3.uri(), deep=True, repair=True)
    assert ([item.sample_id for item in report.damaged], report.set_aside) == (["clip/1@5#0"], 1)
    assert report.passing == 1
    assert CacheReader(s3.uri()).sample_ids == ("clip/2@5#0",)
    s3.put(f"store/{name}", whole)
    assert len(verify(s3.uri(), restore=True).restored) == 1
    assert len(CacheReader(s3.uri())) == 2
    assert [name for name in s3.objects() if "aside" in name] == []
