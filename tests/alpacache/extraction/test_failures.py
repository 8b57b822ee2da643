"""Stage one when things go wrong with GPU memory, disk, source, clips or workers: what was committed stays."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import alpacache
from alpacache.alpamayo import FrozenVLM
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import SampleRef
from alpacache.errors import DataError, DeviceMemoryError, InterruptedRunError, UsageError
from alpacache.extraction import progress
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.pipeline import SPARE_COPIES
from alpacache.extraction.prefill import Prefiller
from alpacache.extraction.preparation import Preparation
from alpacache.extraction.reading_process import reading_workers
from alpacache.sources.folder import FolderSource
from alpacache.sources.synthetic import SyntheticSource
from benchmarks.pai_tree import encode_h264
from cache_store import CacheReader, CacheWriter, StoreFullError, verify

pytestmark = pytest.mark.system


def config(checkpoint, store, **changes):
    settings = {"source": "synthetic:6", "model": str(checkpoint), "store": str(store), "frames": 1, "device": "cpu"}
    return ExtractConfig(**settings | changes)


@pytest.fixture(scope="module")
def one_by_one(tiny_checkpoint, tmp_path_factory):
    store = tmp_path_factory.mktemp("failures") / "store"
    assert alpacache.extract(config(tiny_checkpoint, store)).extracted == 6
    return CacheReader(store)


def small_gpu(monkeypatch, most):
    """A VLM that runs out of memory above so many samples; the sizes it was asked for."""
    asked, good = [], FrozenVLM.prefill_batch

    def prefill_batch(self, inputs):
        asked.append(len(inputs))
        if len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return good(self, inputs)

    monkeypatch.setattr(FrozenVLM, "prefill_batch", prefill_batch)
    return asked


def test_batches_change_no_sample_beyond_rounding(tiny_checkpoint, tmp_path, one_by_one, relative_error, monkeypatch):
    asked = small_gpu(monkeypatch, most=9)
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store", batch_size=4))
    assert (report.extracted, asked) == (6, [4, 2])
    reader = CacheReader(tmp_path / "store")
    for sample_id in one_by_one.sample_ids:
        one, other = one_by_one.read(sample_id), reader.read(sample_id)
        for name in one:
            if name in ("kv", "hidden"):
                kv, expected = (torch.from_numpy(part[name]).view(torch.bfloat16) for part in (other, one))
                assert relative_error(kv.float(), expected.float()) < 0.03
            else:
                assert np.array_equal(one[name], other[name]), name


def test_a_deterministic_run_goes_one_by_one_and_repeats_its_bytes(tiny_checkpoint, tmp_path, one_by_one, monkeypatch):
    asked = small_gpu(monkeypatch, most=9)
    alpacache.extract(config(tiny_checkpoint, tmp_path / "store", deterministic=True, writers=1, workers=3))
    assert asked == [1] * 6
    assert not torch.are_deterministic_algorithms_enabled()
    reader = CacheReader(tmp_path / "store")
    for sample_id in one_by_one.sample_ids:
        one, other = one_by_one.read(sample_id), reader.read(sample_id)
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []
    with pytest.raises(UsageError, match="batch_size is 4; expected 1, as the run is to be deterministic"):
        config(tiny_checkpoint, tmp_path / "store", deterministic=True, batch_size=4)


def test_out_of_gpu_memory_halves_the_batch_and_goes_on(tiny_checkpoint, tmp_path, monkeypatch, caplog):
    asked, seen = small_gpu(monkeypatch, most=2), []
    settings = config(tiny_checkpoint, tmp_path / "store", source="synthetic:12", batch_size=5)
    report = alpacache.extract(settings, on_progress=seen.append)
    assert report.extracted == 12
    assert asked[:2] == [5, 2]
    assert asked[2:5] == [3, 3, 1]  # the other half was of the old size; tried again when the first had left the device
    assert max(asked[5:]) <= 2
    assert "going on with --batch-size 2" in caplog.text
    assert seen[-1].notes["batch"].startswith(("1 (", "2 ("))
    assert verify(tmp_path / "store", deep=True).ok


def test_a_sample_that_does_not_fit_alone_ends_the_run(tiny_checkpoint, tmp_path, monkeypatch):
    asked = small_gpu(monkeypatch, most=0)
    with pytest.raises(
        DeviceMemoryError, match=r"sample synthetic-0-000000@5100000#0 \(\d+ tokens\) alone: .*2.00 GiB"
    ):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "store", batch_size=4))
    assert asked == [4, 2, 1]


def test_a_full_disk_ends_the_run_and_keeps_what_was_committed(tiny_checkpoint, tmp_path, monkeypatch):
    good, begun = CacheWriter.write, []

    def write(self, sample_id, values):
        begun.append(sample_id)
        if len(begun) == 3:
            raise StoreFullError("cannot write: the disk is full; it needs 123,456 bytes", 123456)
        return good(self, sample_id, values)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", write)
        with pytest.raises(StoreFullError, match="123,456 bytes"):
            alpacache.extract(config(tiny_checkpoint, tmp_path / "store"))
    assert len(CacheReader(tmp_path / "store")) == len(begun) - 1 >= 2
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store"))
    assert report.extracted + report.already_there == 6
    assert verify(tmp_path / "store", deep=True).ok


def test_a_request_to_stop_commits_what_is_in_flight(tiny_checkpoint, tmp_path, monkeypatch):
    good = FrozenVLM.prefill_batch

    def prefill_batch(self, inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return good(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenVLM, "prefill_batch", prefill_batch)
        with pytest.raises(InterruptedRunError, match=r"2 samples of this run are committed to .*, 4 are left"):
            alpacache.extract(config(tiny_checkpoint, tmp_path / "store", batch_size=2))
    assert len(CacheReader(tmp_path / "store")) == 2
    assert alpacache.extract(config(tiny_checkpoint, tmp_path / "store")).extracted == 4


@pytest.mark.system
@pytest.mark.ci
def test_memory_is_flat_however_slow_the_disk(tiny_checkpoint, tmp_path, monkeypatch):
    """Inputs that wait for the VLM, and stored values that wait for the disk, are a fixed number."""
    good, inputs = CacheWriter.write, weakref.WeakSet()
    prepare, features = Preparation.__call__, Prefiller.features
    most = {"inputs": 0, "outputs": 0}
    made, written = [], []

    def write(self, sample_id, values):
        time.sleep(0.03)
        gc.collect()
        most["inputs"] = max(most["inputs"], len(inputs))
        most["outputs"] = max(most["outputs"], len(made) - len(written))
        won = good(self, sample_id, values)
        written.append(sample_id)
        return won

    def noted_prepare(self, ref):
        found = prepare(self, ref)
        inputs.add(found.inputs.pixel_values)
        return found

    def noted_features(self, *arguments):
        found = features(self, *arguments)
        made.extend(found)
        return found

    monkeypatch.setattr(CacheWriter, "write", write)
    monkeypatch.setattr(Preparation, "__call__", noted_prepare)
    monkeypatch.setattr(Prefiller, "features", noted_features)
    settings = config(tiny_checkpoint, tmp_path / "store", source="synthetic:40", workers=2, writers=2, batch_size=2)
    assert alpacache.extract(settings).extracted == 40
    ahead, window, in_hand = 2 + 2 * 2, 2 * 2 - 1, 2
    assert most["inputs"] <= ahead + window + in_hand
    assert 2 + SPARE_COPIES <= most["outputs"] <= 2 + SPARE_COPIES + 2 * in_hand  # and as many still on the device


def test_progress_tells_rates_and_how_far_the_whole_store_is(tiny_checkpoint, tmp_path):
    alpacache.extract(config(tiny_checkpoint, tmp_path / "store", shard=(1, 2)))
    seen = []
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store", shard=(0, 2)), on_progress=seen.append)
    last = seen[-1]
    assert (last.done, last.total) == (3, 3)
    assert (last.notes["store"], last.notes["quarantined"]) == ("6/6", "0")
    assert 0 < float(last.notes["MB/s"]) < 1e4
    assert float(last.notes["GB"]) == pytest.approx(report.bytes_written / 1e9, abs=0.005)
    assert seen[0].notes["store"] in ("4/6", "5/6", "6/6")


def test_a_worker_of_several_tells_when_the_store_will_be_whole(tiny_checkpoint, tmp_path, monkeypatch):
    """By what all workers together have committed since this one began, whatever its own share is."""
    there = [0]
    monkeypatch.setattr(progress, "committed_keys", lambda store: frozenset(map(str, range(there[0]))))
    now = [100.0]
    with monkeypatch.context() as patch:
        patch.setattr(progress.time, "monotonic", lambda: now[0])
        count = progress.StoreCount("store", frozenset(map(str, range(100))))
        there[0] = 20
        assert count.now(at_once=False) == (20, 100, 0.0)
        now[0], there[0] = 105.0, 30
        assert count.now(at_once=False) == (20, 100, 0.0)  # not due yet
        now[0], there[0] = 120.0, 50
        assert count.now(at_once=False) == (50, 100, 1.5)
    seen = []
    monkeypatch.setattr(progress.StoreCount, "now", lambda self, *, at_once: (2, 6, 0.01))
    settings = config(tiny_checkpoint, tmp_path / "store", shard=(0, 2))
    report = alpacache.extract(settings, on_progress=seen.append)
    assert seen[-1].notes["store ETA"] == "0:06:40"
    assert (report.committed, report.wanted) == (2, 6)
    alpacache.extract(config(tiny_checkpoint, tmp_path / "alone"), on_progress=seen.append)
    assert "store ETA" not in seen[-1].notes  # its own ETA says it


def write_folder(root, clips):
    """Synthetic drives in the folder layout, with video."""
    source = SyntheticSource(clips)
    for number, clip in enumerate(source.clip_ids):
        folder = root / "clips" / clip
        folder.mkdir(parents=True)
        track = source.track(clip)
        stamps = np.arange(0, 20_000_000, 100_000)
        columns = {"timestamp": track.timestamps_us}
        columns |= {name: track.xyz[:, axis] for axis, name in enumerate("xyz")}
        columns |= {name: track.quaternion_xyzw[:, axis] for axis, name in enumerate(("qx", "qy", "qz", "qw"))}
        pd.DataFrame(columns).to_parquet(folder / "egomotion.parquet")
        pd.DataFrame({"timestamp": stamps}).to_parquet(folder / f"{FRONT_CAMERA}.timestamps.parquet")
        images = np.full((len(stamps), 3, 64, 128), 40 * number, np.uint8)
        (folder / f"{FRONT_CAMERA}.mp4").write_bytes(encode_h264(images, 10))
    index = {"name": "drives", "cameras": [FRONT_CAMERA], "clips": list(source.clip_ids)}
    (root / "dataset.json").write_text(json.dumps(index))
    return source.clip_ids


def test_a_corrupt_video_costs_its_own_samples_only(tiny_checkpoint, tmp_path):
    clips = write_folder(tmp_path / "drives", 3)
    movie = tmp_path / "drives" / "clips" / clips[1] / f"{FRONT_CAMERA}.mp4"
    data = bytearray(movie.read_bytes())
    movie.write_bytes(data[: len(data) // 2])
    settings = config(tiny_checkpoint, tmp_path / "store", source=f"folder:{tmp_path / 'drives'}", batch_size=2)
    report = alpacache.extract(settings)
    assert (report.extracted, list(report.quarantined)) == (2, [f"{clips[1]}@5100000#0"])
    assert report.kinds == {f"{clips[1]}@5100000#0": "undecodable_video"}
    assert CacheReader(tmp_path / "store").quarantined[f"{clips[1]}@5100000#0"].kind == "undecodable_video"


@pytest.mark.parametrize("how", ["gone", "error"])
def test_a_source_that_vanishes_ends_the_run_and_quarantines_nothing(how, tiny_checkpoint, tmp_path, monkeypatch):
    drives = tmp_path / "drives"
    clips = write_folder(drives, 4)
    good, loaded = FolderSource.load, []

    def load(self, ref, **wanted):
        loaded.append(ref)
        if ref.clip_id == clips[2] and drives.exists():
            if how == "error":
                raise OSError(5, "Input/output error", str(drives))
            drives.rename(tmp_path / "elsewhere")
        return good(self, ref, **wanted)

    settings = config(tiny_checkpoint, tmp_path / "store", source=f"folder:{drives}", workers=1)
    message = "is not any more" if how == "gone" else "cannot be read .*Input/output error"
    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "load", load)
        with pytest.raises(DataError, match=message):
            alpacache.extract(settings)
    reader = CacheReader(tmp_path / "store")
    assert reader.quarantined == {}
    assert set(reader.sample_ids) <= {SampleRef(clip_id=clip, t0_us=5_100_000).sample_id for clip in clips[:2]}
    assert len(reader) == 2  # both had been through the VLM
    if how == "gone":
        (tmp_path / "elsewhere").rename(drives)
    report = alpacache.extract(settings)
    assert report.extracted + report.already_there == 4


def test_a_source_is_opened_once_however_many_of_its_clips_are_bad(tiny_checkpoint, tmp_path, monkeypatch):
    clips = write_folder(tmp_path / "drives", 6)
    for clip in clips[1:]:
        (tmp_path / "drives" / "clips" / clip / f"{FRONT_CAMERA}.mp4").write_bytes(b"no video")
    opened, begin = [], FolderSource.__init__
    monkeypatch.setattr(FolderSource, "__init__", lambda self, *a, **k: opened.append(a) or begin(self, *a, **k))
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store", source=f"folder:{tmp_path / 'drives'}"))
    assert (report.extracted, len(report.quarantined), len(opened)) == (1, 5, 1)


def start(checkpoint, store, *more):
    command = [sys.executable, "-m", "cli.main", "extract", "synthetic:24", "--model", str(checkpoint)]
    command += ["--store", str(store), "--frames", "1", "--device", "cpu", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.system
@pytest.mark.ci
def test_workers_die_come_back_and_overlap(tiny_checkpoint, tmp_path, one_by_one):
    """Two workers; one is killed in mid-write and replaced by one that takes all, while the other is still at work."""
    store = tmp_path / "store"
    lost, other = (start(tiny_checkpoint, store, "--shard", f"{worker}/2") for worker in range(2))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(store.glob("commits/*.json"))) < 3:
        time.sleep(0.01)
    lost.send_signal(signal.SIGKILL)
    again = start(tiny_checkpoint, store)
    for process in (lost, other, again):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if process is lost else 0), errors
    report = verify(store, deep=True)
    assert (report.ok, report.samples) == (True, 24)
    reader = CacheReader(store)
    for sample_id in one_by_one.sample_ids:
        assert np.array_equal(reader.read(sample_id)["kv"], one_by_one.read(sample_id)["kv"])
    shutil.rmtree(store)


def test_a_writer_that_fails_otherwise_ends_the_run_with_its_error(tiny_checkpoint, tmp_path, monkeypatch):
    def write(self, sample_id, values):
        raise PermissionError(13, "Permission denied", str(self.path))

    monkeypatch.setattr(CacheWriter, "write", write)
    with pytest.raises(PermissionError):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "store"))


@pytest.mark.parametrize("part", ["keys", "hidden"])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_sample_whose_prefix_is_not_finite_is_never_committed(tiny_checkpoint, tmp_path, monkeypatch, part, codec):
    good, seen = FrozenVLM.prefill_batch, []

    def prefill_batch(self, inputs):
        prefixes = good(self, inputs)
        seen.extend(inputs)
        if len(seen) == 2:
            with torch.inference_mode():
                getattr(prefixes[0], part)[-1, ..., 3] = float("inf")
        return prefixes

    monkeypatch.setattr(FrozenVLM, "prefill_batch", prefill_batch)
    settings = config(tiny_checkpoint, tmp_path / "store", source="synthetic:3", batch_size=1, codec=codec, workers=1)
    report = alpacache.extract(settings)
    sample_id = "synthetic-0-000001@5100000#0"
    assert (report.extracted, list(report.quarantined)) == (2, [sample_id])
    assert CacheReader(tmp_path / "store").quarantined[sample_id].kind == "not_finite"
    name = {
        "keys": {"bf16": "kv has NaN or infinity", "int8": "keys or values have NaN"}[codec],
        "hidden": "hidden has",
    }
    assert f"{sample_id}: {name[part]}" in report.quarantined[sample_id]


def test_a_vlm_that_is_not_finite_is_refused(tiny_checkpoint, tmp_path):
    sick = shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    name = "vlm.model.language_model.layers.0.mlp.up_proj.weight"
    shard = next(path for path in sick.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][2, 5] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UsageError, match=rf"weights that are not finite \(NaN or infinity\): {name}"):
        alpacache.extract(config(sick, tmp_path / "store"))


@pytest.mark.parametrize(
    ("cores", "processes", "asked", "expected"),
    [(16, 1, None, 14), (2, 1, None, 2), (64, 1, None, 24), (32, 2, None, 14), (16, 8, None, 2), (16, 8, 5, 5)],
)
def test_readers_share_the_cores_of_a_machine(cores, processes, asked, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert reading_workers(asked) == expected
