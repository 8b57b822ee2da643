"""Stores in a bucket of a real S3 server on the loopback, with the faults that a network has."""

import pickle
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from cache_store import (
    CacheReader,
    CacheStoreError,
    CacheWriter,
    CorruptSampleError,
    Field,
    FormatError,
    IdentityMismatchError,
    ObjectStorageError,
    Prefetcher,
    StoreAddressError,
    StoreNotFoundError,
    UnsupportedFileSystemError,
    build_index,
    collect_garbage,
    info,
    verify,
)
from cache_store.format.names import sample_key
from cache_store.storage import object_storage, s3_access
from cache_store.storage.storage import open_storage
from cache_store.writer import CacheWriter as Writer
from cache_store.writer import committed_keys

pytestmark = pytest.mark.system  # a server of its own, and waits for its faults


@pytest.fixture
def bucket_store(s3, kit) -> str:
    """The samples of the fixture `store`, in a bucket."""
    with kit.writer(s3.uri()) as writer:
        assert writer.write("clip/1@5#0", kit.sample(1))
        more = {"tail.a.kv": np.arange(3, dtype=np.uint16), "note": "wet road"}
        assert writer.write("clip/2@5#0", kit.sample(2, 11, **more))
    return s3.uri()


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Gives up on an answer after less than the server's `late` takes."""
    monkeypatch.setattr(s3_access, "REQUEST_TIMEOUT", timedelta(seconds=1))


def test_written_equals_read(s3, kit) -> None:
    with kit.writer(s3.uri()) as writer:
        assert writer.write("clip/1@5#0", kit.sample(1))
        assert not writer.write("clip/1@5#0", kit.sample(2))
        writer.quarantine("q", "kind", "reason", "trace")
    reader = CacheReader(s3.uri())
    assert reader.path == s3.uri()
    assert reader.sample_ids == ("clip/1@5#0",)
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))
    kit.assert_equal(reader.read("clip/1@5#0", threads=4), kit.sample(1))
    assert reader.quarantined.keys() == {"q"}
    report = verify(s3.uri(), deep=True)
    assert (report.ok, report.samples, report.orphans, report.stale_temporaries) == (True, 1, (), 0)
    assert (info(s3.uri()).samples, info(s3.uri()).quarantined) == (1, 1)
    assert committed_keys(s3.uri()) == {sample_key("clip/1@5#0")}
    assert committed_keys(s3.uri("nowhere")) == frozenset()


def test_the_objects_are_those_of_a_folder(s3, kit, tmp_path) -> None:
    for place in (tmp_path / "s", s3.uri()):
        with kit.writer(place) as writer:
            writer.write("a", kit.sample(1))
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    local = {path.relative_to(tmp_path / "s").as_posix(): path.read_bytes() for path in files}

    def comparable(objects: dict[str, bytes]) -> dict[str, bytes]:
        """Without what is random: the attempt's name, and the commit record, which has it."""
        attempt = next(name for name in objects if name.startswith("samples/a-")).split("/")[1]
        return {name.replace(attempt, "a"): data for name, data in objects.items() if "commits/" not in name}

    assert len(comparable(local)) > 10
    assert comparable(s3.objects()) == comparable(local)


def test_other_settings_are_refused_and_a_missing_store_is_said(s3, kit, bucket_store) -> None:
    with pytest.raises(IdentityMismatchError, match="frames"):
        CacheWriter(bucket_store, fields=kit.fields(), identity={**kit.identity, "frames": 3})
    with pytest.raises(StoreNotFoundError, match=f"no store at {s3.uri('none')} "):
        CacheReader(s3.uri("none"))
    s3.put("taken/readme.txt", b"x")
    with pytest.raises(FormatError, match=r"neither empty nor a store \(it contains readme.txt\)"):
        kit.writer(s3.uri("taken"))


