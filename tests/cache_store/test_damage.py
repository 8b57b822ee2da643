"""Flipped bits in every kind of object, and stores that mean harm."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_store import (
    CacheReader,
    CorruptSampleError,
    FormatError,
    UnreadableSampleError,
    build_index,
    info,
    verify,
)
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


@pytest.mark.system
def test_a_flipped_bit_in_the_root_is_refused_at_opening(store) -> None:
    data = (store / "zarr.json").read_bytes()
    for bit in range(0, len(data) * 8, 5):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (store / "zarr.json").write_bytes(changed)
        with pytest.raises(FormatError, match=r"zarr.json"):
            CacheReader(store)


def assert_one_is_lost(store: Path, kit: Any, match: str) -> None:
    """The sample with the bad record is named and raises; the other is none the worse."""
    reader = CacheReader(store)
    (error,) = reader.unreadable
    assert isinstance(error, CorruptSampleError)
    assert error.sample_id == SAMPLE
    assert reader.sample_ids == (SAMPLE, "clip/2@5#0")  # so the order of the others stays what it was
    with pytest.raises(CorruptSampleError, match=match) as caught:
        reader.read(SAMPLE)
    assert caught.value.sample_id == SAMPLE
    assert reader.read("clip/2@5#0", ["length"])["length"] == 11


def test_a_flipped_bit_in_a_record_costs_its_sample_only(store, kit) -> None:
    path = record_path(store)
    data = path.read_bytes()
    for bit in range(0, len(data) * 8, 31):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert_one_is_lost(store, kit, path.name)
    report = verify(store)
    assert [damage.object for damage in report.damaged] == [str(path.relative_to(store))]
    assert report.orphans == ()  # whose data there are cannot be told


@pytest.mark.system
@pytest.mark.parametrize("content", [b"", bytes(4096), b"[]"])
def test_the_id_of_a_record_that_is_gone_to_the_last_byte_is_found_in_the_sample(store, kit, content) -> None:
    path = record_path(store)
    path.write_bytes(content)
    assert_one_is_lost(store, kit, path.name)
    assert build_index(store) == 2
    assert len(CacheReader(store)) == 2
    (next((store / "samples").glob("clip_1*")) / "zarr.json").unlink()
    (store / "index").unlink()
    reader = CacheReader(store)  # now nothing tells it
    assert reader.sample_ids == ("clip/2@5#0",)
    assert [(error.sample_id, path.name in str(error)) for error in reader.unreadable] == [("", True)]
    assert build_index(store) == 1
    assert len(CacheReader(store).unreadable) == 1  # such an index is never fresh


def test_a_record_of_a_bad_sector_costs_its_sample_only(store, kit, monkeypatch) -> None:
    real = os.open

    def failing(path, *args, **kwargs):
        if "commits/clip_1" in os.fspath(path):
            raise OSError(errno.EIO, "Input/output error", os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    reader = CacheReader(store)
    assert [(type(error), error.sample_id) for error in reader.unreadable] == [(UnreadableSampleError, SAMPLE)]
    with pytest.raises(UnreadableSampleError, match=r"cannot be read \(Input/output error\)"):
        reader.read(SAMPLE)
    assert info(store).samples == 1
    assert SAMPLE in info(store).unreadable[0]


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
def test_escaping_object_paths_are_refused(store, kit, path) -> None:
    rewrite(record_path(store), lambda document: document["objects"][1].update(path=path))
    assert_one_is_lost(store, kit, "is not the path of an object")


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
def test_hostile_records_are_refused(store, kit, change, message) -> None:
    rewrite(record_path(store), lambda document: document.update(change))
    assert_one_is_lost(store, kit, message)
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
    with pytest.raises(CorruptSampleError, match="symbolic link"):
        reader.read(SAMPLE, ["kv"])
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(CorruptSampleError, match="not a regular file"):
        reader.read(SAMPLE, ["kv"])
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(CorruptSampleError, match="not a regular file") as lost:
        reader.read(SAMPLE, ["kv"])
    assert lost.value.sample_id == SAMPLE  # what skips damaged samples loses this one alone
    chunk.rmdir()
    outside.rename(chunk)
    reader.read(SAMPLE, ["kv"])
    (group / "hidden").rename(tmp_path / "hidden")
    (group / "hidden").symlink_to(tmp_path / "hidden")
    with pytest.raises(CorruptSampleError, match="not a real folder"):
        reader.read(SAMPLE, ["hidden"])
    assert len(verify(store).damaged) == 2
    (store / "commits").rename(tmp_path / "commits")
    (store / "commits").symlink_to(tmp_path / "commits")
    with pytest.raises(FormatError, match="not a real folder"):
        CacheReader(store)


def test_a_huge_record_is_refused_unread(store, kit) -> None:
    with record_path(store).open("r+b") as file:
        file.truncate(MAX_DOCUMENT_BYTES * 1000)
    assert_one_is_lost(store, kit, "at most")


def test_a_store_copied_in_part_is_named(store) -> None:
    for path in (store / "commits").iterdir():
        path.unlink()
    (store / "commits").rmdir()
    with pytest.raises(FormatError, match="copied only in part"):
        CacheReader(store)
