"""Tables that unfold to gigabytes are refused by their footer, without memory or time."""

import io
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alpacache.errors import BadClipError
from alpacache.sources import table as tables
from alpacache.sources.table import check_table, read_columns

POSE = ("timestamp", "x", "y")


def times(rows, step_us=100_000):
    return np.arange(rows) * step_us


def stored(columns, **options):
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)
    file.seek(0)
    return file


def refused(kind, says, call):
    with pytest.raises(BadClipError, match="^clip-7: poses.*" + says) as error:
        call()
    assert error.value.kind == kind
    assert "\n" not in str(error.value)


def test_numbers_come_back_in_their_types(tmp_path):
    columns = {"timestamp": times(40).astype(np.int32), "x": np.arange(40) / 7, "y": np.arange(40), "note": ["n"] * 40}
    pq.write_table(pa.table(columns), tmp_path / "poses")
    found = read_columns(tmp_path / "poses", POSE, where="clip-7: poses")
    assert list(found) == list(POSE)
    assert found["timestamp"].dtype == np.int64
    for name in POSE:
        np.testing.assert_array_equal(found[name], columns[name])
    check_table(tmp_path / "poses", where="clip-7: poses")


def test_missing_numbers_are_nan():
    columns = {"timestamp": times(4), "x": [0.5, None, 2.5, 3.5], "y": pa.array([2**60, None, 3, 4])}
    found = read_columns(stored(columns, row_group_size=3), POSE, where="clip-7: poses")
    np.testing.assert_array_equal(found["x"], [0.5, np.nan, 2.5, 3.5])
    np.testing.assert_array_equal(found["y"], [2.0**60, np.nan, 3, 4])


@pytest.mark.parametrize(
    ("columns", "kind", "says"),
    [
        ({"timestamp": times(4), "x": ["1", "2", "3", "4"], "y": [0.0] * 4}, "wrong_shape", "column x is string"),
        ({"timestamp": times(4) / 1e6, "x": [0.0] * 4, "y": [0.0] * 4}, "wrong_shape", "column timestamp is double"),
        ({"timestamp": times(4), "x": [0.0] * 4}, "wrong_shape", "lacks the columns y; expected timestamp, x, y"),
        (
            {"timestamp": times(4).astype(np.uint64) + np.uint64(2**63), "x": times(4), "y": times(4)},
            "wrong_shape",
            "column timestamp holds 9223372036855075808, beyond 64-bit signed integers",
        ),
        ({"timestamp": times(0), "x": times(0), "y": times(0)}, "wrong_shape", "has no rows"),
        ({"timestamp": [0, None, 2], "x": [0.0] * 3, "y": [0.0] * 3}, "not_finite", "1 rows have no timestamp"),
        (
            pa.Table.from_arrays([pa.array([1, 2])] * 4, names=["timestamp", "x", "y", "timestamp"]),
            "wrong_shape",
            "has 2 columns timestamp; keep the one that is right",
        ),
    ],
    ids=["text", "seconds", "absent", "unsigned", "empty", "null", "twice"],
)
def test_each_wrong_table_has_its_reason(columns, kind, says):
    refused(kind, says, lambda: read_columns(stored(columns), POSE, where="clip-7: poses"))


def test_more_rows_or_bytes_than_a_recording_has_are_not_decoded(monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROWS", 10_000)
    many = stored({name: np.zeros(10_001, np.int64) for name in POSE})
    assert len(many.getvalue()) < 2_000
    refused("unsafe_size", "10,001 rows", lambda: read_columns(many, POSE, where="clip-7: poses"))
    refused("unsafe_size", "10,001 rows", lambda: check_table(many, where="clip-7: poses"))
    monkeypatch.setattr(tables, "MAX_DECODED_BYTES", 8 * 3 * 5_000 - 1)
    wide = stored({name: np.zeros(5_000, np.int64) for name in POSE})
    refused("unsafe_size", "unfolds to 120,000 bytes", lambda: read_columns(wide, POSE, where="clip-7: poses"))
    monkeypatch.setattr(tables, "MAX_DECODED_BYTES", 8 * 3 * 5_000)
    assert len(read_columns(wide, POSE, where="clip-7: poses")["x"]) == 5_000


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_texts_of_a_dictionary_are_counted_and_not_unfolded(kind):
    """Two kilobytes that stand for three gigabytes."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(30_000, np.int32)), pa.array(["A" * 100_000]).cast(kind))
    file = stored({"timestamp": times(30_000), "note": text}, compression="zstd", store_schema=False)
    assert len(file.getvalue()) < 150_000
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    refused("unsafe_size", "bytes of text", lambda: check_table(file, where="clip-7: poses"))
    assert pa.total_allocated_bytes() - before < 2**20
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert len(read_columns(file, ("timestamp",), where="clip-7: poses")["timestamp"]) == 30_000  # it is not looked at


def test_nested_texts_may_be_as_long_as_their_pages(monkeypatch):
    monkeypatch.setattr(tables, "MAX_DECODED_BYTES", 10**6)
    words = stored({"timestamp": pa.array([["A" * 1_000] * 10] * 200, pa.list_(pa.string()))})
    refused("unsafe_size", "unfolds to", lambda: check_table(words, where="clip-7: poses"))
    check_table(stored({"timestamp": pa.array([["a", "b"]] * 50)}), where="clip-7: poses")


def test_poses_at_a_megahertz_are_refused_and_a_wrong_unit_is_left_to_check(monkeypatch):
    monkeypatch.setattr(tables, "FEW_ROWS", 1_000)

    def read(rows, step_us):
        columns = dict.fromkeys(POSE, np.zeros(rows)) | {"timestamp": times(rows, step_us)}
        return read_columns(stored(columns), POSE, where="clip-7: poses")

    refused("unsafe_size", re.escape("1,001 rows within 0.001 s"), lambda: read(1_001, 1))
    assert len(read(1_001, 500)["x"]) == 1_001  # 2 kHz
    assert len(read(900, 100)["x"]) == 900  # 10 Hz in milliseconds, say


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "a").write_bytes(b"PAR1" + bytes(400) + b"PAR1")
    (tmp_path / "folder").mkdir()
    refused(
        "wrong_shape", "is not a readable parquet", lambda: read_columns(tmp_path / "a", POSE, where="clip-7: poses")
    )
    says = "cannot be read: it is a directory"
    refused("unsafe_path", says, lambda: read_columns(tmp_path / "folder", POSE, where="clip-7: poses"))
