"""Reading samples: the store beside raw `readinto`, `readinto` with CRC-32C, and other libraries.

All read the same bytes in the same threads into the same prepared buffers, whole samples per thread. Readers take
turns, so that whatever else the machine does affects all of them. Cold means that the pages were evicted before.
"""

import importlib.util
import os
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_report import arguments, finish

from cache_store import CacheReader, CacheWriter, Field, Prefetcher
from cache_store.checksum import crc32c
from cache_store.storage.local_storage import BLOCK_BYTES

Read = Callable[[str, np.ndarray], Any]
FIELDS = [Field(name="kv", dtype="bfloat16", axes=("layer", "key_value", "kv_head", "token", "channel"))]
LAYER_BYTES_A_TOKEN = 36 * 2 * 8 * 128 * 2


def make_store(path: Path, sample_mb: float, count: int) -> CacheReader:
    tokens = round(sample_mb * 1e6 / LAYER_BYTES_A_TOKEN)
    rng = np.random.default_rng(0)
    kv = rng.integers(0, 2**16, (36, 2, 8, tokens, 128), dtype=np.uint16)
    with CacheWriter(path, fields=FIELDS, identity={}) as writer:
        for i in range(count):
            kv[:, :, :, 0] = i
            writer.write(f"s{i:05}", {"kv": kv})
    return CacheReader(path)


def raw_readers(reader: CacheReader) -> dict[str, Read]:
    """The best that any reader of these files can do, without and with checking."""
    chunks = {
        name: [
            reader.path / reader.record(name).folder / stored.path
            for stored in reader.record(name).of_array("kv")
            if stored.is_chunk
        ]
        for name in reader.sample_ids
    }

    def readinto(sample_id: str, buffer: np.ndarray) -> None:
        at = 0
        for path in chunks[sample_id]:
            with open(path, "rb", buffering=0) as file:
                at += file.readinto(buffer[at:])  # type: ignore[arg-type]
            at -= 4

    def readinto_crc(sample_id: str, buffer: np.ndarray) -> None:
        at, view = 0, memoryview(buffer)
        for path in chunks[sample_id]:
            crc, size = 0, path.stat().st_size - 4
            with open(path, "rb", buffering=0) as file:
                for start in range(at, at + size, BLOCK_BYTES):
                    end = min(at + size, start + BLOCK_BYTES)
                    file.readinto(view[start:end])
                    crc = crc32c(view[start:end], crc)
                assert crc == int.from_bytes(file.read(4), "little")
            at += size

    return {"readinto": readinto, "readinto_crc": readinto_crc}


def store_readers(reader: CacheReader) -> dict[str, Read]:
    def direct(sample_id: str, buffer: np.ndarray) -> None:
        reader.read(sample_id, out=reader.views(sample_id, buffer))

    return {"direct": direct}


