import errno
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from cache_store import (
    CacheReader,
    CacheWriter,
    Field,
    IdentityMismatchError,
    StoreFullError,
    verify,
)
from cache_store.errors import FormatError, StoreAddressError, UnsupportedFileSystemError
from cache_store.format.names import sample_key
from cache_store.storage.local_storage import LocalStorage
from cache_store.writer import committed_keys


def test_resume_skips_what_is_committed(store, kit) -> None:
    before = sorted(path for path in store.rglob("*") if path.is_file())
    with kit.writer(store) as writer:
        assert writer.is_committed("clip/1@5#0")
        assert not writer.is_committed("clip/3@5#0")
        assert writer.write("clip/1@5#0", kit.sample(99)) is False
        assert sorted(path for path in store.rglob("*") if path.is_file()) == before
        assert writer.write("clip/3@5#0", kit.sample(3)) is True
    reader = CacheReader(store)
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))
    assert len(reader) == 3


def test_committed_keys_are_those_of_the_samples_and_none_without_a_store(store, kit, tmp_path) -> None:
    assert committed_keys(store) == {sample_key(sample_id) for sample_id in CacheReader(store).sample_ids}
    with kit.writer(store) as writer:
        writer.write("clip/3@5#0", kit.sample(3))
        writer.quarantine("clip/4@5#0", "short_clip", "too short", "")
    assert len(committed_keys(store)) == 3
    assert committed_keys(tmp_path / "nowhere") == frozenset()


def test_same_arrays_give_the_same_bytes(tmp_path, kit) -> None:
    contents = []
    for name in ("one", "two"):
        with kit.writer(tmp_path / name) as writer:
            writer.write("a", kit.sample(1))
        (group,) = [path for path in (tmp_path / name / "samples").iterdir() if path.is_dir()]
        contents.append({str(p.relative_to(group)): p.read_bytes() for p in group.rglob("*") if p.is_file()})
        contents[-1]["root"] = (tmp_path / name / "zarr.json").read_bytes()
    assert contents[0] == contents[1]
    assert len(contents[0]) == 10


