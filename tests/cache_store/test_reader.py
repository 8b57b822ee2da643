import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_store import (
    CacheReader,
    CacheWriter,
    CorruptSampleError,
    Field,
    FieldNotFoundError,
    IdentityMismatchError,
    SampleNotFoundError,
    StoreNotFoundError,
)
from cache_store.format.field import STORED_DTYPES

SHAPES = [(), (0,), (1,), (5,), (3, 0, 2), (0, 4), (2, 3, 4)]


def group_of(store: Path, sample_id: str) -> Path:
    return store / CacheReader(store).record(sample_id).folder


@pytest.mark.parametrize("layout", ["array", "packed"])
@pytest.mark.parametrize("dtype", list(STORED_DTYPES))
def test_every_dtype_and_shape_comes_back_bit_equal(tmp_path, layout, dtype) -> None:
    fields = [
        Field(name=f"f{i}", dtype=dtype, axes=tuple("abc"[: len(shape)]), layout=layout)
        for i, shape in enumerate(SHAPES)
    ]
    stored = fields[0].stored_dtype
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        if dtype == "bool":
            return np.asarray(rng.integers(0, 2, shape).astype(bool))
        return np.frombuffer(rng.bytes(int(np.prod(shape)) * stored.itemsize), stored).reshape(shape)

    samples = {
        "random": {field.name: random(shape) for field, shape in zip(fields, SHAPES, strict=True)},
        "zero": {field.name: np.zeros(shape, stored) for field, shape in zip(fields, SHAPES, strict=True)},
    }
    with CacheWriter(tmp_path / "s", fields=fields, identity={}) as writer:
        for name, values in samples.items():
            writer.write(name, values)
    reader = CacheReader(tmp_path / "s")
    for name, values in samples.items():
        got = reader.read(name)
        for field in values:
            assert got[field].dtype == stored
            assert got[field].shape == values[field].shape
            assert got[field].tobytes() == values[field].tobytes()


def test_text_comes_back(tmp_path) -> None:
    fields = [
        Field(name="one", dtype="str", layout="text"),
        Field(name="many", dtype="str", axes=("i",), layout="text"),
    ]
    samples = {
        "plain": {"one": "a", "many": ["a", "bcd"]},
        "odd": {"one": "", "many": []},
        "other scripts": {"one": "näher \n 前へ 🚗", "many": ["", " ", '"\\']},
    }
    with CacheWriter(tmp_path / "s", fields=fields, identity={}) as writer:
        for name, values in samples.items():
            writer.write(name, values)
        again = CacheReader(tmp_path / "s").read("odd")
        assert writer.write("copy", again)  # what was read can be written
    reader = CacheReader(tmp_path / "s")
    for name, values in {**samples, "copy": samples["odd"]}.items():
        got = reader.read(name)
        assert got["one"].item() == values["one"]
        assert got["many"].tolist() == values["many"]
        assert reader.shape(name, "many") == (len(values["many"]),)


def test_samples_fields_sizes_and_shapes(store, kit) -> None:
    reader = CacheReader(store)
    assert reader.sample_ids == ("clip/1@5#0", "clip/2@5#0")
    assert (len(reader), "clip/1@5#0" in reader, "clip/9" in reader) == (2, True, False)
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))
    assert reader.read("clip/2@5#0", fields=["note", "length"])["note"].item() == "wet road"
    assert list(reader.read("clip/2@5#0", fields=("length", "tail.a.kv"))) == ["length", "tail.a.kv"]
    assert reader.shape("clip/2@5#0", "kv") == (5, 2, 2, 11, 4)
    assert reader.fields_of("clip/1@5#0") == ("kv", "hidden", "mask", "length", "path", "prompt", "cameras")
    files = [path for path in group_of(store, "clip/1@5#0").rglob("*") if path.is_file()]
    assert reader.size_bytes("clip/1@5#0") == sum(path.stat().st_size for path in files)
    assert (reader.identity, reader.provenance) == (kit.identity, kit.provenance)
    assert dict(reader.fields) == {field.name: field for field in kit.fields()}
    got = reader.read("clip/1@5#0", ["kv"])["kv"]
    got += 1  # arrays are the caller's own


def test_what_is_not_there(store, tmp_path, kit) -> None:
    reader = CacheReader(store)
    with pytest.raises(SampleNotFoundError, match="sample 'clip/9' is not among the 2 committed samples"):
        reader.read("clip/9")
    with pytest.raises(FieldNotFoundError, match="no field 'colour'; it has"):
        reader.read("clip/1@5#0", ["colour"])
    with pytest.raises(FieldNotFoundError, match="was written without field 'note'"):
        reader.shape("clip/1@5#0", "note")
    with pytest.raises(ValueError, match="sequence of names"):
        reader.read("clip/1@5#0", "kv")
    for path in (tmp_path / "nowhere", store / "zarr.json"):
        with pytest.raises(StoreNotFoundError, match="there is no store at"):
            CacheReader(path)
    with pytest.raises(IdentityMismatchError) as caught:
        CacheReader(store, expect_identity={**kit.identity, "frames": 1})
    assert caught.value.differences == ("identity.frames: expected 1, found 4",)
    assert CacheReader(store, expect_identity=kit.identity).identity == kit.identity


