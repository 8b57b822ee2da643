"""Flipped bits in every kind of object, and stores that mean harm."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_store import CacheReader, CorruptSampleError, FormatError, verify
from cache_store.document import MAX_DOCUMENT_BYTES, seal

SAMPLE = "clip/1@5#0"
FIELDS = {"kv": "kv", "hidden": "hidden", "small": "mask, length, path"}


def record_path(store: Path) -> Path:
    return store / "commits" / (Path(CacheReader(store).record(SAMPLE).folder).name.rpartition(".")[0] + ".json")


def rewrite(path: Path, change: Any, *, opening: bytes = b"{") -> None:
    """Change a sealed document and seal it again, as someone with bad intent would."""
    document = json.loads(path.read_bytes())
    document.pop("document_crc32c", None)
    document.get("attributes", {}).pop("document_crc32c", None)
    change(document)
    path.write_bytes(seal(document, "it", opening=opening))


def test_a_flipped_bit_in_any_object_of_a_sample_is_named(store) -> None:
    reader = CacheReader(store)
    group = store / reader.record(SAMPLE).folder
    rng = np.random.default_rng(0)
    flips = 0
    for path in sorted(group.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        for bit in {0, len(data) * 8 - 1, *rng.integers(0, len(data) * 8, 8).tolist()}:
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            array = path.parent.name if path.parent != group else ""
            with pytest.raises(CorruptSampleError, match=f"sample '{SAMPLE}', field") as caught:
                reader.read(SAMPLE)
            assert caught.value.sample_id == SAMPLE
            assert caught.value.field == FIELDS.get(array, "mask, length, path, prompt, cameras")
            flips += 1
        report = verify(store, deep=True)
        assert [damage.object for damage in report.damaged] == [str(path.relative_to(store))]
        assert report.damaged[0].sample_id == SAMPLE
        path.write_bytes(data)
    assert flips == 9 * 10
    assert verify(store, deep=True).ok


@pytest.mark.parametrize("name", ["zarr.json", "record"])
def test_a_flipped_bit_in_root_or_record_is_refused_at_opening(store, name) -> None:
    path = record_path(store) if name == "record" else store / name
    data = path.read_bytes()
    for bit in range(0, len(data) * 8, 5):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(FormatError, match=path.name):
            CacheReader(store)
    if name == "record":
        (damage,) = verify(store).damaged
        assert damage.object == str(path.relative_to(store))
        assert len(verify(store).orphans) == 1


def test_a_newer_format_version_is_refused(store) -> None:
    rewrite(
        store / "zarr.json",
        lambda document: document["attributes"]["cache_store"].update(format_version=2),
        opening=b'{"attributes":{',
    )
    with pytest.raises(FormatError, match=r"format version 2; this library reads up to 1. Update it."):
        CacheReader(store)


def test_a_root_changed_by_another_tool_is_refused(store) -> None:
    document = json.loads((store / "zarr.json").read_bytes())
    (store / "zarr.json").write_text(json.dumps(document, indent=2))
    with pytest.raises(FormatError, match="changed by another tool"):
        CacheReader(store)


@pytest.mark.parametrize(
    "path",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "kv/../../x/c.0",
        "kv/c.0/../c.1",
        "",
        "c.0",
        ".hidden/c.0",
        "kv//c.0",
        "kv/c.0\n",
    ],
)
def test_escaping_object_paths_are_refused(store, path) -> None:
    rewrite(record_path(store), lambda document: document["objects"][1].update(path=path))
    with pytest.raises(FormatError, match="is not the path of an object"):
        CacheReader(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attempt": "../../../../tmp/xxx"}, "not an attempt"),
        ({"sample_id": "other"}, "whose file name is"),
        ({"sample_id": ""}, "non-empty"),
        ({"fingerprint": "0" * 64}, "another store"),
        ({"objects": []}, "zarr.json"),
        ({"objects": [{"path": "zarr.json", "size": -1, "crc32c": "00000000"}]}, "not a size"),
        ({"objects": [{"path": "zarr.json", "size": 9, "crc32c": "0"}]}, "not the CRC-32C"),
        ({"objects": [7]}, "exactly the keys"),
        ({"fields": []}, "lacks the required fields"),
        ({"fields": [{"name": "kv", "shape": [2**50, 1, 1, 1, 1]}]}, "not a shape"),
        ({"fields": [{"name": "kv", "shape": [2**30, 2**30, 1, 1, 1]}]}, "not a shape"),
        ({"fields": [{"name": "kv", "shape": [True, 1, 1, 1, 1]}]}, "not a shape"),
        ({"fields": [{"name": "kv", "shape": [1]}]}, "not a shape"),
        ({"fields": [{"name": "evil", "shape": []}]}, "schema lacks"),
        ({"fields": 3}, "'fields' should be list"),
    ],
)
def test_hostile_records_are_refused(store, change, message) -> None:
    rewrite(record_path(store), lambda document: document.update(change))
    with pytest.raises(FormatError, match=message):
        CacheReader(store)
    assert len(verify(store).damaged) == 1


def test_an_absurd_shape_is_refused_before_anything_is_allocated(store) -> None:
    def inflate(document: dict[str, Any]) -> None:
        document["fields"][0]["shape"] = [2**40, 2, 2, 7, 4]

    rewrite(record_path(store), inflate)
    with pytest.raises(FormatError, match=r"field 'kv'.* is not the metadata"):
        CacheReader(store).read(SAMPLE, ["kv"])


def test_a_record_that_leaves_out_a_chunk_is_refused(store) -> None:
    def drop(document: dict[str, Any]) -> None:
        document["objects"] = [item for item in document["objects"] if item["path"] != "kv/c.1.0.0.0.0"]

    rewrite(record_path(store), drop)
    with pytest.raises(FormatError, match="takes 3 chunks"):
        CacheReader(store).read(SAMPLE, ["kv"])
    assert not verify(store, deep=True).ok


def test_links_and_special_files_are_refused(store, tmp_path) -> None:
    reader = CacheReader(store)
    group = store / reader.record(SAMPLE).folder
    chunk = group / "kv" / "c.0.0.0.0.0"
    outside = tmp_path / "outside"
    chunk.rename(outside)
    chunk.symlink_to(outside)
    with pytest.raises(FormatError, match="symbolic link"):
        reader.read(SAMPLE, ["kv"])
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(FormatError, match="not a regular file"):
        reader.read(SAMPLE, ["kv"])
    chunk.unlink()
    outside.rename(chunk)
    reader.read(SAMPLE, ["kv"])
    (group / "hidden").rename(tmp_path / "hidden")
    (group / "hidden").symlink_to(tmp_path / "hidden")
    with pytest.raises(FormatError, match="not a real folder"):
        reader.read(SAMPLE, ["hidden"])
    assert len(verify(store).damaged) == 2
    (store / "commits").rename(tmp_path / "commits")
    (store / "commits").symlink_to(tmp_path / "commits")
    with pytest.raises(FormatError, match="not a real folder"):
        CacheReader(store)


def test_a_huge_record_is_refused_unread(store) -> None:
    with record_path(store).open("r+b") as file:
        file.truncate(MAX_DOCUMENT_BYTES * 1000)
    with pytest.raises(FormatError, match="at most"):
        CacheReader(store)


def test_a_store_copied_in_part_is_named(store) -> None:
    for path in (store / "commits").iterdir():
        path.unlink()
    (store / "commits").rmdir()
    with pytest.raises(FormatError, match="copied only in part"):
        CacheReader(store)
