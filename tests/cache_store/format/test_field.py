import math

import pytest

from cache_store import Field, FormatError


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "small"},
        {"name": "../x"},
        {"name": ""},
        {"name": "zarr.json/x"},
        {"dtype": "object"},
        {"dtype": "str"},
        {"layout": "sharded"},
        {"layout": "text", "dtype": "int8"},
        {"layout": "text", "dtype": "str", "axes": ("a", "b")},
        {"axes": ("",)},
        {"chunk_mb": 0},
        {"chunk_mb": 1001},
    ],
)
def test_bad_fields_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="field"):
        Field(**{"name": "x", "dtype": "int8", "axes": ("i",), **wrong})


def test_json_round_trip_and_unknown_keys() -> None:
    field = Field(name="kv", dtype="bfloat16", axes=("layer", "token"), units="1", chunk_mb=8, required=False)
    assert Field.from_json(field.to_json(), "here") == field
    with pytest.raises(FormatError, match="exactly the keys"):
        Field.from_json({**field.to_json(), "codec": "zip"}, "here")
    with pytest.raises(FormatError, match="'required' should be bool"):
        Field.from_json({**field.to_json(), "required": 1}, "here")


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((36, 2, 8, 3006, 128), "bfloat16", (1, 2, 8, 3006, 128)),  # 12.3 MB a layer
        ((36, 2, 8, 800, 128), "bfloat16", (4, 2, 8, 800, 128)),  # 3.3 MB a layer, 9 chunks without padding
        ((36, 2, 8, 733, 128), "bfloat16", (4, 2, 8, 733, 128)),  # 5 layers would fit but waste 4
        ((3007, 4096), "bfloat16", (1504, 4096)),  # one padding row rather than a prime number of chunks
        ((3, 4), "float32", (3, 4)),
        ((0, 4), "int8", (1, 4)),
        ((4, 0), "int8", (4, 1)),
        ((), "int8", ()),
    ],
)
def test_chunks_are_whole_slabs_of_8_to_16_mb(shape, dtype, expected) -> None:
    field = Field(name="x", dtype=dtype, axes=tuple("abcde"[: len(shape)]))
    chunk = field.chunk_shape(shape)
    assert chunk == expected
    size_mb = math.prod(chunk) * field.stored_dtype.itemsize / 1e6
    assert size_mb <= 16
    assert chunk[:1] == shape[:1] or math.prod(shape) == 0 or size_mb >= 8
