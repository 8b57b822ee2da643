"""Parts of a field's first axis: the same bits as of the whole, and no chunk is opened that holds none of them."""

import numpy as np
import pytest

from cache_store import CacheReader, CacheWriter, CorruptSampleError, Field

LAYERS, CHUNK = 11, 3
RANGES = {
    "first": [(0, 2)],
    "whole chunk": [(3, 6)],
    "every third": [(0, 1), (3, 4), (6, 7), (9, 10)],
    "over an edge": [(2, 4), (8, 11)],
    "all": [(0, 11)],
}


@pytest.fixture(scope="module", params=["none", "zstd"])
def reader(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges") / "s"
    fields = [
        Field(name="kv", dtype="bfloat16", axes=("layer", "x"), chunk_mb=CHUNK * 20e-6, compression=request.param),
        Field(name="t", dtype="int64", layout="packed"),
    ]
    values = {"kv": np.random.default_rng(0).integers(0, 2**16, (LAYERS, 10)).astype(np.uint16), "t": np.asarray(3)}
    with CacheWriter(path, fields=fields, identity={}) as writer:
        writer.write("a", values)
    return CacheReader(path)


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_parts_have_the_bits_of_the_whole_and_touch_only_their_chunks(reader, ranges, monkeypatch):
    whole = reader.read("a", ["kv"])["kv"]
    opened = []
    read_into = type(reader._storage).read_into

    def counted(storage, path, *args, **options):
        opened.append(path.rpartition("/")[2])
        return read_into(storage, path, *args, **options)

    monkeypatch.setattr(type(reader._storage), "read_into", counted)
    wanted = {"kv": ranges}
    out = reader.views("a", np.zeros(reader.buffer_bytes("a", ["kv"], ranges=wanted), np.uint8), ["kv"], ranges=wanted)
    got = reader.read("a", ["kv", "t"], out=out, ranges=wanted, threads=2)
    assert got["kv"] is out["kv"]
    assert np.array_equal(got["kv"], np.concatenate([whole[first:end] for first, end in ranges]))
    assert int(got["t"]) == 3
    rows = reader.fields["kv"].chunk_shape(whole.shape)[0]
    expected = {f"c.{layer // rows}.0" for first, end in ranges for layer in range(first, end)}
    assert {name for name in opened if name.startswith("c.") and name.endswith(".0") and name != "c.0"} == expected


@pytest.mark.parametrize("ranges", [[(0, 12)], [(3, 4), (0, 1)], [(-1, 2)], []])
def test_ranges_that_there_are_not_are_refused(reader, ranges):
    with pytest.raises(ValueError, match=r"ranges of field 'kv' of sample 'a' are .* within 11"):
        reader.read("a", ["kv"], ranges={"kv": ranges})
    with pytest.raises(ValueError, match="ranges of field 't'"):
        reader.read("a", ["t"], ranges={"t": [(0, 1)]})


def test_a_flipped_bit_beside_a_wanted_part_of_its_chunk_is_found(reader):
    file = next(reader.path.glob("samples/*/kv/c.1.0"))
    data = file.read_bytes()
    try:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert len(reader.read("a", ["kv"], ranges={"kv": [(0, 2)]})["kv"]) == 2
        with pytest.raises(CorruptSampleError, match=r"c\.1\.0"):
            reader.read("a", ["kv"], ranges={"kv": [(5, 6)]})
    finally:
        file.write_bytes(data)
