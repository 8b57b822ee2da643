import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cache_store import CacheReader, CacheWriter, CorruptSampleError, Field, Prefetcher, SampleNotFoundError
from cache_store.sample_read import SampleRead


@pytest.fixture
def many(tmp_path: Path) -> CacheReader:
    """Ten samples `s0` .. `s9`: `x` holds 100 + i rows of i, in chunks of 10 rows."""
    fields = [
        Field(name="x", dtype="int16", axes=("row", "column"), chunk_mb=0.00008),
        Field(name="n", dtype="int64", layout="packed"),
        Field(name="t", dtype="str", layout="text"),
    ]
    with CacheWriter(tmp_path / "many", fields=fields, identity={}) as writer:
        for i in range(10):
            writer.write(f"s{i}", {"x": np.full((100 + i, 4), i, np.int16), "n": np.array(i), "t": f"text {i}"})
    return CacheReader(tmp_path / "many")


def buffers(reader: CacheReader, count: int) -> list[np.ndarray]:
    size = max(reader.buffer_bytes(name) for name in reader.sample_ids)
    return [np.empty(size, np.uint8) for _ in range(count)]


def test_samples_come_in_the_callers_order_in_the_callers_buffers(many) -> None:
    order = [f"s{i}" for i in np.random.default_rng(0).integers(0, 10, 50)]
    ring = buffers(many, 3)
    got = []
    with Prefetcher(many, order, ring, threads=3) as samples:
        for sample in samples:
            with sample:
                i = int(sample.sample_id[1:])
                assert sample.arrays["x"].tolist() == [[i] * 4] * (100 + i)
                assert (sample.arrays["n"].item(), sample.arrays["t"].item()) == (i, f"text {i}")
                assert any(np.shares_memory(sample.arrays["x"], buffer) for buffer in ring)
                got.append(sample.sample_id)
    assert got == order


def test_nothing_is_read_ahead_beyond_the_buffers(many) -> None:
    begun = []

    def ids():
        for i in range(10):
            begun.append(i)
            yield f"s{i}"

    with Prefetcher(many, ids(), buffers(many, 2), threads=4) as samples:
        iterator = iter(samples)
        first = next(iterator)
        second = next(iterator)
        time.sleep(0.05)
        assert begun == [0, 1]
        with pytest.raises(ValueError, match="all 2 buffers hold samples that were not released"):
            next(iterator)
        first.release()
        first.release()
        third = next(samples.__iter__())
        assert third.sample_id == "s2"
        assert begun == [0, 1, 2]
        assert second.arrays["n"] == 1


def test_the_first_error_in_order_is_raised_in_its_place(many) -> None:
    folder = many.path / many.record("s3").folder / "x"
    chunk = folder / "c.4.0"
    chunk.write_bytes(chunk.read_bytes()[:-5] + b"?" + chunk.read_bytes()[-4:])
    got = []
    before = threading.active_count()
    with Prefetcher(many, ["s1", "s2", "s3", "s4", "gone"], buffers(many, 5), threads=4) as samples:
        iterator = iter(samples)
        got += [next(iterator).sample_id, next(iterator).sample_id]
        with pytest.raises(CorruptSampleError, match=r"sample 's3', field 'x': object x/c.4.0"):
            next(iterator)
    assert got == ["s1", "s2"]
    assert threading.active_count() == before


def test_field_selection_missing_samples_small_buffers_and_failing_orders(many) -> None:
    def fails():
        yield "s1"
        raise RuntimeError("no more")

    with Prefetcher(many, ["s5"], buffers(many, 2), fields=["n"]) as samples:
        assert [list(sample.arrays) for sample in samples] == [["n"]]
    with pytest.raises(SampleNotFoundError), Prefetcher(many, ["gone"], buffers(many, 1)) as samples:
        list(samples)
    with (
        pytest.raises(ValueError, match=r"needs a flat uint8 buffer of 896 bytes, got uint8\[800\]"),
        Prefetcher(many, ["s1"], [np.empty(800, np.uint8)]) as samples,
    ):
        list(samples)
    with pytest.raises(RuntimeError, match="no more"), Prefetcher(many, fails(), buffers(many, 4)) as samples:
        list(samples)
    with pytest.raises(ValueError, match="needs a buffer"):
        Prefetcher(many, [], [])
    with pytest.raises(ValueError, match="inside its `with`"):
        next(iter(Prefetcher(many, [], buffers(many, 1))))


def test_a_source_of_the_callers_own_reads_from_several_stores(many, tmp_path) -> None:
    """Keys are the caller's; a sample may have no task at all, or one that reads nothing."""
    with CacheWriter(tmp_path / "other", fields=[Field(name="y", dtype="int8", axes=("i",))], identity={}) as writer:
        writer.write("only", {"y": np.array([5, 6], np.int8)})
    other = CacheReader(tmp_path / "other")

    class Source:
        def views(self, key, buffer, fields=None):
            reader, name = key
            return reader.views(name, buffer, fields) if reader is not None else {}

        def plan(self, key, fields=None, *, out=None):
            reader, name = key
            if reader is None:
                return SampleRead(arrays={"made": np.array(name)}, tasks=[])
            read = reader.plan(name, fields, out=out)
            extra = np.zeros((), np.int64)
            return SampleRead(
                arrays={**read.arrays, "extra": extra}, tasks=[*read.tasks, lambda: extra.__iadd__(len(name))]
            )

    order = [(many, "s3"), (other, "only"), (None, "z"), (many, "s4")]
    got = []
    with Prefetcher(Source(), order, buffers(many, 3), threads=3) as samples:
        for sample in samples:
            with sample:
                assert sample.sample_id is order[len(got)]
                got.append({name: array.tolist() for name, array in sample.arrays.items() if name != "x"})
    assert got == [
        {"n": 3, "t": "text 3", "extra": 2},
        {"y": [5, 6], "extra": 4},
        {"made": "z"},
        {"n": 4, "t": "text 4", "extra": 2},
    ]


def test_leaving_early_ends_all_threads(many) -> None:
    before = threading.active_count()
    for _ in range(20):
        with Prefetcher(many, [f"s{i}" for i in range(10)], buffers(many, 4), threads=4) as samples:
            next(iter(samples))
    assert threading.active_count() == before
