"""Chunks from a simulated hub: which are downloaded, which stay, and what happens when the hub fails."""

import shutil
import subprocess
import sys
import threading
import types
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, DataError, SourceError, UsageError
from alpacache.sources import pai_chunks, retry
from alpacache.sources.pai import open_tree
from alpacache.sources.pai_cache import REPO
from alpacache.sources.pai_chunks import ChunkCache, cache_directory, limit_bytes
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource
from benchmarks.pai_tree import write_tree

pytest.importorskip("physical_ai_av")

FRONT, LEFT = "camera_front_wide_120fov", "camera_cross_left_120fov"
DRIVES = SyntheticSource(6, seed=6, size=(64, 32))
CLIPS = DRIVES.clip_ids
REVISION = "a" * 40


def chunk(feature, number):
    directory = {"egomotion": "labels"}.get(feature, "camera" if feature.startswith("camera_f") else "calibration")
    return f"{directory}/{feature}/{feature}.chunk_{number:04d}.{'parquet' if directory == 'calibration' else 'zip'}"


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_tree(root, source=DRIVES, cameras=[FRONT, LEFT], seconds=12.0)
    return root


class Hub:
    """A repository of files under `tree`, laid out in a cache as the real one does: blobs, and links to them."""

    def __init__(self, tree, monkeypatch):
        self.tree, self.downloads, self.streamed, self.failures = tree, [], [], []
        self.lock = threading.Lock()
        api, fs = huggingface_hub.HfApi, huggingface_hub.HfFileSystem
        main = types.SimpleNamespace(name="main", target_commit=REVISION)
        monkeypatch.setattr(api, "list_repo_refs", lambda *_, **__: types.SimpleNamespace(branches=[main]))
        monkeypatch.setattr(api, "file_exists", lambda _, filename, **__: (tree / filename).is_file())
        monkeypatch.setattr(api, "get_paths_info", lambda _, paths, **__: self.paths_info(paths))
        monkeypatch.setattr(api, "hf_hub_download", lambda _, **options: self.download(**options))
        monkeypatch.setattr(fs, "open", lambda _, path, mode, revision: self.open(path, revision))

    def fail(self):
        with self.lock:
            if self.failures:
                raise self.failures.pop(0)

    def paths_info(self, paths):
        self.fail()
        return [
            types.SimpleNamespace(path=path, size=(self.tree / path).stat().st_size)
            for path in paths
            if (self.tree / path).is_file()
        ]

    def download(self, *, filename, cache_dir, revision, **_):
        self.fail()
        repository = Path(cache_dir) / f"datasets--{REPO.replace('/', '--')}"
        link, blob = repository / "snapshots" / revision / filename, repository / "blobs" / filename.replace("/", "-")
        if not link.exists():
            self.downloads.append(filename)
            for path in (link, blob):
                path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.tree / filename, blob)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
        return str(link)

    def open(self, path, revision):
        assert revision == REVISION
        self.fail()
        name = path.removeprefix(f"datasets/{REPO}/")
        self.streamed.append(name)
        return (self.tree / name).open("rb")

    @property
    def chunks(self):
        return [name for name in self.downloads if "chunk_" in name]


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(retry, "_sleep", found.append)
    return found


@pytest.fixture
def hub(tree, monkeypatch, tmp_path, waits):
    monkeypatch.setenv("ALPACACHE_PAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ALPACACHE_PAI_CACHE_SIZE", raising=False)
    return Hub(tree, monkeypatch)


def load(source, number=0, *, camera=FRONT):
    return source.load(SampleRef(clip_id=CLIPS[number], t0_us=5_100_000), cameras=[camera], frames=2)


def stored(tmp_path):
    """Bytes of the chunks that lie in the cache, by blob."""
    blobs = tmp_path / "cache" / f"datasets--{REPO.replace('/', '--')}" / "blobs"
    return {path.name: path.stat().st_size for path in blobs.iterdir() if "chunk_" in path.name}


