import numpy as np
import pytest

from cache_store import CacheReader, CacheWriter, Field, info
from cache_store.upkeep.store_info import sample_size


def test_sizes_by_field_add_up(store, kit) -> None:
    with kit.writer(store) as writer:
        writer.quarantine("bad", "short_clip", "3 s", "")
    summary = info(store)
    reader = CacheReader(store)
    assert (summary.samples, summary.format_version) == (2, 1)
    assert summary.size_bytes == sum(reader.size_bytes(item) for item in reader.sample_ids)
    assert sum(summary.size_by_field.values()) == summary.size_bytes
    assert (summary.size_by_field["length"], summary.size_by_field["mask"], summary.size_by_field["path"]) == (
        16,
        18,
        192,
    )
    assert summary.size_by_field["kv"] > 5 * 2 * 2 * (7 + 11) * 4 * 2
    assert (summary.samples_by_field["kv"], summary.samples_by_field["note"]) == (2, 1)
    assert (summary.quarantined, summary.quarantined_by_kind) == (1, {"short_clip": 1})
    assert (summary.identity, summary.provenance) == (kit.identity, kit.provenance)


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
