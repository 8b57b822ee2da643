"""Opening a store of many samples: the index beside reading the same file raw.

The store is simulated: its index names samples whose records were never written, because opening does not need them.
`mb_held` is the Python and numpy memory that the open reader keeps; ids have 41 characters.
"""

import os
import shutil
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from benchmark_report import arguments, finish

from cache_store import CacheReader, CacheWriter, Field, build_index
from cache_store.format import index
from cache_store.format.index import SampleIds


def simulate(path: Path, count: int) -> None:
    with CacheWriter(path, fields=[Field(name="x", dtype="int8")], identity={}):
        pass
    ids = SampleIds.of(f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}-1e2f-4a5b@{5_100_000 + i}#0" for i in range(count))
    then = time.time() - 10
    os.utime(path / "commits", (then, then))
    listed, index.list_ids = index.list_ids, lambda *_: (ids, ())
    try:
        build_index(path)
    finally:
        index.list_ids = listed


def seconds(action: Any, rounds: int = 5) -> float:
    times_s = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times_s.append(time.perf_counter() - started)
    return statistics.median(times_s)


def held_bytes(path: Path) -> int:
    tracemalloc.start()
    reader = CacheReader(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(reader)
    return held


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = []
    for count in (10**3, 10**4, 10**5, 10**6):
        folder = Path(tempfile.mkdtemp())
        try:
            store = folder / "store"
            simulate(store, count)
            raw_s = seconds((store / index.INDEX).read_bytes)
            open_s = seconds(lambda store=store: CacheReader(store))
            held = held_bytes(store)
        finally:
            shutil.rmtree(folder)
        row = {"samples": count, "open_s": open_s, "raw_read_s": raw_s, "of_raw_read": raw_s / open_s}
        rows.append({**row, "mb_held": held / 1e6, "bytes_a_sample": held / count})
    finish("store_open", rows, options)


if __name__ == "__main__":
    main()