def other_readers(reader: CacheReader, folder: Path) -> dict[str, Read]:
    """Other installed libraries on the same store, and safetensors on files of its own."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype

    def place(sample_id: str) -> str:
        return str(reader.path / reader.record(sample_id).folder / "kv")

    def through_zarr(sample_id: str, buffer: np.ndarray) -> None:
        out = reader.views(sample_id, buffer)["kv"]
        array = zarr.open_array(place(sample_id), mode="r")
        array.get_basic_selection(..., out=default_buffer_prototype().nd_buffer.from_numpy_array(out))

    readers: dict[str, Read] = {"zarr": through_zarr}
    if importlib.util.find_spec("zarr.core.codec_pipeline") and hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):

        def fused(sample_id: str, buffer: np.ndarray) -> None:
            with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}):
                through_zarr(sample_id, buffer)

        readers["zarr_fused"] = fused
    if importlib.util.find_spec("tensorstore"):
        import tensorstore

        def through_tensorstore(sample_id: str, buffer: np.ndarray) -> None:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": place(sample_id)}}
            reader.views(sample_id, buffer)["kv"][...] = tensorstore.open(spec).result().read().result()

        readers["tensorstore"] = through_tensorstore
    if importlib.util.find_spec("safetensors"):
        from safetensors.numpy import load_file, save_file

        for name in reader.sample_ids[:4]:
            save_file({"kv": reader.read(name)["kv"]}, folder / f"{name}.safetensors")

        def through_safetensors(sample_id: str, buffer: np.ndarray) -> None:
            file = folder / f"s{int(sample_id[1:]) % min(4, len(reader)):05}.safetensors"
            reader.views(sample_id, buffer)["kv"][...] = load_file(file)["kv"]

        readers["safetensors"] = through_safetensors
    return readers


def evict(path: Path) -> None:
    for item in path.rglob("*"):
        if item.is_file():
            descriptor = os.open(item, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(read: Read, sample_ids: Sequence[str], buffers: Sequence[np.ndarray]) -> float:
    """Seconds for all samples; each of n threads takes every n-th with a buffer of its own."""

    def work(worker: int) -> None:
        for sample_id in sample_ids[worker :: len(buffers)]:
            read(sample_id, buffers[worker])

    with ThreadPoolExecutor(len(buffers)) as pool:
        started = time.perf_counter()
        list(pool.map(work, range(len(buffers))))
        return time.perf_counter() - started


def prefetch(reader: CacheReader, sample_ids: Sequence[str], buffers: Sequence[np.ndarray], threads: int) -> float:
    started = time.perf_counter()
    with Prefetcher(reader, sample_ids, buffers, threads=threads) as samples:
        for sample in samples:
            sample.release()
    return time.perf_counter() - started


def measure(
    reader: CacheReader, folder: Path, *, threads: int, medium: str, rounds: int, others: bool
) -> list[dict[str, Any]]:
    ids = list(reader.sample_ids)
    size = reader.buffer_bytes(ids[0])
    buffers = [np.zeros(size + 64, np.uint8) for _ in range(threads + 2)]
    readers = {**raw_readers(reader), **store_readers(reader)}
    if others:
        readers.update(other_readers(reader, folder))
    rates: dict[str, list[float]] = {name: [] for name in [*readers, "prefetcher"]}
    for turn in range(rounds):
        for name in list(rates) if turn % 2 == 0 else reversed(rates):  # nobody is always first
            if medium == "cold":
                evict(reader.path)
            if name == "prefetcher":
                seconds = prefetch(reader, ids, buffers, threads)
            else:
                seconds = timed(readers[name], ids, buffers[:threads])
            rates[name].append(size * len(ids) / seconds / 1e9)

    def ratio(name: str, base: str) -> float:
        return statistics.median(one / other for one, other in zip(rates[name], rates[base], strict=True))

    return [
        {
            "reader": name,
            "codec": "none",
            "sample_mb": round(size / 1e6),
            "threads": threads,
            "medium": medium,
            "gb_s": statistics.median(gb_s),
            "of_readinto": ratio(name, "readinto"),
            "of_readinto_crc": ratio(name, "readinto_crc"),
            "extra_memory": extra_memory(readers[name], ids[0], buffers[0]) if name in readers else None,
            "working_set_gb": size * len(ids) / 1e9,
        }
        for name, gb_s in rates.items()
    ]


def extra_memory(read: Read, sample_id: str, buffer: np.ndarray) -> float:
    """Peak memory of one read beyond the buffer, as a share of the sample (what Python and numpy allocate)."""
    tracemalloc.start()
    read(sample_id, buffer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / len(buffer)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dir", type=Path, help="where the working set is made")
    parser.add_argument("--cold-gb", type=float, default=20.5)
    parser.add_argument("--sizes", type=float, nargs="+", default=[60, 118, 442])
    parser.add_argument("--media", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="cold uses the largest number alone")
    parser.add_argument("--bare", action="store_true", help="raw reading and the store alone")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of warm reading")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for sample_mb in [60] if options.quick else options.sizes:
        for medium in options.media:
            gigabytes = 0.5 if options.quick else 2.0 if medium == "warm" else options.cold_gb
            folder = Path(tempfile.mkdtemp(dir=options.dir))
            try:
                reader = make_store(
                    folder / "store", sample_mb, max(2 * max(options.threads), round(gigabytes * 1000 / sample_mb))
                )
                for threads in options.threads if medium == "warm" else [max(options.threads)]:
                    rounds = 3 if options.quick else options.rounds if medium == "warm" else 2
                    rows += measure(
                        reader,
                        folder,
                        threads=threads,
                        medium=medium,
                        rounds=rounds,
                        others=medium == "warm" and not options.bare,
                    )
            finally:
                shutil.rmtree(folder)
    finish("store_read", rows, options)


if __name__ == "__main__":
    main()
