"""Whatever stands in records and metadata, reading ends in the right values or in an error of the store."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_store import CacheReader, CacheStoreError, CacheWriter, Field
from cache_store.document import seal
from cache_store.format.store_root import OPENING

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
LEAVES = LEAVES | st.sampled_from(["../../etc/passwd", "kv/zarr.json", "kv/c.0.0", "/x", "zarr.json", "a\0b"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
X = np.arange(12, dtype=np.int16).reshape(4, 3)


def make(path: Path) -> None:
    fields = [
        Field(name="kv", dtype="int16", axes=("i", "j"), chunk_mb=1e-5),
        Field(name="n", dtype="int8", layout="packed"),
    ]
    template = Path(tempfile.gettempdir()) / f"cache-store-fuzz-{os.getpid()}"
    if not template.exists():
        with CacheWriter(template, fields=fields, identity={"a": 1}) as writer:
            writer.write("s", {"kv": X, "n": np.array(3, np.int8)})
        atexit.register(shutil.rmtree, template)
    shutil.copytree(template, path)  # much faster than forcing it to the disk each time


def replace_at(document: Any, choices: Any, value: Any) -> None:
    """Put a value somewhere in a nested document."""
    node = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[choices.draw(st.integers(0, len(keys) - 1))]
        if not isinstance(node[key], dict | list) or not node[key] or choices.draw(st.booleans()):
            node[key] = value
            return
        node = node[key]


def read_by_record(reader: CacheReader, sample_id: str) -> dict[str, Any]:
    read = reader.plan(sample_id, by_record=True)
    for task in read.tasks:
        task()
    return read.arrays


def read_all(path: Path) -> None:
    for read in (CacheReader.read, read_by_record):
        try:
            reader = CacheReader(path)
            for sample_id in reader.sample_ids:
                got = read(reader, sample_id)
                assert np.array_equal(got.get("kv", X), X)
                assert got.get("n", 3) == 3
        except CacheStoreError:
            pass


@SETTINGS
@given(choices=st.data(), value=VALUES)
def test_sealed_records_with_anything_in_them(choices, value) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        make(path)
        record = next((path / "commits").iterdir())
        document = json.loads(record.read_bytes())
        del document["document_crc32c"]
        replace_at(document, choices, value)
        record.write_bytes(seal(document, "record"))
        read_all(path)


@SETTINGS
@given(choices=st.data(), value=VALUES)
def test_sealed_roots_with_anything_in_them(choices, value) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        make(path)
        document = json.loads((path / "zarr.json").read_bytes())
        del document["attributes"]["document_crc32c"]
        replace_at(document["attributes"]["cache_store"], choices, value)
        (path / "zarr.json").write_bytes(seal(document, "root", opening=OPENING))
        read_all(path)


@SETTINGS
@given(name=st.sampled_from(["zarr.json", "kv/zarr.json", "small/zarr.json"]), choices=st.data(), value=VALUES)
def test_array_metadata_with_anything_in_it(name, choices, value) -> None:
    import google_crc32c

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        make(path)
        record_path = next((path / "commits").iterdir())
        record = json.loads(record_path.read_bytes())
        target = next((path / "samples").glob("s-*")) / name
        document = json.loads(target.read_bytes())
        replace_at(document, choices, value)
        data = json.dumps(document).encode()
        target.write_bytes(data)
        del record["document_crc32c"]
        for item in record["objects"]:
            if item["path"] == name:
                item.update(size=len(data), crc32c=f"{google_crc32c.value(data):08x}")
        record_path.write_bytes(seal(record, "record"))
        read_all(path)


@SETTINGS
@given(data=st.binary(max_size=300))
def test_any_bytes_as_index_or_record(data) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        make(path)
        (path / "index").write_bytes(data)
        assert CacheReader(path).sample_ids == ("s",)
        next((path / "commits").iterdir()).write_bytes(data)
        read_all(path)
        shutil.rmtree(path)
