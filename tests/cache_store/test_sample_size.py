"""What is planned of a sample against what a writer stores of it."""

import numpy as np
import pytest

from cache_store import CacheWriter, Field, info
from cache_store.sample_size import sample_size

FIELDS = [
    Field(name="kv", dtype="bfloat16", axes=("layer", "token"), chunk_mb=0.01),
    Field(name="scalar", dtype="float32"),
    Field(name="length", dtype="int64", layout="packed"),
    Field(name="picture", dtype="uint8", axes=("byte",), layout="packed", required=False),
    Field(name="names", dtype="str", axes=("camera",), layout="text"),
]


@pytest.mark.parametrize("shape", [(1, 1), (37, 333), (5, 4000), (0, 3)])
@pytest.mark.parametrize("picture", [None, 13])
def test_bytes_by_field_are_those_that_are_written(shape, picture, tmp_path):
    small = {"names": ["front", "réar"], "length": np.int64(3)}
    if picture is not None:
        small["picture"] = np.ones(picture, np.uint8)
    arrays = {"kv": np.ones(shape, np.uint16), "scalar": np.float32(1)}
    fields = {field.name: field for field in FIELDS}
    planned = sample_size("clip@1#0", small, {"kv": shape, "scalar": ()}, fields)
    with CacheWriter(tmp_path / "store", fields=FIELDS, identity={}, provenance={}) as writer:
        writer.write("clip@1#0", small | arrays)
    written = info(tmp_path / "store").size_by_field
    assert {name: size for name, size in written.items() if size} == planned
