"""The package is light: no torch ever, no zarr before something is read."""

import subprocess
import sys


def test_import_loads_neither_torch_nor_zarr() -> None:
    code = "import sys, cache_store; print(sorted({'torch', 'zarr', 'alpacache', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_writing_and_reading_loads_no_torch(tmp_path) -> None:
    code = f"""
import sys
import numpy as np
from cache_store import CacheReader, CacheWriter, Field
with CacheWriter({str(tmp_path / "s")!r}, fields=[Field(name="x", dtype="int8", axes=("i",))], identity={{}}) as writer:
    writer.write("a", {{"x": np.arange(3, dtype=np.int8)}})
assert "zarr" not in sys.modules
print(CacheReader({str(tmp_path / "s")!r}).read("a")["x"].tolist())
print(sorted({{"torch", "alpacache"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 1, 2]\n[]\n"
