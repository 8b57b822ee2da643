"""Chunks straight into place: bit-equal to zarr for every dtype, layout of chunks and compression."""

import dataclasses
import json

import numpy as np
import pytest
import zarr

from cache_store import CacheReader, CacheWriter, CorruptSampleError, Field, FormatError
from cache_store.checksum import crc32c
from cache_store.document import seal
from cache_store.format.field import STORED_DTYPES
from cache_store.sample_read import SampleRead

SHAPES = {"scalar": (), "one": (1,), "line": (1001,), "even": (40, 3, 2), "padded": (37, 5), "empty": (0, 4)}


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", sorted(STORED_DTYPES))
def test_bit_equal_to_zarr(tmp_path, dtype, compression) -> None:
    fields = [
        Field(name=name, dtype=dtype, axes=tuple("abc"[: len(shape)]), chunk_mb=0.0002, compression=compression)
        for name, shape in SHAPES.items()
    ]
    stored = fields[0].stored_dtype
    rng = np.random.default_rng(0)
    values = {
        name: (rng.integers(0, 2, shape) if dtype == "bool" else rng.integers(0, 100, shape)).astype(stored)
        for name, shape in SHAPES.items()
    }
    with CacheWriter(tmp_path / "s", fields=fields, identity={}) as writer:
        writer.write("a", {name: np.asarray(value) for name, value in values.items()})
    reader = CacheReader(tmp_path / "s")
    buffer = np.full(reader.buffer_bytes("a"), 255, np.uint8)
    out = reader.views("a", buffer)
    got = reader.read("a", out=out, threads=2)
    for name, value in values.items():
        through_zarr = zarr.open_array(tmp_path / "s" / reader.record("a").folder / name, mode="r")[...]
        assert got[name] is out[name]
        assert got[name].tobytes() == value.tobytes() == through_zarr.tobytes()
        assert reader.read("a", [name])[name].tobytes() == value.tobytes()
        assert run(reader.plan("a", [name], by_record=True)).tobytes() == value.tobytes()


