"""The package is light: no torch and no zarr ever, its own libraries only once they are needed."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "alpacache", "transformers", "zarr", "obstore", "boto3")
LATER = ("awscrt", "_awscrt", "numcodecs")


def loaded_after(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules are loaded once this code has run in a fresh interpreter."""
    code = f"import sys\n{code}\nprint(*sorted(set({names!r}) & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_loads_no_library_but_numpy() -> None:
    assert loaded_after("import cache_store", HEAVY + LATER) == []
    assert loaded_after("import cache_store", ("numpy",)) == ["numpy"]


@pytest.mark.parametrize(("compression", "needed"), [("none", []), ("zstd", ["numcodecs"])])
def test_writing_and_reading_loads_what_it_needs(tmp_path, compression, needed) -> None:
    code = f"""
import numpy as np
from cache_store import CacheReader, CacheWriter, Field
field = Field(name="x", dtype="int8", axes=("i",), compression={compression!r})
with CacheWriter({str(tmp_path / "s")!r}, fields=[field], identity={{}}) as writer:
    writer.write("a", {{"x": np.arange(3, dtype=np.int8)}})
assert CacheReader({str(tmp_path / "s")!r}).read("a")["x"].tolist() == [0, 1, 2]
"""
    assert loaded_after(code, (*HEAVY, "numcodecs")) == needed