def test_large_objects_go_up_in_parts_and_come_down_in_ranges(s3, monkeypatch) -> None:
    monkeypatch.setattr(object_storage, "RANGE_BYTES", 1_000_000)
    monkeypatch.setattr(object_storage, "PART_BYTES", 5 * 2**20)
    x = np.random.default_rng(0).integers(0, 256, (4, 4_500_000)).astype(np.uint8)
    fields = [Field(name="x", dtype="uint8", axes=("a", "b"), chunk_mb=10.0)]
    with CacheWriter(s3.uri(), fields=fields, identity={}) as writer:
        writer.write("a", {"x": x})
    assert s3.server.count("POST", "/x/c.") >= 2  # begins and completes a multi-part upload
    before = s3.server.count("GET", "/x/c.0.0")
    reader = CacheReader(s3.uri())
    for threads in (1, 3):
        assert np.array_equal(reader.read("a", threads=threads)["x"], x)
    chunk = next(item for item in reader.record("a").objects.values() if item.path == "x/c.0.0")
    assert s3.server.count("GET", "/x/c.0.0") - before == 2 * -(-chunk.size // 1_000_000)
    assert verify(s3.uri(), deep=True).ok


@pytest.mark.parametrize(("method", "kind"), [("POST", "500"), ("POST", "503"), ("PUT", "500"), ("PUT", "lost")])
def test_parts_are_sent_again(s3, monkeypatch, method, kind) -> None:
    monkeypatch.setattr(object_storage, "PART_BYTES", 5 * 2**20)
    x = np.random.default_rng(0).integers(0, 256, (12, 1_000_000)).astype(np.uint8)
    fields = [Field(name="x", dtype="uint8", axes=("a", "b"), chunk_mb=12.0)]
    fault = s3.fail(kind, method, "/x/c.", times=2)
    with CacheWriter(s3.uri(), fields=fields, identity={}) as writer:
        assert writer.write("a", {"x": x})
    assert fault.seen == 2
    assert np.array_equal(CacheReader(s3.uri()).read("a")["x"], x)


def test_an_upload_that_breaks_off_leaves_nothing(s3, monkeypatch) -> None:
    monkeypatch.setattr(object_storage, "PART_BYTES", 5 * 2**20)
    fields = [Field(name="x", dtype="uint8", axes=("a", "b"), chunk_mb=12.0)]
    with CacheWriter(s3.uri(), fields=fields, identity={}) as writer:
        fault = s3.fail("500", "POST", "/x/c.", times=10**6)
        with pytest.raises(ObjectStorageError, match="cannot write"):
            writer.write("a", {"x": np.zeros((12, 1_000_000), np.uint8)})
    fault.times = 0
    assert s3.objects("store/samples").keys() == {"zarr.json"}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damage_is_named(s3, compression, monkeypatch) -> None:
    monkeypatch.setattr(object_storage, "RANGE_BYTES", 30_000)
    x = np.random.default_rng(0).integers(0, 2**16, (2, 50_000)).astype(np.uint16)
    fields = [Field(name="x", dtype="uint16", axes=("a", "b"), chunk_mb=0.1, compression=compression)]
    with CacheWriter(s3.uri(), fields=fields, identity={}) as writer:
        writer.write("a", {"x": x})
    reader = CacheReader(s3.uri())
    name = f"store/{reader.record('a').folder}/x/c.1.0"
    whole = s3.objects()[name.removeprefix("store/")]
    for bad in (whole[:50_000] + b"\0\0" + whole[50_002:], whole[:-1], whole[:10], b"", whole + b"x"):
        s3.put(name, bad)
        with pytest.raises(CorruptSampleError, match="'a', field 'x'"):
            reader.read("a")
        assert [item.sample_id for item in verify(s3.uri(), deep=True).damaged] == ["a"]
    s3.delete(name)
    with pytest.raises(CorruptSampleError, match="is missing"):
        reader.read("a")
    assert verify(s3.uri()).damaged[0].what == "is missing."
    assert len(verify(s3.uri(), repair=True).repaired) == 1
    with CacheWriter(s3.uri(), fields=fields, identity={}) as writer:
        assert writer.write("a", {"x": x})
    assert np.array_equal(CacheReader(s3.uri()).read("a")["x"], x)


def test_reading_ahead(s3, kit, bucket_store) -> None:
    reader = CacheReader(bucket_store)
    size = max(reader.buffer_bytes(sample_id) for sample_id in reader.sample_ids)
    with Prefetcher(reader, [*reader.sample_ids] * 3, [np.empty(size, np.uint8) for _ in range(2)]) as samples:
        seen = []
        for sample in samples:
            with sample:
                kit.assert_equal(sample.arrays, reader.read(sample.sample_id))
            seen.append(sample.sample_id)
    assert seen == [*reader.sample_ids] * 3


def test_an_index_spares_the_records_but_not_the_listing(s3, kit, bucket_store) -> None:
    assert build_index(bucket_store) == 2
    with kit.writer(bucket_store) as writer:
        writer.write("new", kit.sample(3))
    before = s3.server.count("GET", "/commits/")
    assert len(CacheReader(bucket_store)) == 3
    assert s3.server.count("GET", "/commits/") == before + 1


RACE = """
import sys
import numpy as np
from cache_store import CacheWriter, Field
seed = int(sys.argv[2])
with CacheWriter(sys.argv[1], fields=[Field(name="x", dtype="int64", axes=("i",))], identity={}) as writer:
    order = np.random.default_rng(seed).permutation(12)
    print(*(i for i in order if writer.write(f"s{i}", {"x": np.full(1000, seed * 100 + i)})))
"""


def test_racing_processes_commit_each_sample_once(s3) -> None:
    command = [sys.executable, "-c", RACE, s3.uri()]
    runs = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(3)]
    wins = [[int(item) for item in run.communicate()[0].split()] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sorted(i for won in wins for i in won) == list(range(12))
    reader = CacheReader(s3.uri())
    for seed, won in enumerate(wins):
        for i in won:
            assert reader.read(f"s{i}")["x"].tolist() == [seed * 100 + i] * 1000
    assert verify(s3.uri(), deep=True).orphans == ()


def test_the_loser_of_a_race_notices_and_cleans_up(s3, kit, bucket_store, monkeypatch) -> None:
    others = kit.writer(bucket_store)
    publish = Writer._publish

    def overtaken(self, record, data):
        monkeypatch.setattr(Writer, "_publish", publish)
        assert others.write("new", kit.sample(4))
        return publish(self, record, data)

    monkeypatch.setattr(Writer, "_publish", overtaken)
    with kit.writer(bucket_store) as writer:
        assert not writer.write("new", kit.sample(3))
    kit.assert_equal(CacheReader(bucket_store).read("new"), kit.sample(4))
    assert verify(bucket_store).orphans == ()


def test_a_reader_sees_only_whole_samples_while_writers_commit(s3, kit) -> None:
    kit.writer(s3.uri()).close()
    done = threading.Event()

    def write(start: int) -> None:
        with kit.writer(s3.uri()) as writer:
            for seed in range(start, start + 8):
                assert writer.write(f"s{seed}", kit.sample(seed))

    def read() -> int:
        reader, seen, rounds = CacheReader(s3.uri()), 0, 0
        while not done.is_set() or rounds < 2:
            rounds += done.is_set()
            reader.refresh()
            assert len(reader) >= seen
            seen = len(reader)
            for sample_id in reader.sample_ids[-2:]:
                kit.assert_equal(reader.read(sample_id), kit.sample(int(sample_id[1:])))
        return seen

    with ThreadPoolExecutor(4) as pool:
        writers, watcher = [pool.submit(write, start) for start in (0, 8, 16)], pool.submit(read)
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        assert watcher.result() == 24


@pytest.mark.parametrize("kind", ["500", "503", "429", "lost"])
@pytest.mark.parametrize("part", ["/commits/", "/kv/c.", "/zarr.json"])
def test_refused_and_lost_writes_are_repeated(s3, kit, kind, part) -> None:
    fault = s3.fail(kind, "PUT", part, times=2)
    with kit.writer(s3.uri()) as writer:
        assert writer.write("a", kit.sample(1))  # a lost answer to its own commit is not another's
        assert not writer.write("a", kit.sample(2))
    assert fault.seen == 2
    kit.assert_equal(CacheReader(s3.uri()).read("a"), kit.sample(1))
    assert verify(s3.uri(), deep=True).orphans == ()


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["late", "hang"])
@pytest.mark.parametrize("part", ["/commits/", "/kv/c."])
def test_writes_that_time_out_are_repeated(s3, kit, impatient, kind, part) -> None:
    writer = kit.writer(s3.uri())
    fault = s3.fail(kind, "PUT", part)
    assert writer.write("a", kit.sample(1))
    assert fault.seen == 1
    kit.assert_equal(CacheReader(s3.uri()).read("a"), kit.sample(1))


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["500", "503", "cut", "late"])
@pytest.mark.parametrize("part", ["/commits/", "/kv/c.", "/zarr.json"])
def test_reads_are_repeated(s3, kit, bucket_store, impatient, kind, part) -> None:
    s3.server.late_s = 1.5
    fault = s3.fail(kind, "GET", part, times=1 if kind == "late" else 2)
    reader = CacheReader(bucket_store)
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))
    assert fault.seen == fault.times