@pytest.mark.ci
def test_only_the_chunks_of_what_is_loaded_are_downloaded(hub, tree):
    source = open_source("pai", cameras=[FRONT])
    assert (source.name, list(source.clip_ids)) == (f"pai@{REVISION}", list(CLIPS))
    assert hub.chunks == []
    sample = load(source, 2)
    calibration = [chunk(name, 1) for name in ("camera_intrinsics", "sensor_extrinsics")]
    assert sorted(hub.chunks) == sorted([chunk("egomotion", 1), chunk(FRONT, 1), *calibration])
    assert hub.streamed == []
    wanted = load(open_tree(tree), 2)
    np.testing.assert_array_equal(sample.frames, wanted.frames)
    np.testing.assert_array_equal(sample.future_xyz, wanted.future_xyz)
    assert sample.calibration == wanted.calibration
    before = list(hub.chunks)
    load(source, 3)  # of the same chunk
    load(open_source("pai", cameras=[FRONT]), 2)  # another process, or another day
    assert hub.chunks == before


def test_choosing_samples_downloads_no_pictures(hub):
    refs, rejected = select(open_source("pai", cameras=[FRONT]), t0="every:2.0")
    assert (len(refs), rejected) == (12, [])
    assert {name.split("/")[1] for name in hub.chunks} == {"egomotion"}
    assert {name.split("/")[1] for name in hub.streamed} == {FRONT}


def test_a_random_choice_takes_chunk_after_chunk(hub):
    source = open_source("pai", cameras=[FRONT])
    refs, _ = select(source, seed=1)
    numbers = [source.group_of(ref.clip_id) for ref in refs]
    assert [numbers[0], numbers[2], numbers[4]] == [numbers[1], numbers[3], numbers[5]]
    assert len(set(numbers)) == 3


def test_the_cache_stays_within_its_bound_and_samples_stay_right(hub, tree, tmp_path, monkeypatch):
    sizes = {name: (tree / name).stat().st_size for name in (chunk(FRONT, n) for n in range(3))}
    small = sum(
        (tree / chunk(name, 0)).stat().st_size for name in ("egomotion", "camera_intrinsics", "sensor_extrinsics")
    )
    limit = round(1.2 * max(sizes.values())) + 2 * small
    monkeypatch.setenv("ALPACACHE_PAI_CACHE_SIZE", str(limit))
    source, direct = open_source("pai", cameras=[FRONT]), open_tree(tree)
    for number in (0, 1, 2, 4, 0):
        np.testing.assert_array_equal(load(source, number).frames, load(direct, number).frames)
        assert sum(stored(tmp_path).values()) <= limit
    assert [name for name in hub.chunks if FRONT in name] == [chunk(FRONT, number) for number in (0, 1, 2, 0)]