def test_plain_zarr_reads_a_committed_sample(store, kit) -> None:
    reader, expected = CacheReader(store), kit.sample(1)
    root = zarr.open_group(store, mode="r")
    assert root.attrs["cache_store"]["format_version"] == 1
    group = root[reader.record("clip/1@5#0").folder]
    assert sorted(group.array_keys()) == ["hidden", "kv", "small"]
    kv = group["kv"]
    assert (kv.attrs["logical_dtype"], kv.metadata.dimension_names) == ("bfloat16", kit.fields()[0].axes)
    assert np.array_equal(kv[...], expected["kv"])
    assert (kv.chunks, kv.shards) == ((2, 2, 2, 7, 4), None)
    assert np.array_equal(group["hidden"][...], expected["hidden"])
    assert group.attrs["sample_id"] == "clip/1@5#0"
    assert group.attrs["text"] == {"prompt": expected["prompt"], "cameras": expected["cameras"]}
    small = group["small"][...].tobytes()
    for entry in group.attrs["small"]:
        count = int(np.prod(entry["shape"]))
        got = np.frombuffer(small, entry["dtype"], count, entry["offset"]).reshape(entry["shape"])
        assert np.array_equal(got, expected[entry["name"]])
        assert entry["offset"] % 8 == 0


def test_reading_one_field_never_touches_another(store, kit) -> None:
    group = group_of(store, "clip/1@5#0")
    reader = CacheReader(store)
    shutil.rmtree(group / "hidden")
    shutil.rmtree(group / "small")
    (group / "zarr.json").unlink()
    assert np.array_equal(reader.read("clip/1@5#0", ["kv"])["kv"], kit.sample(1)["kv"])


def test_a_missing_chunk_is_an_error_and_not_zeros(store) -> None:
    group = group_of(store, "clip/1@5#0")
    reader = CacheReader(store)
    reader.read("clip/1@5#0")
    (group / "kv" / "c.1.0.0.0.0").unlink()
    for chosen in (reader, CacheReader(store)):
        with pytest.raises(
            CorruptSampleError, match=r"sample 'clip/1@5#0', field 'kv': object kv/c.1.0.0.0.0 .* missing"
        ) as caught:
            chosen.read("clip/1@5#0")
        assert (caught.value.sample_id, caught.value.field) == ("clip/1@5#0", "kv")
        assert chosen.read("clip/1@5#0", ["length"])["length"] == 7
    shutil.rmtree(group)
    with pytest.raises(CorruptSampleError, match="missing"):
        reader.read("clip/1@5#0")


@pytest.mark.parametrize("cut", [0, 1, -1])
@pytest.mark.parametrize("name", ["zarr.json", "kv/zarr.json", "kv/c.0.0.0.0.0", "small/c.0"])
def test_a_truncated_or_longer_object_is_an_error(store, name, cut) -> None:
    path = group_of(store, "clip/1@5#0") / name
    data = path.read_bytes()
    path.write_bytes(data + b"x" if cut == 1 else data[:cut])
    with pytest.raises(CorruptSampleError, match=f"{name} .* has .* bytes, expected {len(data)}"):
        CacheReader(store).read("clip/1@5#0")


def test_a_chunk_swapped_for_another_valid_one_is_an_error(store) -> None:
    folder = group_of(store, "clip/1@5#0") / "kv"
    (folder / "c.0.0.0.0.0").write_bytes((folder / "c.1.0.0.0.0").read_bytes())
    with pytest.raises(CorruptSampleError, match="its commit record says"):
        CacheReader(store).read("clip/1@5#0")


def test_the_ids_are_a_snapshot_until_refresh(store, kit) -> None:
    reader = CacheReader(store)
    with kit.writer(store) as writer:
        writer.write("aa", kit.sample(7))
    assert reader.sample_ids == ("clip/1@5#0", "clip/2@5#0")
    with pytest.raises(SampleNotFoundError, match="refresh"):
        reader.read("aa")
    reader.refresh()
    assert reader.sample_ids == ("aa", "clip/1@5#0", "clip/2@5#0")
    kit.assert_equal(reader.read("aa"), kit.sample(7))


def test_a_reader_can_be_pickled_and_the_store_moved(store, kit, tmp_path) -> None:
    reader = pickle.loads(pickle.dumps(CacheReader(store)))
    kit.assert_equal(reader.read("clip/1@5#0"), kit.sample(1))
    store.rename(tmp_path / "moved")
    kit.assert_equal(CacheReader(tmp_path / "moved").read("clip/1@5#0"), kit.sample(1))