def test_listing_is_repeated(s3, bucket_store) -> None:
    fault = s3.fail("503", "GET", f"/{s3.bucket}", times=2)
    assert len(committed_keys(bucket_store)) == 2
    assert fault.seen == 2


@pytest.mark.parametrize("part", ["/commits/", "/kv/c."])
def test_a_server_that_fails_for_good_leaves_nothing_visible(s3, kit, bucket_store, part) -> None:
    writer = kit.writer(bucket_store)
    fault = s3.fail("500", "PUT", part, times=10**6)
    with pytest.raises(ObjectStorageError, match=rf"cannot write {s3.uri()}.* HTTP 500 after 4 tries.*run the same"):
        writer.write("new", kit.sample(3))
    fault.times = 0
    assert "new" not in CacheReader(bucket_store)
    assert verify(bucket_store, deep=True).ok
    assert writer.write("new", kit.sample(3))
    kit.assert_equal(CacheReader(bucket_store).read("new"), kit.sample(3))


def test_a_server_that_fails_for_good_is_no_damage(s3, bucket_store) -> None:
    reader = CacheReader(bucket_store)
    s3.fail("500", "GET", "/kv/c.", times=10**6)
    for act in (lambda: reader.read("clip/1@5#0"), lambda: verify(bucket_store, deep=True)):
        with pytest.raises(ObjectStorageError, match=r"cannot read .*/kv/c"):
            act()
    assert len(s3.objects("store/commits")) == 2