def test_nothing_is_kept_with_a_size_of_0(hub, tree, monkeypatch, tmp_path):
    monkeypatch.setenv("ALPACACHE_PAI_CACHE_SIZE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def download(_, *, cache_dir, **options):
        return hub.download(cache_dir=cache_dir or tmp_path / "hub", **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", download)
    np.testing.assert_array_equal(load(open_source("pai", cameras=[FRONT])).frames, load(open_tree(tree)).frames)
    assert hub.chunks == []
    assert chunk(FRONT, 0) in hub.streamed
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_is_too_small_is_no_fault_of_the_clip(hub, monkeypatch):
    monkeypatch.setenv("ALPACACHE_PAI_CACHE_SIZE", "1KB")
    source = open_source("pai", cameras=[FRONT])
    with pytest.raises(UsageError, match="more than the 1,000 that chunks may take") as error:
        load(source)
    assert not isinstance(error.value, BadClipError)


def server_error(status=503):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return huggingface_hub.errors.HfHubHTTPError(f"{status} Server Error", response=response)


def test_a_hub_that_fails_now_and_then_is_asked_again(hub, tree, waits):
    source = open_source("pai", cameras=[FRONT])
    hub.failures = [server_error(), ConnectionResetError("reset"), TimeoutError("slow"), server_error(502)]
    np.testing.assert_array_equal(load(source).frames, load(open_tree(tree)).frames)
    assert len(waits) == 4
    hub.failures = [ConnectionResetError("reset"), server_error(500)]
    assert source.times_us(CLIPS[4])[1] > 11_000_000  # streamed
    assert (len(waits), hub.failures) == (6, [])


def test_a_hub_that_keeps_failing_is_no_fault_of_the_clip(hub, waits):
    source = open_source("pai", cameras=[FRONT])
    hub.failures = [server_error()] * 99
    with pytest.raises(DataError, match=r"chunk_0000\.zip: failed 6 times .* HfHubHTTPError: 503 Server Error") as end:
        load(source)
    assert not isinstance(end.value, BadClipError)
    assert len(waits) == 5
    hub.failures = []
    load(source)


def test_a_hub_that_fails_from_the_start_is_asked_six_times(hub, waits):
    hub.failures = [server_error()] * 6
    with pytest.raises(SourceError, match=r"hub cannot be reached; .*\(after repeated tries, HfHubHTTPError: 503"):
        open_source("pai", cameras=[FRONT])
    assert (len(waits), hub.failures) == (5, [])


def test_a_chunk_that_the_hub_has_not_is_a_missing_camera(hub, tree, tmp_path):
    hub.tree = shutil.copytree(tree, tmp_path / "partial")
    (hub.tree / chunk(FRONT, 0)).unlink()
    with pytest.raises(BadClipError) as error:
        load(open_source("pai", cameras=[FRONT]))
    assert error.value.kind == "missing_camera"


class Interface:
    """Of the devkit what the cache uses, on a repository whose chunks have given sizes."""

    repo_id, repo_type, revision = REPO, "dataset", REVISION

    def __init__(self, cache_dir, **sizes):
        self.cache_dir, self.sizes, self.downloads = str(cache_dir), sizes, []
        self.repo_snapshot_info = {"repo_id": REPO, "repo_type": "dataset", "revision": REVISION}
        self.api = types.SimpleNamespace(
            get_paths_info=lambda paths, **_: [types.SimpleNamespace(size=self.sizes[path]) for path in paths]
        )
        self.on_download = lambda file: None

    def path(self, file):
        return Path(self.cache_dir) / f"datasets--{REPO.replace('/', '--')}" / "snapshots" / REVISION / file

    def download_file(self, file):
        self.on_download(file)
        self.downloads.append(file)
        self.path(file).parent.mkdir(parents=True, exist_ok=True)
        self.path(file).write_bytes(bytes(self.sizes[file]))

    def there(self):
        return {file for file in self.sizes if self.path(file).exists()}


@pytest.fixture
def interface(tmp_path):
    return Interface(tmp_path, a=40, b=40, c=40, d=10, large=101)


@pytest.fixture
def cache(interface, tmp_path):
    return ChunkCache(interface, tmp_path, 100)


def use(cache, *files):
    for file in files:
        with cache.hold(file, fetch=True):
            assert file in cache._interface.there()


def test_the_chunk_longest_unused_goes_first(cache, interface):
    use(cache, "a", "b", "a", "c")
    assert interface.there() == {"a", "c"}
    use(cache, "d", "b")
    assert interface.there() == {"b", "c", "d"}
    assert interface.downloads == ["a", "b", "c", "d", "b"]


def test_no_more_is_removed_than_needed(cache, interface):
    use(cache, "a", "d", "b", "c")
    assert interface.there() == {"d", "b", "c"}


def test_a_chunk_in_use_is_never_removed_and_the_next_waits_for_it(cache, interface, monkeypatch):
    held = ExitStack()
    held.enter_context(cache.hold("a", fetch=True))
    held.enter_context(cache.hold("b", fetch=True))
    polls = []

    def poll(seconds):
        polls.append((seconds, interface.there()))
        if len(polls) == 3:
            held.close()

    monkeypatch.setattr(pai_chunks.time, "sleep", poll)
    use(cache, "c")
    assert polls == [(0.2, {"a", "b"})] * 3
    assert interface.there() == {"b", "c"}


def test_an_older_chunk_in_use_is_passed_over(cache, interface):
    with cache.hold("a", fetch=True):
        use(cache, "b", "c")
        assert interface.there() == {"a", "c"}


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as handle:
    fcntl.flock(handle, fcntl.LOCK_SH)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_other_processes_count_until_they_end(cache, interface, monkeypatch):
    use(cache, "a", "b")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cache._entry("a"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "held\n"
        use(cache, "c")
        assert interface.there() == {"a", "c"}
        other.kill()
    use(cache, "b")
    assert interface.there() == {"b", "c"}


def test_a_download_under_way_counts_with_its_size(cache, interface, monkeypatch):
    """While `a` is on its way, room for `b` and `c` together is not there."""
    use(cache, "b")
    monkeypatch.setattr(pai_chunks.time, "sleep", lambda _: pytest.fail("nothing is to be waited for"))

    def meanwhile(file):
        if file == "a":
            use(cache, "c")
            assert interface.there() == {"c"}  # `b` had to go

    interface.on_download = meanwhile
    use(cache, "a")
    assert interface.there() == {"a", "c"}


def test_threads_that_want_the_same_chunk_download_it_once(cache, interface, in_threads):
    everyone = threading.Barrier(8)

    def work(_):
        everyone.wait()
        use(cache, "a")

    in_threads(work, 8)
    assert interface.downloads == ["a"]


def test_many_threads_stay_within_the_bound(cache, interface, in_threads):
    over, lock = [], threading.Lock()

    def watch(file):
        with lock:
            over.append(sum(interface.sizes[name] for name in interface.there() | {file}) > 100)

    interface.on_download = watch

    def work(seed):
        for file in np.random.default_rng(seed).choice(["a", "b", "c", "d"], 20):
            use(cache, str(file))

    in_threads(work, 4)
    assert len(over) > 4
    assert not any(over)


def test_a_download_that_failed_takes_no_room(cache, interface, waits):
    def fail(_):
        raise ConnectionResetError("gone")

    interface.on_download = fail
    with pytest.raises(DataError, match="a: failed 6 times"):
        use(cache, "a")
    interface.on_download = lambda _: None
    use(cache, "b", "c")
    assert interface.there() == {"b", "c"}
    use(cache, "a")
    assert interface.there() == {"a", "c"}


def test_what_a_failed_download_had_been_granted_is_not_counted_while_it_waits_again(
    cache, interface, waits, monkeypatch
):
    """`a` waits behind `b` and `c`; there is room for `d`, unless `a` is thought to be on its way still."""

    def fail(_):
        raise ConnectionResetError("gone")

    interface.on_download = fail
    with pytest.raises(DataError):
        use(cache, "a")
    interface.on_download = lambda _: None
    held = ExitStack()
    for file in ("b", "c"):
        held.enter_context(cache.hold(file, fetch=True))

    def poll(_):
        monkeypatch.setattr(pai_chunks.time, "sleep", lambda _: pytest.fail("`d` must not wait"))
        use(cache, "d")
        held.close()

    monkeypatch.setattr(pai_chunks.time, "sleep", poll)
    use(cache, "a")
    assert "d" in interface.downloads


def test_a_chunk_above_the_bound_is_refused_with_the_way_out(cache, interface):
    use(cache, "a")
    with pytest.raises(
        UsageError, match=r"large has 101 bytes, more than the 100 .* set ALPACACHE_PAI_CACHE_SIZE higher"
    ):
        use(cache, "large")
    assert interface.there() == {"a"}


def test_without_fetch_nothing_is_downloaded_but_what_is_there_stays(cache, interface):
    with cache.hold("a", fetch=False):
        assert interface.there() == set()
    use(cache, "a", "b")
    with cache.hold("a", fetch=False):
        use(cache, "c")
        assert interface.there() == {"a", "c"}


@pytest.mark.parametrize(
    ("text", "size"), [("", 64 * 10**9), ("64GB", 64 * 10**9), ("1.5 tb", 15 * 10**11), ("500MB", 5 * 10**8), ("0", 0)]
)
def test_sizes(monkeypatch, text, size):
    monkeypatch.setenv("ALPACACHE_PAI_CACHE_SIZE", text)
    assert limit_bytes() == size


@pytest.mark.parametrize("text", ["much", "-1GB", "GB", "1PB", "nan", "inf"])
def test_senseless_sizes_are_usage_errors(monkeypatch, text):
    monkeypatch.setenv("ALPACACHE_PAI_CACHE_SIZE", text)
    with pytest.raises(UsageError, match="expected a size such as 64GB"):
        limit_bytes()


def test_where_chunks_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("ALPACACHE_PAI_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("ALPACACHE_PAI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "alpacache/pai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache/alpacache/pai"