def test_a_non_contiguous_array_is_written_as_it_reads(tmp_path) -> None:
    array = np.arange(60, dtype=np.int32).reshape(3, 4, 5).transpose(2, 0, 1)
    with CacheWriter(tmp_path / "s", fields=[Field(name="x", dtype="int32", axes=tuple("abc"))], identity={}) as writer:
        writer.write("a", {"x": array})
    assert np.array_equal(CacheReader(tmp_path / "s").read("a")["x"], array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": np.zeros((5, 2, 2, 7, 4), np.float32)}, r"field 'kv' should be uint16\['layer'.*got float32"),
        ({"kv": np.zeros((5, 2, 2, 7), np.uint16)}, "got uint16 with shape"),
        ({"kv": [1, 2]}, "should be a numpy array of uint16, got list"),
        ({"length": np.zeros(1, np.int64)}, "field 'length' should be int64"),
        ({"path": np.zeros((4, 3), ">f8")}, "field 'path' should be float64"),
        ({"prompt": ["a"]}, "field 'prompt' should be a str, got list"),
        ({"cameras": "front"}, "field 'cameras' should be a list of str, got str"),
        ({"cameras": ["front", 3]}, "should be a list of str"),
        ({"prompt": "a\0"}, "NUL"),
        ({"prompt": "\ud800"}, "valid Unicode"),
        ({"other": np.zeros(1)}, r"unknown fields \['other'\]"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_writing(store, kit, change, message) -> None:
    before = sorted(store.rglob("*"))
    with kit.writer(store) as writer, pytest.raises(ValueError, match=message) as caught:
        writer.write("new", {**kit.sample(1), **change})
    assert "sample 'new'" in str(caught.value)
    assert sorted(store.rglob("*")) == before


def test_a_missing_required_field_is_refused(store, kit) -> None:
    values = kit.sample(1)
    del values["kv"], values["prompt"]
    with kit.writer(store) as writer, pytest.raises(ValueError, match=r"missing required fields \['kv', 'prompt'\]"):
        writer.write("new", values)


def test_another_identity_is_refused_with_every_difference(store, kit) -> None:
    identity = {"model": {"id": "tiny", "revision": "r2"}, "cameras": ["front"], "codec": "bf16"}
    with pytest.raises(IdentityMismatchError) as caught:
        CacheWriter(store, fields=kit.fields()[:-1], identity=identity)
    assert caught.value.differences[:4] == (
        'identity.cameras: expected ["front"], found ["front","left"]',
        'identity.codec: expected "bf16", found nothing',
        "identity.frames: expected nothing, found 4",
        'identity.model.revision: expected "r2", found "r1"',
    )
    assert caught.value.differences[4].startswith("fields.note: expected nothing, found ")
    assert all(line in str(caught.value) for line in caught.value.differences)


def test_other_units_of_a_field_are_refused(store, kit) -> None:
    fields = kit.fields()
    fields[4] = Field(name="path", dtype="float64", axes=("step", "xyz"), units="km", layout="packed")
    with pytest.raises(IdentityMismatchError) as caught:
        CacheWriter(store, fields=fields, identity=kit.identity)
    assert caught.value.differences == ('fields.path.units: expected "km", found "m"',)


def test_provenance_only_warns_and_chunk_size_follows_the_store(store, kit, caplog) -> None:
    fields = [Field(**{**field.to_json(), "chunk_mb": 1}) for field in kit.fields()]
    with caplog.at_level(logging.WARNING):
        writer = CacheWriter(store, fields=fields, identity=kit.identity, provenance={"versions": {"zarr": "4"}})
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        'provenance.hardware: expected nothing, found "a laptop"',
        'provenance.versions.zarr: expected "4", found "3"',
    ]
    assert writer.fields["kv"].chunk_mb == 0.0005


def test_a_folder_with_other_things_is_no_place_for_a_store(tmp_path, kit) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FormatError, match=r"neither empty nor a store \(it contains thesis.tex\)"):
        kit.writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_closed_writer_writes_no_more(store, kit) -> None:
    with kit.writer(store) as writer:
        pass
    with pytest.raises(ValueError, match="closed"):
        writer.write("new", kit.sample(1))


def test_quarantine_release_and_count(store, kit) -> None:
    reader = CacheReader(store)
    with kit.writer(store) as writer:
        writer.quarantine("bad/1", "short_clip", "too short: 3 s", "Traceback ...\nValueError")
        assert writer.quarantine_of("bad/1")
        assert writer.quarantine_of("clip/1@5#0") is None
        record = reader.quarantined["bad/1"]
        assert (record.kind, record.reason, record.attempts) == ("short_clip", "too short: 3 s", 1)
        assert record.traceback.endswith("ValueError")
        writer.release("bad/1")
        writer.release("never seen")
        assert writer.quarantine_of("bad/1") is None
        assert reader.quarantined == {}
        writer.quarantine("bad/1", "undecodable_video", "x\ud800" * 5000, "")
        assert reader.quarantined["bad/1"].attempts == 2
        assert len(reader.quarantined["bad/1"].reason) == 2000
        writer.release("bad/1")
        assert writer.write("bad/1", kit.sample(5))
        assert writer.quarantine_of("bad/1") is None
        writer.quarantine("bad/1", "late", "a slower writer failed", "")
        assert writer.quarantine_of("bad/1") is None
    reader.refresh()
    assert reader.quarantined == {}
    assert "bad/1" in reader
    assert verify(store).quarantined == 0


def test_the_loser_of_a_race_notices_and_cleans_up(store, kit, monkeypatch) -> None:
    first, second = kit.writer(store), kit.writer(store)
    publish = LocalStorage.put_if_absent
    results = []

    def overtaken(storage: LocalStorage, relative: str, data: bytes) -> bool:
        monkeypatch.setattr(LocalStorage, "put_if_absent", publish)
        results.append(second.write("new", kit.sample(20)))
        return publish(storage, relative, data)

    monkeypatch.setattr(LocalStorage, "put_if_absent", overtaken)
    results.append(first.write("new", kit.sample(10)))
    assert results == [True, False]
    kit.assert_equal(CacheReader(store).read("new"), kit.sample(20))
    report = verify(store, deep=True)
    assert (report.ok, report.samples, report.orphans, report.stale_temporaries) == (True, 3, (), 0)


def test_racing_threads_commit_each_sample_once(tmp_path, kit) -> None:
    barrier = threading.Barrier(4)
    wins: list[tuple[str, int]] = []

    def work(seed: int) -> None:
        barrier.wait()
        with kit.writer(tmp_path / "s") as writer:  # creation races, too
            wins.extend((name, seed) for name in "abcdef" if writer.write(name, kit.sample(seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for name, _ in wins) == list("abcdef")
    reader = CacheReader(tmp_path / "s")
    for name, seed in wins:
        kit.assert_equal(reader.read(name), kit.sample(seed))
    assert verify(tmp_path / "s", deep=True).orphans == ()


@pytest.mark.parametrize("operation", ["write", "fsync", "mkdir", "open", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_any_step_leaves_nothing_visible(store, kit, monkeypatch, operation, code) -> None:
    writer = kit.writer(store)
    real = getattr(os, operation)
    for step in range(1000):
        calls = 0

        def failing(*args, step=step, **kwargs):
            nonlocal calls
            calls += 1
            if calls > step:  # and stays full
                if operation == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(code, "full")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, operation, failing)
            try:
                writer.write("new", kit.sample(3))
                break
            except StoreFullError as error:
                caught = error
        if writer.is_committed("new"):  # only the very last fsync came after the commit
            assert operation == "fsync" or (operation == "open" and calls > step)
            kit.assert_equal(CacheReader(store).read("new"), kit.sample(3))
            return
        assert (caught.errno, caught.needed_bytes > 2000) == (code, True)
        assert "bytes free" in str(caught) or operation == "open"
        assert f"needs {caught.needed_bytes:,} bytes" in str(caught)
        assert "intact" in str(caught)
        assert CacheReader(store).sample_ids == ("clip/1@5#0", "clip/2@5#0")
        if operation != "open":  # without file descriptors nothing can be listed for removal
            report = verify(store)
            assert (report.orphans, report.stale_temporaries) == ((), 0)
    assert step > 0
    assert writer.is_committed("new")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_store_that_may_not_be_written_is_named(store, kit, tmp_path, monkeypatch, code) -> None:
    """Also one that is there: then it is the first sample that is refused."""
    writer = kit.writer(store)

    def refused(path, *_, **__):
        raise OSError(code, os.strerror(code), os.fspath(path))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(StoreAddressError, match=f"store at {tmp_path / 'new'}: {os.strerror(code)} .*Correct the path"):
        kit.writer(tmp_path / "new")
    with pytest.raises(StoreAddressError, match=f"sample 'new' to {store}: {os.strerror(code)} .*intact; see to"):
        writer.write("new", kit.sample(3))


def test_a_path_through_a_file_is_named(store, kit) -> None:
    for path in (store / "zarr.json", store / "zarr.json" / "deeper"):
        with pytest.raises(StoreAddressError, match=r"Not a directory \(.*/store/zarr\.json\)\. Correct the path"):
            kit.writer(path)


def test_a_file_system_without_hard_links_is_named(tmp_path, kit, monkeypatch) -> None:
    def no_link(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(UnsupportedFileSystemError, match="hard"):
        kit.writer(tmp_path / "s")


def test_a_repeated_link_request_counts_as_won(store, kit, monkeypatch) -> None:
    real = os.link

    def answered_late(*args, **kwargs):
        real(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", answered_late)
    with kit.writer(store) as writer:
        assert writer.write("new", kit.sample(4)) is True
    kit.assert_equal(CacheReader(store).read("new"), kit.sample(4))


def test_everything_is_on_the_medium_before_the_record_appears(store, kit, monkeypatch) -> None:
    names: dict[int, str] = {}
    events: list[tuple[str, str]] = []
    real_open, real_fsync, real_link = os.open, os.fsync, os.link

    def opened(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        names[descriptor] = str(path)
        return descriptor

    def synced(descriptor):
        events.append(("fsync", names[descriptor]))
        real_fsync(descriptor)

    def linked(source, target):
        events.append(("link", str(target)))
        real_link(source, target)

    writer = kit.writer(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "link", linked)
        writer.write("new", kit.sample(3))
    group = store / CacheReader(store).record("new").folder
    (at,) = (i for i, (kind, _) in enumerate(events) if kind == "link")
    durable = [path for kind, path in events[:at] if kind == "fsync"]
    assert {str(path) for path in [group, group.parent, *group.rglob("*")]} < set(durable)
    assert Path(durable[-1]).parent == store / "staging"
    assert durable[-2] == str(store / "samples")
    assert events[at + 1 :] == [("fsync", str(store / "commits"))]