def test_large_chunks_are_checked_block_by_block(tmp_path) -> None:
    x = np.random.default_rng(0).integers(0, 2**16, (9, 100_001)).astype(np.uint16)
    for compression in ("none", "zstd"):
        path = tmp_path / compression
        with CacheWriter(
            path,
            fields=[Field(name="x", dtype="bfloat16", axes=("a", "b"), chunk_mb=0.9, compression=compression)],
            identity={},
        ) as writer:
            writer.write("a", {"x": x})
        reader = CacheReader(path)
        assert np.array_equal(reader.read("a", threads=3)["x"], x)
        folder = path / reader.record("a").folder / "x"
        name = sorted(folder.glob("c.*"))[-1]
        data = bytearray(name.read_bytes())
        for at in (0, 262_144, len(data) // 2, len(data) - 5, len(data) - 1):
            name.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(CorruptSampleError, match="'a', field 'x'"):
                reader.read("a")


def test_compression_makes_smooth_values_smaller_and_other_writers_follow_it(tmp_path) -> None:
    x = np.linspace(0, 1, 200_000, dtype=np.float32).reshape(2, -1)
    field = Field(name="x", dtype="float32", axes=("a", "b"), compression="zstd")
    with CacheWriter(tmp_path / "s", fields=[field], identity={}) as writer:
        writer.write("a", {"x": x})
    with CacheWriter(tmp_path / "s", fields=[Field(name="x", dtype="float32", axes=("a", "b"))], identity={}) as writer:
        writer.write("b", {"x": x})
    reader = CacheReader(tmp_path / "s")
    assert reader.size_bytes("b") - len("b") == reader.size_bytes("a") - len("a") < 0.6 * x.nbytes
    assert np.array_equal(reader.read("b")["x"], x)


def test_out_must_fit(store) -> None:
    reader = CacheReader(store)
    good = np.empty((7, 3), np.float32)
    bad = [good[:, :2], np.empty((7, 3)), np.empty((3, 7), np.float32).T, np.empty((8, 3), np.float32)]
    locked = good.copy()
    locked.flags.writeable = False
    for array in [*bad, locked]:
        with pytest.raises(ValueError, match=r"out of field 'hidden' .* writable C-contiguous float32\[7, 3\]"):
            reader.read("clip/1@5#0", out={"hidden": array})
    with pytest.raises(ValueError, match="which is not read or is text"):
        reader.read("clip/1@5#0", ["kv"], out={"hidden": good})
    mask = np.empty(7, bool)
    got = reader.read("clip/1@5#0", ["hidden", "mask"], out={"hidden": good, "mask": mask})
    assert got["hidden"] is good
    assert got["mask"] is mask
    assert np.array_equal(mask, reader.read("clip/1@5#0", ["mask"])["mask"])


@pytest.mark.parametrize(("at", "message"), [(4, r"claims \(raw, block, stored\) sizes"), (0, "cannot be decoded")])
def test_a_compressed_chunk_that_was_made_wrong_is_named(tmp_path, at, message) -> None:
    """All checksums are right: whoever wrote it meant harm, or had a faulty compressor."""
    field = Field(name="x", dtype="uint8", axes=("i",), compression="zstd")
    with CacheWriter(tmp_path / "s", fields=[field], identity={}) as writer:
        writer.write("a", {"x": np.zeros(1000, np.uint8)})
    chunk = tmp_path / "s" / CacheReader(tmp_path / "s").record("a").folder / "x" / "c.0"
    frame = bytearray(chunk.read_bytes()[:-4])
    frame[at] ^= 255
    chunk.write_bytes(bytes(frame) + crc32c(bytes(frame)).to_bytes(4, "little"))
    (path,) = (tmp_path / "s" / "commits").iterdir()
    document = json.loads(path.read_bytes())
    del document["document_crc32c"]
    (item,) = (item for item in document["objects"] if item["path"] == "x/c.0")
    item["crc32c"] = f"{crc32c(bytes(frame)):08x}"
    path.write_bytes(seal(document, "it"))
    with pytest.raises(CorruptSampleError, match=rf"sample 'a', field 'x': object x/c\.0 .*{message}") as caught:
        CacheReader(tmp_path / "s").read("a")
    assert (caught.value.sample_id, caught.value.field) == ("a", "x")


def test_data_may_be_left_to_the_caller_to_check(tmp_path) -> None:
    x = np.random.default_rng(0).integers(0, 256, 1001).astype(np.uint8)
    with CacheWriter(
        tmp_path / "s", fields=[Field(name="x", dtype="uint8", axes=("a",), chunk_mb=0.0002)], identity={}
    ) as writer:
        writer.write("a", {"x": x})
    reader = CacheReader(tmp_path / "s")
    read = reader.plan("a", ["x"], unchecked=["x"])
    assert len(read.tasks) * -(-len(x) // len(read.tasks)) > len(x), "the last chunk ends in padding"
    for task in read.tasks:
        task()
    assert np.array_equal(read.arrays["x"], x)
    starts, sizes, crcs = read.unchecked["x"].T.tolist()
    assert (starts, sum(sizes)) == (np.cumsum([0, *sizes[:-1]]).tolist(), len(x))
    for start, size, crc in zip(starts, sizes, crcs, strict=True):
        assert crc32c(x[start : start + size]) == crc

    chunks = (tmp_path / "s" / reader.record("a").folder / "x").glob("c.*")
    last = max(chunks, key=lambda path: int(path.name.removeprefix("c.")))
    data = bytearray(last.read_bytes())
    last.write_bytes(bytes([data[0] ^ 4]) + data[1:])
    assert not np.array_equal(run(reader.plan("a", ["x"], unchecked=["x"])), x), "the caller's to find"
    for at, message in ((len(data) - 5, "ends in padding that is not zeros"), (len(data) - 1, "commit record says")):
        last.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(CorruptSampleError, match=message):
            run(reader.plan("a", ["x"], unchecked=["x"]))


def test_by_the_record_a_sample_is_read_without_its_documents(store) -> None:
    """They say to other readers what the record says; `read` and `verify` go on looking at them."""
    sample_id = "clip/1@5#0"
    reader = CacheReader(store)
    values = reader.read(sample_id)
    text = [name for name in values if reader.fields[name].layout == "text"]
    others = [name for name in values if name not in text]
    assert text
    assert {reader.fields[name].layout for name in others} == {"array", "packed"}
    folder = store / reader.record(sample_id).folder
    for document in folder.rglob("zarr.json"):
        document.write_bytes(b"{}")
    read = reader.plan(sample_id, others, by_record=True)
    for task in read.tasks:
        task()
    for name in others:
        assert np.array_equal(read.arrays[name], values[name])
    with pytest.raises(CorruptSampleError, match="expected"):
        reader.plan(sample_id, [*others, *text], by_record=True)
    for name in others:
        with pytest.raises(CorruptSampleError):
            reader.read(sample_id, [name])
    for chunk in folder.rglob("c.*"):
        data = chunk.read_bytes()
        chunk.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(CorruptSampleError):
            run(reader.plan(sample_id, others, by_record=True))
        chunk.write_bytes(data)


def test_a_record_whose_chunks_do_not_fit_is_refused(store) -> None:
    reader = CacheReader(store)
    sample_id = "clip/1@5#0"
    record = reader.record(sample_id)
    for path, stored in record.objects.items():
        if not stored.is_chunk:
            continue
        without = {key: one for key, one in record.objects.items() if key != path}
        larger = record.objects | {path: dataclasses.replace(stored, size=stored.size + 1)}
        for objects in (without, larger):
            reader._records[sample_id] = dataclasses.replace(record, objects=objects)
            with pytest.raises(FormatError, match=r"the record names (other|another)"):
                reader.plan(sample_id, by_record=True)
    reader._records[sample_id] = record
    reader.plan(sample_id, by_record=True)


def test_much_padding_and_compressed_data_are_always_checked(tmp_path) -> None:
    wide = Field(name="wide", dtype="float32", axes=("a", "b"), chunk_mb=0.002)
    packed = Field(name="packed", dtype="float32", axes=("a", "b"), chunk_mb=0.002, compression="zstd")
    values = np.ones((37, 50), np.float32)
    with CacheWriter(tmp_path / "s", fields=[wide, packed], identity={}) as writer:
        writer.write("a", {"wide": values, "packed": values})
    assert CacheReader(tmp_path / "s").plan("a", unchecked=["wide", "packed"]).unchecked == {}


def run(read: SampleRead) -> np.ndarray:
    for task in read.tasks:
        task()
    return next(iter(read.arrays.values()))
