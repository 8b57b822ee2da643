"""Copies between folders and buckets: the same bytes, resumed after any interruption, never a torn sample."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from cache_store import (
    CacheReader,
    CacheWriter,
    Field,
    FormatError,
    IdentityMismatchError,
    ObjectStorageError,
    StoreAddressError,
    StoreFullError,
    StoreNotFoundError,
    copy,
    verify,
)
from cache_store.storage.local_storage import LocalStorage
from cache_store.upkeep import copying


def contents(place: str | Path, s3=None) -> dict[str, bytes]:
    """All objects of a store but its index, by name."""
    if isinstance(place, str):
        objects = s3.objects(place.rpartition("/")[2])
    else:
        files = (path for path in place.rglob("*") if path.is_file())
        objects = {path.relative_to(place).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in objects.items() if name != "index"}


@pytest.fixture
def source(store, kit) -> Path:
    with kit.writer(store) as writer:
        writer.quarantine("bad", "kind", "reason", "trace")
    return store


def test_to_a_folder(source, kit, tmp_path) -> None:
    seen = []
    report = copy(source, tmp_path / "copy", on_sample=lambda *progress: seen.append(progress))
    reader = CacheReader(source)
    size = sum(map(reader.size_bytes, reader.sample_ids))
    assert (report.samples, report.copied, report.already_there, report.size_bytes) == (2, 2, 0, size)
    assert report.ok
    assert [(done, samples) for done, samples, _ in seen] == [(1, 2), (2, 2)]
    assert seen[-1][2] == size
    assert contents(tmp_path / "copy") == contents(source)
    again = copy(source, tmp_path / "copy")
    assert (again.copied, again.already_there, again.size_bytes) == (0, 2, 0)
    assert contents(tmp_path / "copy") == contents(source)


@pytest.mark.system
def test_there_and_back_over_a_bucket(source, kit, tmp_path, s3) -> None:
    assert copy(source, s3.uri()).copied == 2
    assert contents(s3.uri(), s3) == contents(source)
    assert verify(s3.uri(), deep=True).ok
    kit.assert_equal(CacheReader(s3.uri()).read("clip/1@5#0"), kit.sample(1))
    assert copy(s3.uri(), s3.uri("second")).copied == 2
    assert contents(s3.uri("second"), s3) == contents(source)
    assert copy(s3.uri("second"), tmp_path / "back").copied == 2
    assert contents(tmp_path / "back") == contents(source)
    assert verify(tmp_path / "back", deep=True).ok


@pytest.mark.system
def test_a_copy_in_a_bucket_opens_without_a_request_a_sample(source, s3) -> None:
    copy(source, s3.uri())
    assert len(CacheReader(s3.uri())) == 2
    assert s3.server.count("GET", "/commits/") == 0


class Killed(BaseException):
    pass


def test_a_copy_that_is_killed_at_any_point_goes_on_from_there(source, tmp_path, monkeypatch) -> None:
    expected = contents(source)
    target = tmp_path / "copy"
    monkeypatch.setattr(copying, "_SAMPLES", 1)
    put, publish = LocalStorage.put, LocalStorage.put_if_absent
    left = 0

    def counted(real):
        def act(self, relative, data):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(self, relative, data)

        return act

    monkeypatch.setattr(LocalStorage, "put", counted(put))
    monkeypatch.setattr(LocalStorage, "put_if_absent", counted(publish))
    tries = 0
    while True:
        tries += 1
        left = 3
        try:
            report = copy(source, target)
            break
        except Killed:
            pass
        if (target / "zarr.json").exists():
            assert verify(target, deep=True).ok
    assert tries > 5
    assert report.samples == report.already_there + report.copied == 2
    assert contents(target) == expected


def test_torn_objects_of_an_earlier_try_are_copied_again(source, tmp_path) -> None:
    copy(source, tmp_path / "copy")
    expected = contents(tmp_path / "copy")
    record = CacheReader(source).record("clip/1@5#0")
    next((tmp_path / "copy" / "commits").glob("clip_1*")).unlink()
    folder = tmp_path / "copy" / record.folder
    (folder / "kv" / "c.0.0.0.0.0").write_bytes(b"torn")
    (folder / "small" / "c.0").unlink()
    flipped = bytearray((folder / "hidden" / "c.0.0").read_bytes())
    flipped[0] ^= 1
    (folder / "hidden" / "c.0.0").write_bytes(flipped)
    assert copy(source, tmp_path / "copy").copied == 1
    assert contents(tmp_path / "copy") == expected


def test_damaged_samples_are_named_and_left_out(source, kit, tmp_path) -> None:
    with kit.writer(source) as writer:
        writer.write("third", kit.sample(3))
    chunk = source / CacheReader(source).record("clip/1@5#0").folder / "kv" / "c.1.0.0.0.0"
    chunk.write_bytes(b"\1" + chunk.read_bytes()[1:])
    next((source / "commits").glob("third*")).write_text("{}")
    next((source / "quarantine").iterdir()).write_text("?")
    report = copy(source, tmp_path / "copy")
    assert (report.samples, report.copied, report.ok) == (3, 1, False)
    assert ["'clip/1@5#0', field 'kv'" in text for text in report.damaged] == [True, False, False]
    assert CacheReader(tmp_path / "copy").sample_ids == ("clip/2@5#0",)
    assert verify(tmp_path / "copy", deep=True).ok


@pytest.mark.system
def test_faults_on_the_way(source, s3) -> None:
    faults = [
        s3.fail("lost", "PUT", "/commits/"),
        s3.fail("503", "PUT", "/kv/c.", 3),
        s3.fail("500", "PUT", "/zarr.json"),
    ]
    assert copy(source, s3.uri()).copied == 2
    assert [fault.seen for fault in faults] == [1, 3, 1]
    assert contents(s3.uri(), s3) == contents(source)


@pytest.mark.system
def test_an_interrupted_copy_to_a_bucket_goes_on(source, s3) -> None:
    fault = s3.fail("500", "PUT", "/hidden/c.", times=10**6)
    with pytest.raises(ObjectStorageError, match="run the same command again"):
        copy(source, s3.uri())
    fault.times = 0
    assert len(CacheReader(s3.uri())) == 0
    before = len(s3.server.requests)
    assert copy(source, s3.uri()).copied == 2
    assert contents(s3.uri(), s3) == contents(source)
    again = s3.server.requests[before:]
    assert sum(method == "PUT" and "/hidden/c." in path for method, path in again) == 2
    assert sum(method == "PUT" and "/samples/clip" in path for method, path in again) < len(contents(source)) - 6


def test_other_stores_are_refused_and_equal_ones_united(source, kit, tmp_path) -> None:
    with kit.writer(tmp_path / "other") as writer:
        writer.write("third", kit.sample(3))
        writer.write("clip/1@5#0", kit.sample(1))
    report = copy(tmp_path / "other", source)
    assert (report.copied, report.already_there) == (1, 1)
    assert CacheReader(source).sample_ids == ("clip/1@5#0", "clip/2@5#0", "third")
    with pytest.raises(StoreAddressError, match="are both"):
        copy(source, source)
    with pytest.raises(StoreNotFoundError):
        copy(tmp_path / "none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    CacheWriter(tmp_path / "frames", fields=kit.fields(), identity={**kit.identity, "frames": 1}).close()
    with pytest.raises(IdentityMismatchError, match="frames"):
        copy(source, tmp_path / "frames")
    fields = [Field(name="x", dtype="uint8", axes=("i",))]
    for name, chunk_mb in (("a", 1.0), ("b", 2.0)):
        fields = [Field(name="x", dtype="uint8", axes=("i",), chunk_mb=chunk_mb)]
        CacheWriter(tmp_path / name, fields=fields, identity={}).close()
    with pytest.raises(FormatError, match="other chunk sizes or compression"):
        copy(tmp_path / "a", tmp_path / "b")


def test_a_lost_race_for_a_sample_leaves_the_winner_alone(source, kit, tmp_path, monkeypatch) -> None:
    target = tmp_path / "copy"
    publish = LocalStorage.put_if_absent

    def overtaken(self, relative, data):
        if relative.startswith("commits/clip_1"):
            monkeypatch.setattr(LocalStorage, "put_if_absent", publish)
            with kit.writer(target) as writer:
                assert writer.write("clip/1@5#0", kit.sample(9))
        return publish(self, relative, data)

    monkeypatch.setattr(LocalStorage, "put_if_absent", overtaken)
    monkeypatch.setattr(copying, "_SAMPLES", 1)
    assert copy(source, target).copied == 1
    kit.assert_equal(CacheReader(target).read("clip/1@5#0"), kit.sample(9))
    assert verify(target, deep=True).orphans == ()


def test_what_nobody_committed_is_not_copied(source, tmp_path) -> None:
    orphan = source / "samples" / f"{CacheReader(source).record('clip/1@5#0').folder[8:-16]}{'a' * 16}"
    orphan.mkdir()
    (orphan / "zarr.json").write_text("{}")
    os.mkfifo(source / "staging" / "pipe")
    copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy" / "samples" / orphan.name).exists()
    assert np.all(CacheReader(tmp_path / "copy").read("clip/1@5#0")["length"] == 7)


def test_a_target_that_can_be_no_folder_is_refused(source) -> None:
    file = source / "zarr.json"
    for target, reason in (
        (file / "x", f"Not a directory ({file})"),
        (file, f"Not a directory ({file})"),
        (Path("/dev/null/x"), "Not a directory (/dev/null)"),
        (Path("/proc/x"), "No such file or directory (/proc/x)"),
    ):
        with pytest.raises(StoreAddressError) as refused:
            copy(source, target)
        assert f"cannot open or make a store at {target}: {reason}. Correct the path" in str(refused.value)


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_target_is_refused(source, kit, tmp_path, monkeypatch, begun) -> None:
    if begun:
        copy(source, tmp_path / "copy")
        with kit.writer(source) as writer:
            writer.write("third", kit.sample(3))

    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(StoreAddressError, match=f"{tmp_path / 'copy'}: Read-only file system .*see to the permissions"):
        copy(source, tmp_path / "copy")


def test_what_a_source_does_not_give_out_is_named_as_such(source, tmp_path, monkeypatch) -> None:
    real = os.open

    def closed(path, *args, **kwargs):
        if os.fspath(path).startswith(str(source)) and "/hidden/c." in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", closed)
    report = copy(source, tmp_path / "copy")
    assert (report.copied, report.damaged, report.ok) == (0, (), False)
    assert ["cannot be read (Permission denied)" in text for text in report.unreadable] == [True, True]
    monkeypatch.undo()
    assert copy(source, tmp_path / "copy").copied == 2


@pytest.mark.parametrize(("name", "what"), [("quarantine/", "quarantine record of sample 'bad'"), ("index", "index")])
def test_a_full_disk_at_the_last_records_is_named(source, tmp_path, monkeypatch, name, what) -> None:
    put = LocalStorage.put

    def full(self, relative, parts):
        if relative.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, relative, parts)

    monkeypatch.setattr(LocalStorage, "put", full)
    monkeypatch.setattr(LocalStorage, "threads", 2)  # as object storage has, so that the copy gets an index
    with pytest.raises(StoreFullError, match=f"cannot write the {what} to {tmp_path / 'copy'}: the disk is full"):
        copy(source, tmp_path / "copy")
    assert len(CacheReader(tmp_path / "copy")) == 2
