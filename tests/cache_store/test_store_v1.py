"""Stores of format version 1 must stay readable, bit for bit, by every later version."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import numpy as np

from cache_store import CacheReader, verify
from cache_store.kv.affine import AffineCodec

DATA = Path(__file__).parents[1] / "data"
CODECS_V1 = {"int8": AffineCodec(key_group=64), "int5": AffineCodec(key_bits=(5,), value_bits=(5,), key_group=64)}
"""What the store was encoded with."""
ENCODED = [
    {"kv_int8": ("61564dd9983e2d28", "55eeb57da21c37aa"), "kv_int5": ("09689cb5d0a063f8", "1866614719a6f27c")},
    {"kv_int8": ("fc5ab1e2fee7c9b2", "a9e03e5ac37c1a45"), "kv_int5": ("a05090a7d8d501ad", "ce3868d99de5a528")},
]
"""Digests, on the first day, of the encoded bytes and of what they decode to."""


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_the_checked_in_store_reads_as_on_its_first_day(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("make_store_v1", DATA / "make_store_v1.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    store = tmp_path / "store_v1"
    shutil.copytree(DATA / "store_v1", store)
    (store / "staging").mkdir(exist_ok=True)  # empty folders are not kept in version control
    reader = CacheReader(store)
    assert reader.sample_ids == ("v1/0", "v1/1")
    assert list(reader.quarantined) == ["v1/bad"]
    for i, sample_id in enumerate(reader.sample_ids):
        got, expected = reader.read(sample_id), made.values(i)
        for name, value in expected.items():
            if name in ENCODED[i]:  # encoders may become better, what is stored stays readable
                raw, decoded = ENCODED[i][name]
                assert digest(got[name]) == raw, name
                codec = CODECS_V1[name.removeprefix("kv_")]
                assert digest(codec.decode(got[name], got["kv"].shape)) == decoded, name
            else:
                assert got[name].tobytes() == np.asarray(value).tobytes(), name
        for name in ("int8", "int5"):
            codec = CODECS_V1[name]
            once = codec.decode(got[f"kv_{name}"], got["kv"].shape)
            error = np.abs(
                (once.astype(np.uint32) << 16).view(np.float32) - (got["kv"].astype(np.uint32) << 16).view(np.float32)
            )
            assert error.max() < {"int8": 0.04, "int5": 0.25}[name]
    assert verify(store, deep=True).ok