def test_a_server_without_conditional_puts_is_found_out(s3, kit) -> None:
    s3.server.ignore_conditions = True
    with pytest.raises(UnsupportedFileSystemError, match=r"ignores If-None-Match"):
        kit.writer(s3.uri())
    assert s3.objects() == {}


def test_only_old_attempts_without_a_record_go(s3, kit, bucket_store) -> None:
    before = s3.objects()
    folder = CacheReader(bucket_store).record("clip/1@5#0").folder
    orphan = f"{folder.rpartition('.')[0]}.{'a' * 16}"
    for name, data in before.items():
        if name.startswith(folder):
            s3.put(f"store/{orphan}{name.removeprefix(folder)}", data)
    s3.put(f"store/staging/{'1' * 32}", b"12345")
    young = collect_garbage(bucket_store, min_age_s=1000)
    assert (young.attempts, young.temporaries, young.kept_young) == ((), 0, 2)
    dry = collect_garbage(bucket_store, min_age_s=-10, dry_run=True)
    size = CacheReader(bucket_store).size_bytes("clip/1@5#0")
    assert (dry.attempts, dry.temporaries, dry.size_bytes) == ((orphan.split("/")[1],), 1, size + 5)
    assert collect_garbage(bucket_store, min_age_s=-10) == dry
    assert s3.objects() == before


