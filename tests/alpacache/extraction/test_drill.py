"""A drill: many workers on one store, some killed and some added in mid-run. Nothing is lost, nothing done over.

Workers are forked from a server that has imported everything once, so that eight of them start in a second.
"""

import multiprocessing
import time
from contextlib import contextmanager

import numpy as np
import pytest

import alpacache
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.extract import extract
from cache_store import CacheReader, verify


def config(checkpoint, store, **changes):
    settings = {"model": str(checkpoint), "store": str(store), "frames": 1, "device": "cpu", "views": 2}
    return ExtractConfig(**settings | {"workers": 1, "writers": 1} | changes)


@contextmanager
def crew():
    """Starts a worker a call; those that are left are ended."""
    context, started = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["alpacache.extraction.extract"])

    def start(settings):
        worker = context.Process(target=extract, args=(settings,))
        worker.start()
        started.append(worker)
        return worker

    try:
        yield start
    finally:
        for worker in started:
            worker.kill()
            worker.join()
            worker.close()


class Watch:
    """The commit records of a store, looked at again and again: one that is there once never changes nor goes."""

    def __init__(self, store):
        self.store, self.seen = store, {}

    def look(self):
        found = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.store.glob("commits/*.json")}
        assert {name: found.get(name) for name in self.seen} == self.seen
        self.seen = found
        return len(found)

    def until(self, enough, workers):
        deadline = time.monotonic() + 240
        while self.look() < enough:
            assert time.monotonic() < deadline, f"{len(self.seen)} of {enough} samples"
            assert any(worker.is_alive() for worker in workers), f"{len(self.seen)} of {enough} samples"
            time.sleep(0.01)


@pytest.mark.parametrize(("workers", "clips"), [(8, 40), pytest.param(8, 300, marks=pytest.mark.slow)])
@pytest.mark.ci
def test_workers_are_killed_and_added_in_mid_run(workers, clips, tiny_checkpoint, tmp_path):
    store, source = tmp_path / "store", f"synthetic:{clips}"
    samples, lost = 2 * clips, workers // 2
    watch = Watch(store)
    with crew() as start:
        shards = [
            start(config(tiny_checkpoint, store, source=source, shard=(number, workers))) for number in range(workers)
        ]
        watch.until(samples // 8, shards)
        victims = [worker for worker in shards if worker.is_alive()][:lost]
        assert len(victims) == lost
        for worker in victims:
            worker.kill()
        watch.look()
        back = shards.index(victims[0])
        added = [
            start(config(tiny_checkpoint, store, source=source, shard=(back, workers))),  # in a killed one's place
            start(config(tiny_checkpoint, store, source=source)),  # takes all: overlaps with everyone
            start(config(tiny_checkpoint, store, source=source, shard=(0, 3))),  # divides them otherwise
        ]
        watch.until(samples // 3, shards + added)
        if added[0].is_alive():
            added[0].kill()
        for worker in shards + added:
            worker.join()
        for worker in shards + added:
            killed = worker in victims or worker is added[0]
            assert worker.exitcode == 0 or (killed and worker.exitcode == -9)
        watch.look()
    expected = {f"synthetic-0-{clip:06d}@5100000#{view}" for clip in range(clips) for view in range(2)}
    reader = CacheReader(store)
    assert len(reader) == len(watch.seen) == samples
    assert set(reader.sample_ids) == expected
    report = verify(store, deep=True)
    assert (report.ok, report.samples) == (True, samples)
    again = alpacache.extract(config(tiny_checkpoint, store, source=source))
    assert (again.extracted, again.already_there, again.quarantined) == (0, samples, {})
    undisturbed = tmp_path / "undisturbed"
    alpacache.extract(config(tiny_checkpoint, undisturbed, source="synthetic:8"))
    for sample_id in CacheReader(undisturbed).sample_ids:
        one, other = reader.read(sample_id), CacheReader(undisturbed).read(sample_id)
        assert all(np.array_equal(one[name], other[name]) for name in one)
