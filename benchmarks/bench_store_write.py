"""Writing samples: the store's whole commit protocol beside `write` and one `fsync` of the same bytes in one file."""

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_store_read import FIELDS, LAYER_BYTES_A_TOKEN
from benchmark_report import arguments, finish

from cache_store import CacheWriter


def raw(path: Path, kv: np.ndarray) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    rest = memoryview(kv.reshape(-1).view(np.uint8))
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dir", type=Path, help="where the samples are written")
    options = parser.parse_args()
    sample_mb, count = (30, 4) if options.quick else (118, 12)
    tokens = round(sample_mb * 1e6 / LAYER_BYTES_A_TOKEN)
    kv = np.random.default_rng(0).integers(0, 2**16, (36, 2, 8, tokens, 128), dtype=np.uint16)
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    rates: dict[str, list[float]] = {"raw": [], "store": [], "store_zstd": []}
    try:
        plain = CacheWriter(folder / "plain", fields=FIELDS, identity={})
        packed = CacheWriter(folder / "packed", fields=[replace(FIELDS[0], compression="zstd")], identity={})
        for i in range(count):  # in turns, so that whatever else the machine does affects all of them
            for name in rates:
                started = time.perf_counter()
                if name == "raw":
                    raw(folder / f"{i}", kv)
                else:
                    (plain if name == "store" else packed).write(f"s{i}", {"kv": kv})
                rates[name].append(kv.nbytes / (time.perf_counter() - started) / 1e9)
    finally:
        shutil.rmtree(folder)
    rows = [
        {
            "writer": name,
            "sample_mb": round(kv.nbytes / 1e6),
            "gb_s": statistics.median(gb_s),
            "of_raw": statistics.median(one / other for one, other in zip(gb_s, rates["raw"], strict=True)),
        }
        for name, gb_s in rates.items()
    ]
    finish("store_write", rows, options)


if __name__ == "__main__":
    main()