def test_what_a_killed_collector_left_is_finished(s3, kit, bucket_store) -> None:
    before = s3.objects()
    reader = CacheReader(bucket_store)
    folder = reader.record("clip/1@5#0").folder
    aside = f"staging/garbage.{folder.split('/')[1]}"
    storage = open_storage(bucket_store)
    assert storage.set_aside(folder, aside)
    with pytest.raises(CorruptSampleError):
        reader.read("clip/1@5#0")
    s3.put("store/staging/garbage.nothing", b"")
    assert collect_garbage(bucket_store, min_age_s=1000).attempts == ()
    assert s3.objects() == before


def test_a_writer_whose_attempt_was_collected_fails_and_leaves_no_record(s3, kit, bucket_store, monkeypatch) -> None:
    publish = Writer._publish

    def collected(self, record, data):
        assert collect_garbage(bucket_store, min_age_s=-10).attempts != ()
        return publish(self, record, data)

    monkeypatch.setattr(Writer, "_publish", collected)
    with kit.writer(bucket_store) as writer, pytest.raises(CacheStoreError, match=r"was not written: .* as garbage"):
        writer.write("new", kit.sample(3))
    assert "new" not in CacheReader(bucket_store)


def test_a_record_cannot_name_what_lies_outside(s3, bucket_store) -> None:
    storage = open_storage(bucket_store)
    for name in ("../x", "samples/../../x", "/x", "samples//x", "./x", "samples/\0"):
        for act in (storage.exists, storage.size_bytes, storage.check_parents):
            with pytest.raises(FormatError, match="leaves the store"):
                act(name)
        with pytest.raises(FormatError, match="leaves the store"):
            storage.put(name, [b"x"])
        with pytest.raises(FormatError, match="leaves the store"):
            storage.read_into(name, 3, np.empty(3, np.uint8))


def test_a_key_that_is_no_path_is_named(s3, kit, bucket_store) -> None:
    s3.put_raw("store/commits/./evil", b"x")
    with pytest.raises(FormatError, match=r"below it lies an object whose key is no path; remove it"):
        CacheReader(bucket_store)


def test_secrets_are_in_no_store_pickle_or_message(s3, kit, bucket_store) -> None:
    reader = CacheReader(bucket_store)
    with kit.writer(bucket_store) as writer:
        pickled = pickle.dumps(reader)
        assert s3.secret_key not in repr(vars(writer)) + repr(vars(reader)) + str(vars(writer._storage))
    kit.assert_equal(pickle.loads(pickled).read("clip/1@5#0"), kit.sample(1))
    everything = b"".join(s3.objects().values()) + pickled
    for secret in (s3.access_key, s3.secret_key):
        assert secret.encode() not in everything
    s3.fail("500", "GET", "/kv/c.", times=10**6)
    try:
        reader.read("clip/1@5#0")
    except ObjectStorageError:
        text = traceback.format_exc()
    assert "HTTP 500" in text
    assert s3.access_key not in text
    assert s3.secret_key not in text


def test_a_missing_bucket_is_said(s3, kit) -> None:
    for act in (
        lambda: CacheReader("s3://nobucket/x"),
        lambda: kit.writer("s3://nobucket/x"),
        lambda: verify("s3://nobucket/x"),
    ):
        with pytest.raises(StoreAddressError, match=r"no bucket 'nobucket' there\. Create it"):
            act()


def test_import_of_the_store_loads_no_obstore(tmp_path: Path) -> None:
    code = f"""
import sys
import numpy as np
from cache_store import CacheReader, CacheWriter, Field
with CacheWriter({str(tmp_path / "s")!r}, fields=[Field(name="x", dtype="int8", axes=("i",))], identity={{}}) as writer:
    writer.write("a", {{"x": np.arange(3, dtype=np.int8)}})
CacheReader({str(tmp_path / "s")!r}).read("a")
print(sorted({{"obstore", "boto3"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
